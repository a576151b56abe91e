"""How a daemon is run by its operator, beside what it does."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from common.logs import LogFormat

__all__ = ["AS_USUAL", "OnSigterm", "Operation"]


class OnSigterm(StrEnum):
    """What becomes of a migration that runs when the daemon is told to end."""

    ABORT = "abort"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Operation:
    """`log_format` None: as the environment says."""

    log_format: LogFormat | None = None
    on_sigterm: OnSigterm = OnSigterm.ABORT


AS_USUAL = Operation()
