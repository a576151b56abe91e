"""A destination that cheats, against a real source: the machine goes on where it is, and the result says why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from hostile_destination import HostileDestination, cheating
from rig import Daemon, Rig, assert_completed, machine_toml
from switchover.v1 import host_pb2
from switchover.v1 import migration_pb2 as pb
from test_journey_localhost import goes_on
from traces import Traces, said_nothing_wrong

Calls = dict[str, Callable[..., Any]]
CHUNKS = 32
ACKS = {
    "SendPages": pb.SendPagesResponse,
    "SendMappings": pb.SendMappingsResponse,
    "SendDeviceState": pb.SendDeviceStateResponse,
}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    logging.getLogger("grpc").setLevel(logging.CRITICAL)  # what cheats raise is theirs
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope="module")
def source(rig: Rig) -> Daemon:
    source = rig.start("source", machine_toml(devices=("nic",)))
    with cheating() as (_, address):  # what a daemon opens with its first migration, it keeps
        assert source.migrate(address).reason == "REVOKED"
    return source


def never(destination: HostileDestination, *_: object) -> Any:
    return destination.never()


def hangs(destination: HostileDestination, requests: Iterator[Any], _: object) -> Iterator[Any]:
    yield destination.never()


def answers(value: object) -> Callable[..., Any]:
    return lambda *_: value


def acks(call: str, *numbers: int) -> Calls:
    def cheat(_: HostileDestination, requests: Iterator[Any], __: object) -> Iterator[Any]:
        for _request, number in zip(requests, numbers, strict=False):
            yield ACKS[call](applied_sequence=number)

    return {call: cheat}


def fails(message: str, *, reason: str = "", size: int = 0) -> Callable[..., Any]:
    def cheat(_: HostileDestination, __: object, context: grpc.ServicerContext) -> Any:
        detail = any_pb2.Any()
        info = error_details_pb2.ErrorInfo(reason=reason, domain="switchover", metadata={"more": "x" * size})
        detail.Pack(info)
        status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=message, details=[detail])
        context.abort_with_status(rpc_status.to_status(status))

    return cheat


def verdict(**members: Any) -> Calls:
    return {"Verify": answers(pb.VerifyResponse(**{"chunks": CHUNKS, **members}))}


def differs(chunk: int, size: int = 0, times: int = 1) -> Calls:
    return verdict(mismatches=[pb.ChunkMismatch(chunk=chunk, page_digests=bytes(size))] * times)


def commits_as(state: int) -> Calls:
    return {"Commit": answers(pb.CommitResponse(state=state))}  # type: ignore[arg-type]


ESCAPES = "first line \x1b[31m\r\nTraceback (most recent call last):\n" + "x" * 2000
CHEATS: dict[str, tuple[Calls, set[str]]] = {
    "another version": ({"Prepare": answers(pb.PrepareResponse(protocol_version=7))}, {"PROTOCOL_VERSION"}),
    "a million devices": (
        {"Prepare": answers(pb.PrepareResponse(protocol_version=1, devices=[pb.PreparedDevice(name="x")] * 500_000))},
        {"DEVICE_DIFFERS"},
    ),
    "an ack of what was not sent": (acks("SendPages", 1 << 40), {"IO"}),
    "an ack that goes back": (acks("SendPages", 1, 0), {"IO"}),
    "acks of mappings that were not sent": (acks("SendMappings", 9), {"IO"}),
    "acks of records that were not sent": (acks("SendDeviceState", 1 << 63), {"IO"}),
    "lanes that end": (acks("SendPages"), {"IO"}),
    "mappings that end": (acks("SendMappings"), {"IO"}),
    "records that end": (acks("SendDeviceState"), {"IO"}),
    "an error of many lines": ({"Prepare": fails(ESCAPES)}, {"FAILED_PRECONDITION"}),
    "an error with a reason that is none": ({"Prepare": fails("no", reason="\x1b[2J")}, {"FAILED_PRECONDITION"}),
    "an error with a reason of ours": ({"Prepare": fails("no", reason="CANCELLED")}, {"CANCELLED"}),
    "an error without end": ({"Prepare": fails("no", size=1 << 20)}, {"FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}),
    "an error of many lines in the switchover": ({"Finish": fails(ESCAPES)}, {"FAILED_PRECONDITION"}),
    "a clock at the end of time": ({"ReadClock": answers(pb.ReadClockResponse(monotonic_ns=-(1 << 63)))}, {"REVOKED"}),
    "a verdict on less": (verdict(chunks=1), {"DATA_LOSS"}),
    "a difference outside RAM": (differs(1 << 50), {"DATA_LOSS"}),
    "half a digest": (differs(0, size=4095), {"DATA_LOSS"}),
    "a difference a million times": (differs(0, times=1_000_000), {"DATA_LOSS"}),
    "pages that differ": (differs(3, size=4096), {"DATA_LOSS"}),
    "a device that differs": (verdict(devices=[pb.DeviceMismatch(name="\x1b[2J", what=ESCAPES)]), {"DATA_LOSS"}),
    "a commit that is none": (commits_as(pb.SESSION_STATE_READY), {"REVOKED"}),
    "a commit of no session": (commits_as(pb.SESSION_STATE_UNSPECIFIED), {"REVOKED"}),
    "a commit that was revoked": (commits_as(pb.SESSION_STATE_REVOKED), {"REVOKED"}),
    "a commit that fails": ({"Commit": fails(ESCAPES)}, {"REVOKED"}),
}


def goes_on_here(source: Daemon, result: host_pb2.MigrationResult, since: dict[str, dict[str, int]]) -> None:
    """Fail unless the machine is here, whole, and the result says in a line why."""
    assert result.result in ("failed", "cancelled") and result.owner == "source"
    assert result.error and result.error.isprintable() and len(result.error) < 1000, result.error
    machine = source.look().machine
    assert (machine.state, {device.state for device in machine.devices}) == ("running", {"RUNNING"})
    goes_on(source, since)
    said_nothing_wrong(source)


QUICK = (
    *(
        "another version",
        "an ack of what was not sent",
        "records that end",
        "an error of many lines",
        "a verdict on less",
    ),
    *("a difference a million times", "a commit that is none"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix) for name in CHEATS]
)
def test_a_cheat_gets_nothing(rig: Rig, source: Daemon, name: str) -> None:
    calls, reasons = CHEATS[name]
    before, since = Traces(rig, source), source.counters()
    with cheating(**calls) as (_, address):
        result = source.migrate(address)
    assert result.reason in reasons, result.error
    goes_on_here(source, result, since)
    before.are_gone()


NEVER: dict[str, Calls] = {
    "Prepare": {"Prepare": never},
    "SendPages": {"SendPages": hangs},
    "SendMappings": {"SendMappings": hangs},
    "SendDeviceState": {"SendDeviceState": hangs},
    "ReadClock": {"ReadClock": never},
    "Finish": {"Finish": never},
    "Verify": {"Verify": never},
}


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=() if call in ("Prepare", "Finish") else pytest.mark.matrix) for call in NEVER]
)
def test_who_never_answers_can_be_left(rig: Rig, source: Daemon, call: str) -> None:
    before, since = Traces(rig, source), source.counters()
    with cheating(**NEVER[call]) as (destination, address):
        session = source.begin(address)
        assert destination.reached(call).wait(60)
        source.stub.Cancel(host_pb2.CancelRequest(session_id=session), timeout=20)
        result = source.follow(session)
    assert result.reason == "CANCELLED"
    goes_on_here(source, result, since)
    before.are_gone()


def test_what_is_not_decided_is_asked_for_until_it_is(rig: Rig, source: Daemon) -> None:
    """COMMIT is answered UNAVAILABLE, Resolve with nonsense, and at last with a word that counts."""
    before, since = Traces(rig, source), source.counters()
    words = [pb.SESSION_STATE_UNSPECIFIED, pb.SESSION_STATE_READY, pb.SESSION_STATE_REVOKED]

    def unavailable(_: HostileDestination, __: object, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    def resolve(*_: object) -> pb.ResolveResponse:
        return pb.ResolveResponse(state=words.pop(0))

    with cheating(Commit=unavailable, Resolve=resolve) as (_, address):
        result = source.migrate(address)
    assert (result.reason, words) == ("REVOKED", [])
    goes_on_here(source, result, since)
    before.are_gone()


def test_after_all_that_the_machine_moves(rig: Rig, source: Daemon) -> None:
    destination = rig.start("destination")
    assert_completed(source.migrate(destination.address))
    goes_on(destination)
