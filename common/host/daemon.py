"""The life of a daemon process: one line that says where it listens, then service until a signal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence

import grpc
import structlog

from common.host.host import Host, HostError
from common.ipc.channel import RequestError
from common.rpc.server import Server, tune_allocator
from common.trace import LOG_LEVEL

__all__ = ["configure_logs", "fail", "serve"]

GRACE_SECONDS = 2.0


def configure_logs() -> None:
    """Log to standard error, so that standard output stays for what the user asked."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LOG_LEVEL),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def fail(message: str, code: int = 1) -> int:
    """Say in one line why the daemon does not run; return its exit code (2: its options or machine file are wrong)."""
    print(f"switchover: {message}", file=sys.stderr)
    return code


def serve(
    host: Host,
    listen: str,
    register: Callable[[grpc.Server], None],
    services: Sequence[str],
    *,
    opening: Callable[[], str],
    closing: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGINT or SIGTERM; return the process's exit code.

    `opening` runs once the port is ours and returns what to say about the machine; `closing` runs at the end, before
    calls are cut off. The machine goes on either way.
    """
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    tune_allocator()
    try:
        server = Server(listen, register, services, host.security.server, host.security.access)
    except OSError as error:
        return fail(str(error))
    try:
        # Nobody is answered before it is known what this host owns.
        said = opening()
        server.start()
        print(f"switchover {host.role}: listening on {server.address}", flush=True)
        print(f"switchover {host.role}: {said}", flush=True)
        ended.wait()
        closing()
        if host.machine is not None:
            print(f"switchover {host.role}: the machine goes on", flush=True)
    except (HostError, RequestError, OSError, ValueError) as error:
        return fail(str(error))
    finally:
        server.stop(GRACE_SECONDS)
        host.close()
    return 0
