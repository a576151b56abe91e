"""HostService of a source: the machine can be moved away."""

from __future__ import annotations

import math
import threading
from uuid import uuid4

import grpc
from switchover.v1 import host_pb2, migration_pb2

from common.host.host import Host
from common.host.service import HostServicer
from common.machine.config import MachineSpec
from common.machine.record import Ownership
from common.rpc.errors import RefusalError
from common.rpc.versions import MAX_RECONNECT_SECONDS
from source.commit import Settling
from source.handover import Event
from source.migration import Migration

__all__ = ["SourceServicer"]

DEFAULT_DOWNTIME_MS = 300.0
MAX_LANES = 16

_DECLARED = {host_pb2.OWNER_HERE: Event.DECLARED_HERE, host_pb2.OWNER_THERE: Event.DECLARED_THERE}


class SourceServicer(HostServicer):
    """Adds Migrate and Cancel."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._migration: Migration | None = None
        self._thread: threading.Thread | None = None
        self._settling: Settling | None = None

    def open_machine(self, spec: MachineSpec | None) -> str:
        """Find or start the host's machine, and finish a handover that an earlier daemon has left undecided."""
        said = self.host.open_machine(spec)
        self._settle()
        return said

    def _settle(self) -> None:
        record = self.host.record()
        if record is not None and record.ownership is Ownership.COMMITTING:
            self._settling = Settling(self.host, record)

    def Migrate(self, request: host_pb2.MigrateRequest, context: grpc.ServicerContext) -> host_pb2.MigrateResponse:
        """Check that the machine can leave, and start it on its way."""
        _check(request)
        machine = self.host.require_machine()
        blockers = machine.blockers()
        if blockers:
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "BLOCKED", "; ".join(blockers))
        request.verify = request.verify or migration_pb2.VERIFY_MODE_STRICT
        request.max_downtime_ms = request.max_downtime_ms or DEFAULT_DOWNTIME_MS
        request.lanes = request.lanes or 1
        request.compression = request.compression or host_pb2.COMPRESSION_OFF
        request.lane_kind = request.lane_kind or migration_pb2.LANE_KIND_GRPC
        session_id = uuid4().hex
        self.host.begin_migration(session_id)
        self._settling = None
        try:
            self._migration = Migration(self.host, request, session_id)
        except BaseException:
            self.host.end_migration()
            raise
        self._thread = threading.Thread(target=self._run, args=(self._migration,), name="migration")
        self._thread.start()
        return host_pb2.MigrateResponse(session_id=session_id)

    def _run(self, migration: Migration) -> None:
        try:
            migration.run()
        finally:
            self.host.end_migration()
            if not self.host.ending:
                self._settle()

    def Cancel(self, request: host_pb2.CancelRequest, context: grpc.ServicerContext) -> host_pb2.CancelResponse:
        """End the migration that runs."""
        migration = self._migration
        ours = migration is not None and self.host.migrating and self.host.session_id == migration.session_id
        if migration is None or not ours or request.session_id not in ("", migration.session_id):
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION, "NO_MIGRATION", "no such migration leaves from here"
            )
        migration.cancel()
        return host_pb2.CancelResponse()

    def ResolveHandover(
        self, request: host_pb2.ResolveHandoverRequest, context: grpc.ServicerContext
    ) -> host_pb2.ResolveHandoverResponse:
        """Decide in the place of a destination that is lost for good."""
        event = _DECLARED.get(request.owner)
        if event is None:
            raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", "say who owns the machine")
        record = self.host.record()
        asking = self._settling or self._migration
        if record is None or record.ownership is not Ownership.COMMITTING or asking is None:
            raise _decided("no handover is undecided here")
        if not asking.handover.declare(event):
            raise _decided(f"{record.peer} has just answered")
        return host_pb2.ResolveHandoverResponse()

    def close(self) -> None:
        """End a migration that runs, in good order: the machine goes on here, is the destination's, or is asked for."""
        if self._migration is not None:
            self._migration.abandon()
        if self._thread is not None:
            self._thread.join()
        if self._settling is not None:
            self._settling.end()


def _decided(message: str) -> RefusalError:
    return RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "DECIDED", message)


def _check(request: host_pb2.MigrateRequest) -> None:
    host, separator, port = request.destination.rpartition(":")
    wrong = None
    if not (separator and host and port.isdecimal() and 0 < int(port) < 65536):
        wrong = f"destination {request.destination!r} is not HOST:PORT"
    elif not all(
        0 <= limit < math.inf for limit in (request.max_downtime_ms, request.bandwidth_limit, request.timeout_s)
    ):
        wrong = "limits must be numbers, and not negative"
    elif not 0 <= request.reconnect_s <= MAX_RECONNECT_SECONDS:
        wrong = f"a lost connection is waited for {MAX_RECONNECT_SECONDS:g} s at most"
    elif request.lanes > MAX_LANES:
        wrong = f"at most {MAX_LANES} lanes"
    elif request.compression not in host_pb2.Compression.values():
        wrong = f"unknown compression {request.compression}"
    if wrong is not None:
        raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", wrong)
