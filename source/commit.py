"""The one step that cannot be undone: COMMIT, and what to do when its answer does not come.

A source that is COMMITTING asks until the destination says who owns the machine. That it does not answer decides
nothing; nor does the end of this daemon, for the next one finds the record and goes on asking (`settle`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc
import structlog
from switchover.v1 import migration_pb2, migration_pb2_grpc

from common.host.host import Host
from common.machine.record import Ownership, Record
from common.rpc.channel import open_channel
from common.rpc.errors import PeerError, peer_error
from source import handover

__all__ = ["RevokedError", "commit", "settle"]

CALL_SECONDS = 20.0
RETRY_SECONDS = 1.0

_log = structlog.get_logger()


class RevokedError(Exception):
    """The destination has decided that it does not take the machine."""


def commit(
    stub: migration_pb2_grpc.MigrationServiceStub,
    session_id: str,
    machine_uuid: str,
    incarnation: int,
    say: Callable[[str], None],
) -> float:
    """Send COMMIT; return how long the destination took to start the machine, in ms (0 if that was not heard).

    Raise `RevokedError` if the destination says that it never will. `say` is told why it takes longer.
    """
    request = migration_pb2.CommitRequest(session_id=session_id, incarnation=incarnation)
    try:
        return stub.Commit(request, timeout=CALL_SECONDS).start_us / 1000
    except grpc.RpcError as error:
        failure = peer_error(error)
        _log.warning("COMMIT was not answered", session=session_id, reason=failure.reason, message=str(failure))
    if not _resolve(stub, session_id, machine_uuid, say):
        raise RevokedError("the destination did not commit; the machine goes on here")
    return 0.0


def _resolve(
    stub: migration_pb2_grpc.MigrationServiceStub, session_id: str, machine_uuid: str, say: Callable[[str], None]
) -> bool:
    """Ask until the destination says whether it owns the machine."""
    request = migration_pb2.ResolveRequest(session_id=session_id, machine_uuid=machine_uuid)
    while True:
        try:
            state = stub.Resolve(request, timeout=CALL_SECONDS).state
        except grpc.RpcError as error:
            failure: PeerError = peer_error(error)
            say(f"who owns the machine is not known until the destination answers: {failure}")
            time.sleep(RETRY_SECONDS)
            continue
        return state != migration_pb2.SESSION_STATE_REVOKED


def settle(host: Host, record: Record) -> None:
    """Finish, in the background, a handover that an earlier daemon left COMMITTING."""

    def ask() -> None:
        with open_channel(record.peer) as channel:
            stub = migration_pb2_grpc.MigrationServiceStub(channel)
            gone = _resolve(
                stub, record.session_id, record.machine_uuid, lambda text: host.say(record.session_id, text)
            )
        event = handover.Event.COMMITTED if gone else handover.Event.REVOKED
        ownership = handover.after(Ownership.COMMITTING, event)
        machine = host.machine
        if machine is not None:
            machine.record(ownership, session_id=record.session_id, peer=record.peer)
            if gone:
                host.drop_machine()
            else:
                machine.end()
        host.end_migration()
        _log.info("handover settled", session=record.session_id, ownership=ownership.value)

    host.begin_migration(record.session_id)
    threading.Thread(target=ask, name="settle", daemon=True).start()
