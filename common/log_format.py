"""How lines of a log look; apart from what logs, which takes longer to import than a command may take to start."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["LOG_FORMAT", "LogFormat"]

LOG_FORMAT = "SWITCHOVER_LOG_FORMAT"  #: in the environment: what is not told otherwise logs so


class LogFormat(StrEnum):
    """For people, or a JSON object per line."""

    CONSOLE = "console"
    JSON = "json"
