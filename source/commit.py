"""The one step that cannot be undone: COMMIT, and what to do when its answer does not come.

A source that is COMMITTING asks until the destination says who owns the machine. That it does not answer decides
nothing; nor does the end of this daemon, for the next one finds the record and goes on asking (`settle`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import grpc
import structlog
from switchover.v1 import migration_pb2, migration_pb2_grpc

from common.host.host import Host
from common.ipc.channel import ClosedError, RequestError
from common.machine import record
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
        response = stub.Commit(request, timeout=CALL_SECONDS)
        if response.state in OWNED:
            return response.start_us / 1000
        _log.warning("COMMIT was answered without being done", session=session_id, state=response.state)
    except grpc.RpcError as error:
        failure = peer_error(error)
        _log.warning("COMMIT was not answered", session=session_id, reason=failure.reason, message=str(failure))
    if not _resolve(stub, session_id, say, ended):
        raise RevokedError("the destination did not commit; the machine goes on here")
    return 0.0


def wait_until_started(
    stub: migration_pb2_grpc.MigrationServiceStub,
    session_id: str,
    incarnation: int,
    say: Callable[[str], None],
    ended: threading.Event,
) -> None:
    """Wait until the destination has started the machine that it owns; raise `NotStartedError` if it could not."""
    request = migration_pb2.GetSessionRequest(session_id=session_id)
    again = migration_pb2.CommitRequest(session_id=session_id, incarnation=incarnation)
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
        if session.state not in OWNED:
            raise NotStartedError("the destination has owned the machine, and does not know it any more")
        if session.state == migration_pb2.SESSION_STATE_COMMITTED:
            with suppress(grpc.RpcError):  # the next look tells
                stub.Commit(again, timeout=CALL_SECONDS)
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


def settle(host: Host, known: Record, ended: threading.Event) -> None:
    """Finish, in the background, a handover that an earlier daemon left COMMITTING."""

    def say(text: str) -> None:
        host.events.publish(known.session_id, message=text)

    def ask() -> None:
        try:
            with open_channel(known.peer, host.security.channel) as channel:
                stub = migration_pb2_grpc.MigrationServiceStub(channel)
                gone = _resolve(stub, known.session_id, say, ended)
                event = handover.Event.COMMITTED if gone else handover.Event.REVOKED
                _decide(host, known, handover.after(Ownership.COMMITTING, event))
                if gone:
                    wait_until_started(stub, known.session_id, known.incarnation + 1, say, ended)
                    if known.judged:
                        host.release(Ownership.RELEASED)
            _log.info("handover settled", session=known.session_id, gone=gone)
        except (NotStartedError, UndecidedError, ClosedError, RequestError, OSError) as error:
            say(f"the handover to {known.peer} is not settled: {error}")
            _log.warning("handover not settled", session=known.session_id, message=str(error))
        finally:
            host.end_migration()

    host.begin_migration(known.session_id)
    threading.Thread(target=ask, name="settle", daemon=True).start()


def _decide(host: Host, known: Record, ownership: Ownership) -> None:
    """Record what the destination has said; a machine that stays here goes on."""
    if host.machine is None:
        # Its process has ended meanwhile. If it is not the destination's, then it was switched off here.
        record.write(host.record_path, replace(known, ownership=ownership))
        return
    host.machine.record(ownership, session_id=known.session_id, peer=known.peer, judged=known.judged)
    if ownership is Ownership.OWNER:
        host.machine.end()
