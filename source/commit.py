"""The one step that cannot be undone: COMMIT, and what to do when its answer does not come.

A source that is COMMITTING asks until the destination says who owns the machine. That it does not answer decides
nothing; nor does the end of this daemon, for the next one finds the record and goes on asking (`settle`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc
import structlog
from switchover.v1 import migration_pb2, migration_pb2_grpc

from common.host.host import Host
from common.machine.record import Ownership, Record
from common.rpc.channel import open_channel
from common.rpc.errors import peer_error
from source import handover

__all__ = ["NotStartedError", "RevokedError", "UndecidedError", "commit", "settle", "wait_until_started"]

CALL_SECONDS = 20.0
RETRY_SECONDS = 1.0
POLL_SECONDS = 0.05

OWNED = (
    migration_pb2.SESSION_STATE_COMMITTED,
    migration_pb2.SESSION_STATE_STARTING,
    migration_pb2.SESSION_STATE_RUNNING,
)

_log = structlog.get_logger()


class RevokedError(Exception):
    """The destination has decided that it does not take the machine."""


class NotStartedError(Exception):
    """The destination owns the machine, and could not start it."""


class UndecidedError(Exception):
    """This daemon ends before the destination has said who owns the machine; the next one goes on asking."""


def commit(
    stub: migration_pb2_grpc.MigrationServiceStub,
    session_id: str,
    incarnation: int,
    say: Callable[[str], None],
    ended: threading.Event,
) -> float:
    """Send COMMIT; return how long the destination took to start the machine, in ms (0 if that was not heard).

    Raise `RevokedError` if the destination says that it never will. `say` is told why it takes longer; `ended` ends the
    waiting with `UndecidedError`.
    """
    request = migration_pb2.CommitRequest(session_id=session_id, incarnation=incarnation)
    try:
        return stub.Commit(request, timeout=CALL_SECONDS).start_us / 1000
    except grpc.RpcError as error:
        failure = peer_error(error)
        _log.warning("COMMIT was not answered", session=session_id, reason=failure.reason, message=str(failure))
    if not _resolve(stub, session_id, say, ended):
        raise RevokedError("the destination did not commit; the machine goes on here")
    return 0.0


def wait_until_started(
    stub: migration_pb2_grpc.MigrationServiceStub, session_id: str, say: Callable[[str], None], ended: threading.Event
) -> None:
    """Wait until the destination has started the machine that it owns; raise `NotStartedError` if it could not."""
    request = migration_pb2.GetSessionRequest(session_id=session_id)
    while not ended.is_set():
        try:
            session = stub.GetSession(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            say(f"whether the machine has started is not known until the destination answers: {peer_error(error)}")
            ended.wait(RETRY_SECONDS)
            continue
        if session.failure:
            raise NotStartedError(f"the destination owns the machine and could not start it: {session.failure}")
        if session.state == migration_pb2.SESSION_STATE_RUNNING:
            return
        ended.wait(POLL_SECONDS)
    raise UndecidedError("the daemon ends before the destination has said that the machine has started")


def _resolve(
    stub: migration_pb2_grpc.MigrationServiceStub, session_id: str, say: Callable[[str], None], ended: threading.Event
) -> bool:
    """Ask until the destination says whether it owns the machine."""
    request = migration_pb2.ResolveRequest(session_id=session_id)
    while not ended.is_set():
        try:
            state = stub.Resolve(request, timeout=CALL_SECONDS).state
        except grpc.RpcError as error:
            say(f"who owns the machine is not known until the destination answers: {peer_error(error)}")
            ended.wait(RETRY_SECONDS)
            continue
        if state in OWNED:
            return True
        if state == migration_pb2.SESSION_STATE_REVOKED:
            return False
        ended.wait(RETRY_SECONDS)
    raise UndecidedError("the daemon ends before the destination has said who owns the machine")


def settle(host: Host, record: Record, ended: threading.Event) -> None:
    """Finish, in the background, a handover that an earlier daemon left COMMITTING."""

    def say(text: str) -> None:
        host.events.publish(record.session_id, message=text)

    def ask() -> None:
        try:
            with open_channel(record.peer) as channel:
                stub = migration_pb2_grpc.MigrationServiceStub(channel)
                gone = _resolve(stub, record.session_id, say, ended)
            ownership = handover.after(
                Ownership.COMMITTING, handover.Event.COMMITTED if gone else handover.Event.REVOKED
            )
            if host.machine is not None:
                host.machine.record(ownership, session_id=record.session_id, peer=record.peer)
                if gone:
                    host.drop_machine()
                else:
                    host.machine.end()
            _log.info("handover settled", session=record.session_id, ownership=ownership.value)
        except UndecidedError as error:
            _log.warning("handover not settled", session=record.session_id, message=str(error))
        finally:
            host.end_migration()

    host.begin_migration(record.session_id)
    threading.Thread(target=ask, name="settle", daemon=True).start()
