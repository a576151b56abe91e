"""How a daemon is run by its operator, beside what it does."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from common.log_format import LogFormat
from common.rpc.versions import MAX_RECONNECT_SECONDS

__all__ = ["AS_USUAL", "OnSigterm", "Operation"]


class OnSigterm(StrEnum):
    """What becomes of a migration that runs when the daemon is told to end."""

    ABORT = "abort"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Operation:
    """`log_format` None: as the environment says.

    `max_reconnect_s`: for how many seconds at most a destination keeps a session whose source cannot be reached.
    """

    log_format: LogFormat | None = None
    on_sigterm: OnSigterm = OnSigterm.ABORT
    max_reconnect_s: float = MAX_RECONNECT_SECONDS


AS_USUAL = Operation()
