"""MigrationService: finds the session that a call belongs to, and lets it do the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import grpc
import structlog
from switchover.v1 import migration_pb2, migration_pb2_grpc

from common.host.host import Host
from common.host.ownership import ARRIVED, COMMITTED, OPEN, REVOKED
from common.ipc.channel import ClosedError, RequestError
from common.logs import enter_session
from common.memory.pages import PageBatch
from common.rpc.access import caller
from common.rpc.errors import RefusalError
from common.rpc.page_batch import parse
from common.rpc.versions import HIGHEST, LOWEST, MAX_RECONNECT_SECONDS, RECONNECT, choose, shared
from destination import handover
from destination.migration import Arrival
from destination.refusal import bad

__all__ = ["MigrationServicer", "register"]

_log = structlog.get_logger()

MAX_LANES = 16
MAX_DIGITS = 20
SERVICE = "switchover.v1.MigrationService"

Response = TypeVar("Response")


# What a session is of which only the decision is known: a daemon that starts again starts what was committed to it.
_DECIDED = {COMMITTED: handover.RUNNING, REVOKED: handover.REVOKED, None: handover.UNKNOWN}


class MigrationServicer(migration_pb2_grpc.MigrationServiceServicer):
    """One machine arrives at a time; the last session is kept, so that it can be asked about."""

    def __init__(
        self,
        host: Host,
        lane_listen: tuple[str, int] = ("127.0.0.1", 0),
        max_reconnect_s: float = MAX_RECONNECT_SECONDS,
    ) -> None:
        """`lane_listen`: host and port for TCP page lanes; port 0: a free one for each session.

        `max_reconnect_s`: for how many seconds at most a session waits for its source.
        """
        self._host = host
        self._max_reconnect_s = max_reconnect_s
        self._lane_listen = lane_listen
        self._arrival: Arrival | None = None
        self._lock = threading.Lock()

    def Prepare(
        self, request: migration_pb2.PrepareRequest, context: grpc.ServicerContext
    ) -> migration_pb2.PrepareResponse:
        """Open a session."""
        version = choose(request.protocol_version, request.highest_protocol_version)
        if version is None:
            highest = max(request.protocol_version, request.highest_protocol_version)
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "PROTOCOL_VERSION",
                f"the source speaks protocol {request.protocol_version} to {highest}, this destination {LOWEST} to "
                f"{HIGHEST}",
            )
        _check_session_id(request.session_id)
        if request.lanes > MAX_LANES:
            raise bad(f"at most {MAX_LANES} lanes")
        if not 0 <= request.reconnect_s <= MAX_RECONNECT_SECONDS:
            raise bad(f"a session is kept for {MAX_RECONNECT_SECONDS:g} s at most")
        if not self._host.is_new(request.session_id):
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION, "SESSION_ENDED", "this session was here already; begin a new one"
            )
        if self._host.machine is not None:
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "HAS_MACHINE", "this host has a machine already")
        record = self._host.record()
        if (
            record is not None
            and record.machine_uuid == request.machine_uuid
            and request.incarnation <= record.incarnation
        ):
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION, "OLD_INCARNATION", "a later incarnation was here already"
            )
        waiting = self._arrival
        if (
            waiting is not None
            and waiting.is_waiting
            and waiting.machine_uuid == request.machine_uuid
            and self._is_its_source(waiting.session_id, context)
        ):
            waiting.lose("its source has begun anew")
        self._host.begin_migration(request.session_id)
        enter_session(request.session_id)
        try:
            self._host.decide(request.session_id, OPEN, caller(context))
            self._host.set_aside()
        except BaseException:
            self._host.end_migration()
            raise
        features = shared(request.features)
        reconnect_s = min(request.reconnect_s, self._max_reconnect_s) if RECONNECT in features else 0.0
        with self._lock:
            if self._arrival is not None:
                self._arrival.close()
            self._arrival = arrival = Arrival(self._host, request, self._lane_listen, reconnect_s)
        prepared = arrival.prepare(request)
        if not context.is_active():
            # It has cancelled, or has gone, while the machine was built: it will not come back for this session.
            arrival.revoke("the source has not waited for it")
        prepared.protocol_version = version
        prepared.features.extend(features)
        prepared.reconnect_s = reconnect_s
        return prepared

    def ReadClock(
        self, request: migration_pb2.ReadClockRequest, context: grpc.ServicerContext
    ) -> migration_pb2.ReadClockResponse:
        """Read the clock."""
        return migration_pb2.ReadClockResponse(monotonic_ns=time.monotonic_ns())

    def SendPages(
        self, request_iterator: Iterator[object], context: grpc.ServicerContext
    ) -> Iterator[migration_pb2.SendPagesResponse]:
        """Apply a lane's batches (which arrive as bytes: see `register`)."""
        arrival = self._of_stream(context)
        lane = _number(context, "lane")
        batches = (_parse(message) for message in request_iterator)
        yield from _streaming(arrival, f"lane {lane}", arrival.apply_pages(lane, batches), context)

    def SendDeviceState(
        self, request_iterator: Iterator[migration_pb2.SendDeviceStateRequest], context: grpc.ServicerContext
    ) -> Iterator[migration_pb2.SendDeviceStateResponse]:
        """Apply a device's records."""
        arrival = self._of_stream(context)
        name = _metadata(context, "device")
        records = arrival.apply_device_state(name, request_iterator)
        yield from _streaming(arrival, f"device {name}", records, context)

    def SendMappings(
        self, request_iterator: Iterator[migration_pb2.SendMappingsRequest], context: grpc.ServicerContext
    ) -> Iterator[migration_pb2.SendMappingsResponse]:
        """Apply mapping changes."""
        arrival = self._of_stream(context)
        yield from _streaming(arrival, "mappings", arrival.apply_mappings(request_iterator), context)

    def Reconnect(
        self, request: migration_pb2.ReconnectRequest, context: grpc.ServicerContext
    ) -> migration_pb2.ReconnectResponse:
        """Begin a new generation of streams."""
        return self._of(request.session_id, context).reconnect(request)

    def Finish(
        self, request: migration_pb2.FinishRequest, context: grpc.ServicerContext
    ) -> migration_pb2.FinishResponse:
        """Load the rest."""
        try:
            return self._of(request.session_id, context).finish(request)
        except (ClosedError, RequestError) as error:
            raise RefusalError(grpc.StatusCode.ABORTED, "CANNOT_LOAD", str(error)) from error

    def Verify(
        self, request: migration_pb2.VerifyRequest, context: grpc.ServicerContext
    ) -> migration_pb2.VerifyResponse:
        """Compare."""
        return self._of(request.session_id, context).verify(request)

    def Commit(
        self, request: migration_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> migration_pb2.CommitResponse:
        """Take the machine over."""
        return self._of(request.session_id, context).commit(request)

    def Halt(self, request: migration_pb2.HaltRequest, context: grpc.ServicerContext) -> migration_pb2.HaltResponse:
        """Pause the machine that this session has brought, also if another daemon of this host has served it then."""
        record = self._host.record()
        if record is None or record.session_id != request.session_id or record.ownership not in ARRIVED:
            raise RefusalError(
                grpc.StatusCode.NOT_FOUND, "NO_SESSION", "no machine is here that such a session brought"
            )
        self._require_its_source(request.session_id, context)
        _log.error("machine halted by its source", session=request.session_id, reason=request.reason)
        self._host.require_machine().pause()
        self._host.events.publish(request.session_id, machine_state="paused")
        return migration_pb2.HaltResponse()

    def GetSession(
        self, request: migration_pb2.GetSessionRequest, context: grpc.ServicerContext
    ) -> migration_pb2.GetSessionResponse:
        """Look."""
        arrival = self._arrival
        if arrival is None or arrival.session_id != request.session_id:
            _check_session_id(request.session_id)
            return migration_pb2.GetSessionResponse(
                state=_DECIDED[self._host.decision(request.session_id)],
                failure=self._host.arrival_failure(request.session_id),
            )
        return migration_pb2.GetSessionResponse(
            state=arrival.state,
            machine_uuid=arrival.machine_uuid,
            guest_gap_us=arrival.guest_gap_us,
            failure=arrival.failure,
        )

    def Resolve(
        self, request: migration_pb2.ResolveRequest, context: grpc.ServicerContext
    ) -> migration_pb2.ResolveResponse:
        """Decide: what is not committed by now is revoked, on disk, before it is answered.

        What never came is nothing to note: whoever asks could else keep sessions from coming.
        """
        arrival = self._arrival
        if arrival is not None and arrival.session_id == request.session_id:
            if arrival.state in (handover.PREPARING, handover.READY):  # else nothing is left to be changed
                self._require_its_source(request.session_id, context)
            enter_session(request.session_id)
            try:
                arrival.revoke("the source asked for a decision")
            except ValueError:
                return migration_pb2.ResolveResponse(state=arrival.state)
            return migration_pb2.ResolveResponse(state=handover.REVOKED)
        _check_session_id(request.session_id)
        decision = self._host.decision(request.session_id)
        if decision is None:
            if not self._host.is_new(request.session_id):
                self._host.decide(request.session_id, REVOKED)
            decision = REVOKED
        return migration_pb2.ResolveResponse(state=_DECIDED[decision])

    def Abort(self, request: migration_pb2.AbortRequest, context: grpc.ServicerContext) -> migration_pb2.AbortResponse:
        """End the session."""
        arrival = self._arrival
        if arrival is not None and arrival.session_id == request.session_id:
            self._require_its_source(request.session_id, context)
            enter_session(request.session_id)
            try:
                arrival.revoke(request.reason)
            except ValueError as error:
                raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "COMMITTED", str(error)) from error
        return migration_pb2.AbortResponse()

    def _of_stream(self, context: grpc.ServicerContext) -> Arrival:
        return self._of(_metadata(context, "session-id"), context)

    def _of(self, session_id: str, context: grpc.ServicerContext) -> Arrival:
        arrival = self._arrival
        if arrival is None or arrival.session_id != session_id:
            what = "no such session is known here"
            if arrival is None and _is_session_id(session_id) and not self._host.is_new(session_id):
                what = "the destination was started anew: what had come is gone, and the next migration begins anew"
            raise RefusalError(grpc.StatusCode.NOT_FOUND, "NO_SESSION", what)
        self._require_its_source(session_id, context)
        enter_session(session_id)
        return arrival

    def _is_its_source(self, session_id: str, context: grpc.ServicerContext) -> bool:
        return caller(context) == self._host.begun_by(session_id)

    def _require_its_source(self, session_id: str, context: grpc.ServicerContext) -> None:
        """Refuse whoever has other names than who has begun the session, if it is one that came here."""
        if not self._is_its_source(session_id, context):
            who = ", ".join(sorted(caller(context))) or "a caller without a name"
            raise RefusalError(grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED", f"{who} has not begun this session")

    def is_busy(self) -> bool:
        """Return whether a migration runs; one that came is over when its source has closed its streams."""
        return self._host.migrating or (self._arrival is not None and self._arrival.is_streaming)

    def close(self) -> None:
        """End an arrival that is not committed, in good order."""
        if self._arrival is not None:
            if self._arrival.state in (handover.PREPARING, handover.READY):
                self._arrival.revoke("the destination was told to stop")
            else:
                self._arrival.close()


def register(servicer: MigrationServicer, server: grpc.Server) -> None:
    """Register the service; batches of pages stay bytes: protobuf would copy each megabyte once more."""
    migration_pb2_grpc.add_MigrationServiceServicer_to_server(servicer, server)
    pages: grpc.RpcMethodHandler[bytes, migration_pb2.SendPagesResponse] = grpc.stream_stream_rpc_method_handler(
        servicer.SendPages,
        request_deserializer=None,
        response_serializer=migration_pb2.SendPagesResponse.SerializeToString,
    )
    # What is registered later under the same name is what is found.
    server.add_registered_method_handlers(SERVICE, {"SendPages": pages})


def _streaming(
    arrival: Arrival, name: str, answers: Iterator[Response], context: grpc.ServicerContext
) -> Iterator[Response]:
    generation = _number(context, "generation", "0")
    try:
        with arrival.streaming(name, generation, context.cancel):
            yield from answers
    finally:
        if not context.is_active():
            arrival.broken(generation, "the source is gone")


def _parse(message: object) -> PageBatch:
    assert isinstance(message, bytes)
    try:
        return parse(message)
    except ValueError as error:
        raise bad(f"page batch: {error}") from error


def _is_session_id(session_id: str) -> bool:
    return session_id.isascii() and session_id.isalnum() and len(session_id) <= 64


def _check_session_id(session_id: str) -> None:
    if not _is_session_id(session_id):
        raise bad("the session's name is not one")


def _metadata(context: grpc.ServicerContext, key: str, otherwise: str | None = None) -> str:
    for name, value in context.invocation_metadata():
        if name == key and isinstance(value, str):
            return value
    if otherwise is None:
        raise bad(f"metadata {key!r} is missing")
    return otherwise


def _number(context: grpc.ServicerContext, key: str, otherwise: str | None = None) -> int:
    text = _metadata(context, key, otherwise)
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise bad(f"no {key} number: {text!r}")
    return int(text)
