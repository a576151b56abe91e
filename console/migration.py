"""Starting a migration and following it to its result, across lost connections and impatient operators."""

from __future__ import annotations

import time

import grpc
from switchover.v1.host_pb2 import CancelRequest, MigrateRequest, MigrationResult, WatchEventsRequest
from switchover.v1.host_pb2_grpc import HostServiceStub

from console.daemon import QUICK_CALL_S, SLOW_CALL_S
from console.errors import CommandError
from console.exit_codes import ExitCode
from console.progress import ProgressDisplay

__all__ = ["follow", "migrate"]

ATTEMPTS = 5
RETRY_S = 1.0


def migrate(stub: HostServiceStub, request: MigrateRequest, display: ProgressDisplay) -> MigrationResult:
    """Start a migration and return its result; raise `grpc.RpcError` or `CommandError` if that cannot be had.

    Ctrl-C cancels the migration and waits for what comes of it; a second one leaves it to itself.
    """
    session_id = stub.Migrate(request, timeout=SLOW_CALL_S).session_id
    with display:
        return follow(stub, session_id, display)


def follow(stub: HostServiceStub, session_id: str, display: ProgressDisplay) -> MigrationResult:
    """Feed a session's events to the display until its result.

    The migration does not depend on us: if the connection breaks, it goes on, and we come back. The daemon then begins
    with what has happened so far; what we have seen is skipped.
    """
    failures = 0
    cancelled = False
    latest_ms = 0
    while True:
        events = stub.WatchEvents(WatchEventsRequest(session_id=session_id))
        try:
            for event in events:
                if event.HasField("result"):
                    return event.result
                if event.unix_ms >= latest_ms:
                    latest_ms = event.unix_ms
                    display.feed(event)
            raise CommandError("the daemon has ended before the migration; see its log", ExitCode.UNREACHABLE)
        except KeyboardInterrupt:
            if cancelled:
                raise
            cancelled = True
            display.note("cancelling; Ctrl-C again to leave the migration to itself")
            _cancel(stub, session_id, display)
        except grpc.RpcError as error:
            failures += 1
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            if failures == ATTEMPTS:
                raise CommandError(
                    "the daemon cannot be reached any more. If it has ended, so has the migration, and the machine "
                    "goes on without it: start it again, and ask switchover status",
                    ExitCode.UNREACHABLE,
                ) from error
            if failures == 1:
                display.note("the connection to the daemon is lost; trying again")
            time.sleep(RETRY_S)
        finally:
            events.cancel()


def _cancel(stub: HostServiceStub, session_id: str, display: ProgressDisplay) -> None:
    try:
        stub.Cancel(CancelRequest(session_id=session_id), timeout=QUICK_CALL_S)
    except grpc.RpcError as error:
        # Too late, or out of reach: what comes of it is told by the result.
        display.note(f"not cancelled: {error.details()}")
