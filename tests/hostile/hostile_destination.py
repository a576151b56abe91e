"""A destination that speaks MigrationService, takes everything, and keeps nothing; cheats override a call of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from switchover.v1 import migration_pb2 as pb
from switchover.v1 import migration_pb2_grpc

from common.rpc.channel import BULK_OPTIONS

PATIENCE = 60.0


class HostileDestination(migration_pb2_grpc.MigrationServiceServicer):
    """Every call is answered as a good destination would; `ended` lets go those that never answer."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.asked: dict[str, threading.Event] = {}
        self.sessions: list[str] = []

    def reached(self, name: str) -> threading.Event:
        """Return what is set when a call of that name has come."""
        return self.asked.setdefault(name, threading.Event())

    def never(self) -> Any:
        """Answer nothing until the test ends."""
        self.ended.wait(PATIENCE)
        raise RuntimeError("the test has ended")

    def Prepare(self, request: pb.PrepareRequest, context: grpc.ServicerContext) -> pb.PrepareResponse:
        self.sessions.append(request.session_id)
        return pb.PrepareResponse(protocol_version=1)

    def ReadClock(self, request: pb.ReadClockRequest, context: grpc.ServicerContext) -> pb.ReadClockResponse:
        return pb.ReadClockResponse(monotonic_ns=time.monotonic_ns())

    def SendPages(
        self, requests: Iterator[pb.SendPagesRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SendPagesResponse]:
        for request in requests:
            yield pb.SendPagesResponse(applied_sequence=request.sequence)

    def SendDeviceState(
        self, requests: Iterator[pb.SendDeviceStateRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SendDeviceStateResponse]:
        for request in requests:
            yield pb.SendDeviceStateResponse(applied_sequence=request.sequence)

    def SendMappings(
        self, requests: Iterator[pb.SendMappingsRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SendMappingsResponse]:
        for request in requests:
            yield pb.SendMappingsResponse(applied_sequence=request.sequence)

    def Finish(self, request: pb.FinishRequest, context: grpc.ServicerContext) -> pb.FinishResponse:
        return pb.FinishResponse()

    def Verify(self, request: pb.VerifyRequest, context: grpc.ServicerContext) -> pb.VerifyResponse:
        return pb.VerifyResponse(
            chunks=len(request.chunk_digests) // 8, compared_devices=[device.name for device in request.devices]
        )

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:
        raise RuntimeError("a cheat never gets the machine")

    def Resolve(self, request: pb.ResolveRequest, context: grpc.ServicerContext) -> pb.ResolveResponse:
        return pb.ResolveResponse(state=pb.SESSION_STATE_REVOKED)

    def GetSession(self, request: pb.GetSessionRequest, context: grpc.ServicerContext) -> pb.GetSessionResponse:
        return pb.GetSessionResponse(state=pb.SESSION_STATE_REVOKED)

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        return pb.AbortResponse()


@contextmanager
def cheating(**calls: Callable[..., Any]) -> Iterator[tuple[HostileDestination, str]]:
    """Serve a destination with some calls of a cheat's: functions of the destination, the request and its context."""
    destination = HostileDestination()
    for name, call in calls.items():

        def cheat(request: Any, context: Any, call: Callable[..., Any] = call, name: str = name) -> Any:
            destination.reached(name).set()
            return call(destination, request, context)

        setattr(destination, name, cheat)
    server = grpc.server(ThreadPoolExecutor(32), options=BULK_OPTIONS)
    migration_pb2_grpc.add_MigrationServiceServicer_to_server(destination, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield destination, f"127.0.0.1:{port}"
    finally:
        destination.ended.set()
        server.stop(0).wait()
