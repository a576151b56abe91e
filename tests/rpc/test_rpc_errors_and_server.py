"""Errors and the server together, through real gRPC: what a servicer raises is what a caller gets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from switchover.v1 import host_pb2, host_pb2_grpc, migration_pb2, migration_pb2_grpc

from common.host.host import Host
from common.host.service import HostServicer
from common.rpc import channel as rpc_channel
from common.rpc import errors as rpc_errors
from common.rpc.channel import open_bulk_channel, open_channel
from common.rpc.errors import PeerError, RefusalError, describe, peer_error, status_of
from common.rpc.server import Server

HOST_SERVICE = "switchover.v1.HostService"
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


class Servicer(HostServicer):
    """Raises what it is told to, before the first answer or after it."""

    def __init__(self) -> None:
        super().__init__(cast("Host", None))  # nothing is asked of it here
        self.error: Exception | None = None

    def Pause(self, request: host_pb2.PauseRequest, context: grpc.ServicerContext) -> host_pb2.PauseResponse:  # noqa: N802  # gRPC's name
        if self.error is not None:
            raise self.error
        return host_pb2.PauseResponse()

    def WatchEvents(  # noqa: N802  # gRPC's name
        self, request: host_pb2.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[host_pb2.WatchEventsResponse]:
        yield host_pb2.WatchEventsResponse(message="first")
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Servicer, str]]:
    servicer = Servicer()
    server = Server(
        "127.0.0.1:0",
        lambda grpc_server: host_pb2_grpc.add_HostServiceServicer_to_server(servicer, grpc_server),
        [HOST_SERVICE],
    )
    server.start()
    yield servicer, server.address
    server.stop(0)


@pytest.fixture(scope="module")
def channel(served: tuple[Servicer, str]) -> Iterator[grpc.Channel]:
    with open_channel(served[1]) as opened:
        yield opened


@pytest.fixture
def servicer(served: tuple[Servicer, str]) -> Iterator[Servicer]:
    yield served[0]
    served[0].error = None


def failure(call: Callable[[], Any]) -> PeerError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return peer_error(raised.value)


def pause(channel: grpc.Channel) -> Callable[[], Any]:
    return lambda: host_pb2_grpc.HostServiceStub(channel).Pause(host_pb2.PauseRequest(), timeout=10)


@pytest.mark.parametrize("code", CODES)
def test_a_refusal_arrives_with_code_reason_and_sentence(
    servicer: Servicer, channel: grpc.Channel, code: grpc.StatusCode
) -> None:
    servicer.error = RefusalError(code, "HAS_MACHINE", "this host has a machine already: näme")
    error = failure(pause(channel))
    assert (error.code, error.reason, str(error)) == (code, "HAS_MACHINE", "this host has a machine already: näme")


def test_a_status_carries_the_reason_in_the_projects_domain() -> None:
    status = status_of(RefusalError(grpc.StatusCode.DATA_LOSS, "DATA_LOSS", "3 pages differ"))
    assert isinstance(status, grpc.Status) and status.code is grpc.StatusCode.DATA_LOSS
    assert status.details == "3 pages differ"
    assert b"switchover" in dict(status.trailing_metadata)["grpc-status-details-bin"]


def test_a_stream_may_be_refused_after_it_began(servicer: Servicer, channel: grpc.Channel) -> None:
    servicer.error = RefusalError(grpc.StatusCode.ABORTED, "CANNOT_LOAD", "the device is gone")
    stream = host_pb2_grpc.HostServiceStub(channel).WatchEvents(host_pb2.WatchEventsRequest(), timeout=10)
    assert next(stream).message == "first"
    error = failure(lambda: next(stream))
    assert (error.reason, str(error)) == ("CANNOT_LOAD", "the device is gone")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_defect_is_internal_and_shows_no_traceback(
    servicer: Servicer, channel: grpc.Channel, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    servicer.error = KeyError("missing")
    stub = host_pb2_grpc.HostServiceStub(channel)
    if streaming:
        error = failure(lambda: list(stub.WatchEvents(host_pb2.WatchEventsRequest(), timeout=10)))
    else:
        error = failure(pause(channel))
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert str(error) == "KeyError: 'missing'"
    logged = capsys.readouterr()
    assert "defect" in logged.out + logged.err  # the operator of the daemon is told


def test_a_call_that_is_not_implemented_is_no_switchover_daemon(channel: grpc.Channel) -> None:
    stub = migration_pb2_grpc.MigrationServiceStub(channel)  # nobody serves it here
    error = failure(lambda: stub.Abort(migration_pb2.AbortRequest(), timeout=10))
    assert (error.code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_SWITCHOVER")


def test_nobody_there_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        with open_channel(f"127.0.0.1:{unused.getsockname()[1]}") as nowhere, pytest.raises(grpc.RpcError) as raised:
            pause(nowhere)()
    reason, text = describe(raised.value)
    assert reason == "UNREACHABLE" and text.startswith("cannot be reached: ") and "\n" not in text


class Failed(grpc.RpcError):
    """A call that failed without a word of the peer."""

    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        super().__init__()
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


@pytest.mark.parametrize(
    ("code", "details", "reason", "text"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, "x", "NO_ANSWER", "has not answered in time"),
        (grpc.StatusCode.UNAVAILABLE, "refused\nby whom", "UNREACHABLE", "cannot be reached: refused"),
        (grpc.StatusCode.UNIMPLEMENTED, None, "NOT_SWITCHOVER", "what answers there is not"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, " too large\nmore", "RESOURCE_EXHAUSTED", "too large"),
        (grpc.StatusCode.CANCELLED, None, "CANCELLED", "CANCELLED"),
        (grpc.StatusCode.UNKNOWN, "  \n ", "UNKNOWN", "no details"),
    ],
)
def test_failures_without_a_reason_get_one(code: grpc.StatusCode, details: str | None, reason: str, text: str) -> None:
    error = peer_error(Failed(code, details))
    assert error.reason == reason and error.code is code and str(error).startswith(text)
    assert "\n" not in str(error)


def test_somebody_elses_reasons_are_not_ours(
    servicer: Servicer, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer.error = RefusalError(grpc.StatusCode.PERMISSION_DENIED, "QUOTA", "no")
    with pytest.raises(grpc.RpcError) as raised:
        pause(channel)()
    assert rpc_status.from_call(raised.value).details
    monkeypatch.setattr(rpc_errors, "DOMAIN", "example.org")
    assert peer_error(raised.value).reason == "PERMISSION_DENIED"


@pytest.mark.parametrize("service", ["", HOST_SERVICE])
def test_health_is_serving(channel: grpc.Channel, service: str) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=10)
    listed = {service.name for service in answer.list_services_response.service}
    assert listed == {HOST_SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError) as refused:
            Server(address, lambda _: None, [])
    assert str(refused.value).startswith(f"cannot listen on {address}: ") and "\n" not in str(refused.value)


def test_two_servers_do_not_share_a_port(served: tuple[Servicer, str]) -> None:
    """SO_REUSEPORT, which gRPC sets by default, would let two daemons answer in turn."""
    with pytest.raises(OSError):
        Server(served[1], lambda _: None, [])


def test_a_large_batch_passes_and_a_monstrous_one_does_not(channel: grpc.Channel, servicer: Servicer) -> None:
    servicer.error = RefusalError(grpc.StatusCode.ABORTED, "LONG", "x" * 100)
    call: Callable[..., Any] = channel.unary_unary(f"/{HOST_SERVICE}/Pause", request_serializer=lambda data: data)
    assert (
        failure(lambda: call(bytes([0xA2, 0x06]) + b"\x80\x80\x80\x04" + bytes(8 << 20), timeout=10)).reason == "LONG"
    )
    too_large = bytes(rpc_channel.MAX_MESSAGE + 1)
    assert failure(lambda: call(too_large, timeout=10)).reason == "RESOURCE_EXHAUSTED"


def test_bulk_streams_have_connections_of_their_own(served: tuple[Servicer, str]) -> None:
    """Two channels to one address with the same options would share one, and a call would wait behind a lane."""
    seen: set[str] = set()

    class Peers(HostServicer):
        def Pause(self, request: host_pb2.PauseRequest, context: grpc.ServicerContext) -> host_pb2.PauseResponse:  # noqa: N802
            seen.add(context.peer())
            return host_pb2.PauseResponse()

    server = Server(
        "127.0.0.1:0",
        lambda grpc_server: host_pb2_grpc.add_HostServiceServicer_to_server(Peers(cast("Host", None)), grpc_server),
        [],
    )
    server.start()
    channels = [open_bulk_channel(server.address), open_bulk_channel(server.address), open_channel(server.address)]
    for opened in channels:
        pause(opened)()
    for opened in channels:
        opened.close()
    server.stop(0)
    assert len(seen) == 3
