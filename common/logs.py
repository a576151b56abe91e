"""What our processes log, and how: for people, or a JSON object per line, with the migration that a line is about.

A thread that works for a migration is in its session (`enter_session`); whatever it logs then says so. Threads do not
inherit that from whoever started them, so each says it for itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import StrEnum

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from common.trace import LOG_LEVEL

__all__ = ["LOG_FORMAT", "LogFormat", "configure_logs", "enter_session", "leave_session"]

LOG_FORMAT = "SWITCHOVER_LOG_FORMAT"  #: in the environment: what is not told otherwise logs so


class LogFormat(StrEnum):
    """How lines look."""

    CONSOLE = "console"
    JSON = "json"


def configure_logs(log_format: LogFormat | None = None, session: Callable[[], str] = lambda: "") -> None:
    """Log to standard error, so that standard output stays for what the user asked.

    Without a format the environment's counts, and with one it is what children inherit. `session` is asked for the
    migration of a line that no thread has named one for.
    """
    if log_format is not None:
        os.environ[LOG_FORMAT] = log_format.value
    as_json = os.environ.get(LOG_FORMAT) == LogFormat.JSON

    def name_session(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
        if "session" not in line and (running := session()):
            line["session"] = running
        return line

    rendering: list[Processor] = (
        [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
        if as_json
        else [structlog.processors.format_exc_info, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            name_session,
            *rendering,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LOG_LEVEL),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def enter_session(session_id: str) -> None:
    """Log for a migration from now on, in this thread."""
    structlog.contextvars.bind_contextvars(session=session_id)


def leave_session() -> None:
    """Log for none: what was called last in this thread is over."""
    structlog.contextvars.clear_contextvars()
