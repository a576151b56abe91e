"""The incoming story and its service, around a machine that only takes notes: what is accepted, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from switchover.v1 import migration_pb2 as pb

from common.host.host import Host
from common.host.ownership import COMMITTED as DECIDED_COMMITTED
from common.host.ownership import OPEN
from common.host.ownership import REVOKED as DECIDED_REVOKED
from common.ipc.channel import ClosedError, RequestError
from common.machine import record
from common.machine.client import Changes, DeviceConfig, DeviceInfo, MachineClient, MappingChange
from common.machine.config import MachineSpec, ProgramSpec, ViommuSpec, to_json
from common.machine.device import Digest, Pending
from common.machine.record import Ownership, Record
from common.memory.layout import CHUNK_PAGES, PAGE_SIZE
from common.memory.pages import Encoding, PageBatch
from common.memory.ram import GuestRam
from common.rpc import versions
from common.rpc.errors import RefusalError
from common.rpc.lane_frame import (
    HEADER_SIZE,
    AckReader,
    LaneRefusedError,
    pack_ack,
    pack_batch,
    pack_end,
    pack_hello,
)
from common.rpc.page_batch import serialize
from destination import migration as arrival_module
from destination import readback
from destination.handover import COMMITTED, PREPARING, READY, REVOKED, RUNNING, STARTING
from destination.service import MigrationServicer

UUID = "6f2c9e0a-0000-4000-8000-000000000001"
SESSION = "5e551075"
CONTEXT = cast("grpc.ServicerContext", SimpleNamespace(auth_context=dict))
STRANGER = cast("grpc.ServicerContext", SimpleNamespace(auth_context=lambda: {"x509_common_name": [b"other"]}))
INCARNATION = 4
CONFIG = bytes(range(256))
CLOCK = ProgramSpec("clock", "clock0", {"period_us": 1000})
SPEC = MachineSpec("vm", UUID, 64 << 20, (), 0.4, ViommuSpec(), (), (CLOCK,))
PAGES = SPEC.ram_size // PAGE_SIZE
PRECOPY = pb.DEVICE_STATE_KIND_PRECOPY_DATA
LOADED = pb.DEVICE_STATE_KIND_INIT_DATA_SENT
DATA = pb.DEVICE_STATE_KIND_STOP_COPY_DATA
END = pb.DEVICE_STATE_KIND_END
RESTART = pb.DEVICE_STATE_KIND_RESTART


class FakeMachine:
    """Takes notes of all that it is told, in order; `refuses` is what it does not do."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes: list[Any] = []
        self.refuses: set[str] = set()
        self.failure = ""
        self.asked_gaps: list[int] = []
        self.memory = GuestRam.create(SPEC.ram_size)

    def __getattr__(self, name: str) -> Callable[..., None]:
        def take_note(*args: Any, **named: Any) -> None:
            if name in self.refuses:
                raise RequestError("EIO", f"cannot {name}")
            self.notes.append((name, *args, *named.values()))

        return take_note

    def another(self) -> FakeMachine:
        return self

    def close(self) -> None:
        pass

    def state_changes(self, after: int | None) -> tuple[int, list[tuple[str, str]]]:
        if after is None:
            return 0, []
        raise ClosedError

    def ram(self, *, writable: bool) -> GuestRam:
        assert writable
        return GuestRam.attach(os.dup(self.memory.fd))  # whoever asks for it closes it

    def devices(self) -> list[DeviceInfo]:
        return [
            DeviceInfo("nic0", "nic", 7, "RESUMING", comparable_dump=True, bar_sizes=(4096, *[0] * 5)),
            DeviceInfo("nvme0", "nvme", 1, "RESUMING", comparable_dump=False),
        ]

    def guest_gap_us(self, run: int) -> int | None:
        self.asked_gaps.append(run)
        return 4321 if len(self.asked_gaps) > 2 else None

    def record(self, ownership: Ownership, **named: Any) -> None:
        if ownership is Ownership.COMMITTED and self.failure:
            raise RequestError("EINVAL", f"the machine has failed: {self.failure}")
        self.notes.append(("record", ownership, *named.values()))

    def digests(self, _most: int | None = None) -> dict[str, Digest]:
        return {name: Digest(len(name), (1,), 0, compared=name == "nic0") for name in ("nic0", "nvme0")}

    def did(self, *names: str) -> list[Any]:
        """Return the notes of these names."""
        return [note for note in self.notes if note[0] in names]


class FakeVerifier:
    """A verifier that finds what it is told to find."""

    mismatches: list[pb.ChunkMismatch] = []  # noqa: RUF012  # replaced by tests
    made: list[FakeVerifier] = []  # noqa: RUF012  # replaced by the fixture

    def __init__(self, *_: object, early: bool) -> None:
        self.early = early
        self.calls: list[str] = []
        FakeVerifier.made.append(self)

    def wait_until_ready(self) -> None:
        pass

    def read_all(self) -> None:
        self.calls.append("read_all")

    def complete(self) -> None:
        self.calls.append("complete")

    def compare(self, theirs: bytes, *, pages: bool) -> list[pb.ChunkMismatch]:
        self.calls.append(f"compare {pages}")
        if len(theirs) != 32 * 8:
            raise ValueError(f"{len(theirs)} bytes of digests for 32 chunks")
        return self.mismatches

    def close(self) -> None:
        self.calls.append("close")


class Rig:
    """A destination without processes, driven as a source drives it."""

    def __init__(self, directory: Path) -> None:
        self.host = Host("destination", directory)
        self.servicer = MigrationServicer(self.host)
        self.machine = FakeMachine(directory / "run")
        self.launches = 0
        self.refuse_launch = False
        self.lane_kind: pb.LaneKind.ValueType = pb.LANE_KIND_GRPC
        self.connections: dict[int, socket.socket] = {}

    def launch(self, spec: MachineSpec, *_: object, incarnation: int, incoming: bool) -> FakeMachine:
        assert spec == SPEC and incoming
        if self.refuse_launch:
            raise OSError("the machine did not start: no memory")
        self.launches += 1
        return self.machine

    def prepare(
        self, *, waited: bool = True, caller: grpc.ServicerContext | None = None, **changes: Any
    ) -> pb.PrepareResponse:
        members: dict[str, Any] = {
            "session_id": SESSION,
            "protocol_version": 1,
            "machine_uuid": UUID,
            "incarnation": INCARNATION,
            "machine_json": to_json(SPEC),
            "lanes": 2,
            "verify": pb.VERIFY_MODE_OFF,
            "lane_kind": self.lane_kind,
        }
        context = caller or self.context(active=waited)
        self.answer = self.servicer.Prepare(pb.PrepareRequest(**members | changes), context)
        return self.answer

    def context(self, *, active: bool = True, **metadata: str) -> grpc.ServicerContext:
        given = {"session_id": SESSION, **metadata}
        pairs = tuple((key.replace("_", "-"), value) for key, value in given.items())
        return cast(
            "grpc.ServicerContext",
            SimpleNamespace(
                invocation_metadata=lambda: pairs,
                is_active=lambda: active,
                cancel=lambda: None,
                auth_context=dict,
            ),
        )

    def pages(self, *batches: PageBatch | bytes, lane: str = "0", session_id: str = SESSION) -> list[int]:
        """Send batches, or messages as they are, on a lane of the kind that was prepared; return the acks."""
        if self.lane_kind == pb.LANE_KIND_TCP:
            return self.tcp_pages(*batches, lane=int(lane))
        messages = (item if isinstance(item, bytes) else serialize(item) for item in batches)
        context = self.context(lane=lane, session_id=session_id)
        return [answer.applied_sequence for answer in self.servicer.SendPages(messages, context)]

    def tcp_pages(self, *batches: PageBatch | bytes, lane: int) -> list[int]:
        """The same on a connection, which is ended in good order after the last ack."""
        if lane not in self.connections:
            token = self.answer.lane_tokens[lane]
            connection = socket.create_connection(("127.0.0.1", self.answer.lane_port), 10)
            self.connections[lane] = connection
            connection.sendall(pack_hello(token))
            assert connection.recv(8) == pack_ack(0)
        connection, reader, acks = self.connections[lane], AckReader(), []
        for item in batches:
            with suppress(ConnectionError):  # it may have been refused already
                connection.sendall(item if isinstance(item, bytes) else b"".join(pack_batch(item)))
        if any(isinstance(item, bytes) for item in batches):
            connection.shutdown(socket.SHUT_WR)
        while len(acks) < len(batches):
            data = connection.recv(4096)
            if not data:
                raise ConnectionError("the lane was closed without a word")
            try:
                acks += reader.feed(data)
            except LaneRefusedError as refusal:
                raise RefusalError(grpc.StatusCode.ABORTED, refusal.reason, str(refusal)) from refusal
        return acks

    def records(self, *requests: pb.SendDeviceStateRequest, device: str = "nic0") -> list[pb.SendDeviceStateResponse]:
        return list(self.servicer.SendDeviceState(iter(requests), self.context(device=device)))

    def mappings(self, *requests: pb.SendMappingsRequest) -> list[int]:
        answers = self.servicer.SendMappings(iter(requests), self.context())
        return [answer.applied_sequence for answer in answers]

    def finish(self, **changes: Any) -> pb.FinishResponse:
        members: dict[str, Any] = {
            "session_id": SESSION,
            "vcpu_json": '{"clock": 1, "runs": 2}',
            "devices": [
                pb.DeviceConfig(name="nic0", record_sequence=1, config_space=CONFIG, pending_vectors=[2]),
                pb.DeviceConfig(name="nvme0", record_sequence=2, config_space=CONFIG, pending_doorbells=[0]),
            ],
            "lane_sequences": [1, 0],
            "mapping_sequence": 0,
        }
        return self.servicer.Finish(pb.FinishRequest(**members | changes), CONTEXT)

    def all_has_come(self, **changes: Any) -> None:
        """Prepare, and send one batch and both devices."""
        self.prepare(**changes)
        assert self.pages(batch(1)) == [1]
        self.records(device_record(1, END))
        self.records(device_record(1, DATA, b"xy"), device_record(2, DATA, b"z", last=True), device="nvme0")

    def ready(self, **changes: Any) -> None:
        self.all_has_come(**changes)
        self.finish()
        assert self.state() == READY

    def state(self) -> int:
        return self.servicer.GetSession(pb.GetSessionRequest(session_id=SESSION), CONTEXT).state

    def commit(self, incarnation: int = INCARNATION, session_id: str = SESSION) -> pb.CommitResponse:
        return self.servicer.Commit(pb.CommitRequest(session_id=session_id, incarnation=incarnation), CONTEXT)

    def resolve(self, session_id: str = SESSION) -> int:
        request = pb.ResolveRequest(session_id=session_id)
        return self.servicer.Resolve(request, CONTEXT).state

    def abort(self, session_id: str = SESSION) -> None:
        self.servicer.Abort(pb.AbortRequest(session_id=session_id, reason="told to"), CONTEXT)

    def settled(self) -> None:
        """Wait for what follows a start."""
        arrival = self.servicer._arrival
        assert arrival is not None
        arrival._pool.shutdown(wait=True)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(tmp_path)
    monkeypatch.setattr(arrival_module, "launch", made.launch)
    monkeypatch.setattr(readback, "Verifier", FakeVerifier)
    monkeypatch.setattr(FakeVerifier, "made", [])
    yield made
    made.servicer.close()
    for connection in made.connections.values():
        connection.close()
    made.host.close()
    for thread in threading.enumerate():
        if thread.name.startswith("lane"):  # the one that has ended the session ends after it
            thread.join(10)
            assert not thread.is_alive()
    made.machine.memory.close()


@pytest.fixture(params=[pb.LANE_KIND_GRPC, pb.LANE_KIND_TCP], ids=["grpc", "tcp"])
def lanes(rig: Rig, request: pytest.FixtureRequest) -> Rig:
    """A destination that is asked for page lanes of one kind, and of the other."""
    rig.lane_kind = request.param
    return rig


def batch(sequence: int, first: int = 3, pages: int = 2, fill: int = 7) -> PageBatch:
    numbers = np.array([first], np.uint64), np.array([pages], np.uint64)
    zero = bytes((pages + 7) // 8)
    payload = [bytes([fill]) * PAGE_SIZE * pages]
    return PageBatch(sequence, 0, Encoding.RAW, *numbers, zero, payload)


def device_record(sequence: int, kind: int, data: bytes = b"", *, last: bool = False) -> pb.SendDeviceStateRequest:
    return pb.SendDeviceStateRequest(sequence=sequence, kind=pb.DeviceStateKind.ValueType(kind), data=data, last=last)


def refused(call: Callable[[], object]) -> str:
    """Return the reason and the text of a refusal."""
    with pytest.raises(RefusalError) as refusal:
        call()
    return f"{refusal.value.reason}: {refusal.value}"


# setup


def test_prepare_builds_a_machine_that_waits(rig: Rig) -> None:
    answer = rig.prepare(data_first=[0, 100], data_pages=[10, 1])
    assert [(d.name, d.migration_flags, d.comparable_dump, list(d.bar_sizes)) for d in answer.devices] == [
        ("nic0", 7, True, [4096, 0, 0, 0, 0, 0]),
        ("nvme0", 1, False, [0] * 6),
    ]
    assert answer.protocol_version == 1 and rig.state() == PREPARING and rig.host.migrating
    assert rig.machine.notes == [("begin", SESSION), ("enter_resuming",)]
    assert rig.machine.memory.allocated_bytes == 11 * PAGE_SIZE


def test_a_source_that_has_not_waited_for_prepare_leaves_nothing_behind(rig: Rig) -> None:
    rig.prepare(waited=False)
    assert rig.state() == REVOKED and not rig.host.migrating
    assert rig.machine.did("shutdown")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol_version": 2}, "PROTOCOL_VERSION: the source speaks protocol 2 to 2, this destination 1 to 1"),
        ({"protocol_version": 0}, "PROTOCOL_VERSION"),
        ({"session_id": ""}, "BAD_REQUEST: the session's name"),
        ({"session_id": "../evil"}, "BAD_REQUEST: the session's name"),
        ({"session_id": "a" * 65}, "BAD_REQUEST: the session's name"),
        ({"machine_json": "{"}, "BAD_REQUEST: machine description"),
        ({"machine_json": "{}"}, "BAD_REQUEST: machine description"),
        ({"machine_uuid": UUID[:-1] + "2"}, "BAD_REQUEST: machine description and request name different machines"),
        ({"data_first": [0]}, "BAD_REQUEST: runs of data: as many"),
        ({"data_first": [PAGES], "data_pages": [1]}, f"BAD_REQUEST: runs of data: 1 pages from {PAGES}"),
        ({"data_first": [PAGES - 1], "data_pages": [2]}, "BAD_REQUEST: runs of data: 2 pages"),
        ({"data_first": [0], "data_pages": [0]}, "BAD_REQUEST: runs of data: 0 pages"),
        ({"data_first": [1 << 63], "data_pages": [1 << 63]}, "BAD_REQUEST: runs of data"),
        ({"data_first": [10, 5], "data_pages": [1, 1]}, "BAD_REQUEST: runs of data: 1 pages from 5"),
        ({"data_first": [0, 1], "data_pages": [2, 1]}, "BAD_REQUEST: runs of data: 1 pages from 1"),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_leaves_nothing(rig: Rig, changes: dict[str, Any], said: str) -> None:
    assert refused(lambda: rig.prepare(**changes)).startswith(said)
    assert rig.launches == 0 and not rig.host.migrating
    rig.prepare(session_id="another")


def test_a_machine_that_cannot_be_built_leaves_nothing(rig: Rig) -> None:
    rig.refuse_launch = True
    assert refused(rig.prepare) == "CANNOT_BUILD: the machine did not start: no memory"
    rig.refuse_launch = False
    assert not rig.host.migrating and rig.state() == REVOKED
    rig.prepare(session_id="another")


def test_a_machine_that_does_not_fit_is_refused_before_it_is_built(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(SPEC, ram_size=240 << 30)
    monkeypatch.setattr("builtins.open", lambda _: FakeMeminfo())
    request = {"machine_json": to_json(spec), "data_first": [0], "data_pages": [1 << 20]}
    said = refused(lambda: rig.prepare(**request))
    monkeypatch.undo()
    assert said == "NOT_ENOUGH_MEMORY: the machine holds 4096 MiB in RAM, this host has 1000 MiB free"
    assert rig.launches == 0 and not rig.host.migrating


class FakeMeminfo:
    def __enter__(self) -> Iterable[str]:
        return ["MemTotal: 9999999 kB", f"MemAvailable: {1000 << 10} kB"]

    def __exit__(self, *_: object) -> None:
        pass


def test_a_host_with_a_machine_takes_no_other(rig: Rig) -> None:
    rig.host.adopt(cast("MachineClient", rig.machine))
    assert refused(rig.prepare).startswith("HAS_MACHINE")
    assert not rig.host.migrating


def test_a_host_without_such_a_device_does_not_begin(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SimpleNamespace(kind=kind, attachment=None) for kind in ("nic", "nvme", "accelerator")]
    monkeypatch.setattr(arrival_module, "describe", lambda _: SimpleNamespace(devices=devices))
    rig.host.device_kinds = frozenset({"nic"})
    assert refused(rig.prepare) == "NO_SUCH_DEVICE: this host has no device of kind accelerator, nvme"
    assert rig.launches == 0 and not rig.host.migrating


@pytest.mark.parametrize(("incarnation", "accepted"), [(3, False), (4, False), (5, True)])
def test_an_old_incarnation_does_not_come_back(rig: Rig, incarnation: int, accepted: bool) -> None:
    record.write(rig.host.record_path, Record(UUID, "vm", 4, Ownership.GONE, "/d", "old", "b:1"))
    if accepted:
        rig.prepare(incarnation=incarnation)
    else:
        assert refused(lambda: rig.prepare(incarnation=incarnation)).startswith("OLD_INCARNATION")


def test_one_machine_arrives_at_a_time(rig: Rig) -> None:
    rig.prepare()
    assert refused(lambda: rig.prepare(session_id="another")).startswith("MIGRATION_RUNS")
    assert rig.state() == PREPARING


# precopy


def test_pages_are_in_ram_when_they_are_acknowledged(lanes: Rig) -> None:
    lanes.prepare()
    assert lanes.pages(batch(1, fill=7), batch(2, 5, fill=9)) == [1, 2]
    assert lanes.pages(batch(1, CHUNK_PAGES + 1, fill=1), lane="1") == [1]
    firsts = lanes.machine.memory.bytes.reshape(-1, PAGE_SIZE)[:, 0]
    assert firsts[:8].tolist() == [0, 0, 0, 7, 7, 9, 9, 0]
    assert firsts[CHUNK_PAGES:][:4].tolist() == [0, 1, 1, 0]


def test_batches_that_others_follow_at_once_have_their_ack(rig: Rig) -> None:
    rig.prepare()
    first, second, third = (batch(number, number, 1) for number in (1, 2, 3))
    first.more = second.more = True
    assert rig.pages(first, second, third) == [3]


def test_a_lane_has_chunks_of_its_own(lanes: Rig) -> None:
    lanes.prepare()
    assert refused(lambda: lanes.pages(batch(1, CHUNK_PAGES))).endswith("a batch has pages of another lane")


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([batch(1), batch(3)], "BAD_REQUEST: lane 0: batch 3 after 1"),
        ([batch(2)], "BAD_REQUEST: lane 0: batch 2 after 0"),
        ([batch(1), batch(1)], "BAD_REQUEST: lane 0: batch 1 after 1"),
        ([batch(1, PAGES - 1)], "BAD_REQUEST: lane 0, batch 1: "),
        ([dataclasses.replace(batch(1), encoding=9)], "BAD_REQUEST: lane 0, batch 1: a batch has the unknown encoding"),
        ([dataclasses.replace(batch(1), zero=b"\x10")], "BAD_REQUEST: lane 0, batch 1: "),
        ([dataclasses.replace(batch(1), payload=[b"x" * 4095])], "BAD_REQUEST: lane 0, batch 1: "),
        ([dataclasses.replace(batch(1), payload=[b"x"], encoding=Encoding.LZ4)], "BAD_REQUEST: lane 0, batch 1: "),
    ],
)
def test_batches_that_are_not_in_order_are_refused(lanes: Rig, batches: list[PageBatch], said: str) -> None:
    lanes.prepare()
    assert refused(lambda: lanes.pages(*batches)).startswith(said)
    assert lanes.state() == REVOKED and lanes.machine.memory.pages[5:].max() == 0


@pytest.mark.parametrize(
    ("lane", "messages", "said"),
    [
        ("2", [serialize(batch(1))], "BAD_REQUEST: lane 2 was not announced"),
        ("-1", [serialize(batch(1))], "BAD_REQUEST: no lane number: '-1'"),
        ("", [serialize(batch(1))], "BAD_REQUEST: no lane number: ''"),
        ("0", [b"\xff\xff\xff"], "BAD_REQUEST: page batch: "),
        ("1", [serialize(batch(1))[:-1]], "BAD_REQUEST: "),
    ],
)
def test_messages_that_are_no_batches_are_refused(rig: Rig, lane: str, messages: list[bytes], said: str) -> None:
    rig.prepare()
    assert refused(lambda: rig.pages(*messages, lane=lane)).startswith(said)


TORN = b"".join(pack_batch(batch(1)))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (TORN[:-1], "CANNOT_LOAD: the connection was closed"),
        (TORN[: -PAGE_SIZE - 1], "CANNOT_LOAD: the connection was closed"),
        (TORN[:50], "CANNOT_LOAD: the connection was closed"),
        (TORN[:7], "CANNOT_LOAD: the connection was closed"),
        (b"", "CANNOT_LOAD: the connection was closed"),
        (b"\xff" * HEADER_SIZE, "BAD_REQUEST: a batch has 4294967295 runs, more than 65536"),
    ],
)
def test_a_lane_that_breaks_off_or_asks_for_too_much_ends_the_session(rig: Rig, sent: bytes, said: str) -> None:
    rig.lane_kind = pb.LANE_KIND_TCP
    rig.prepare()
    assert refused(lambda: rig.pages(sent)) == said
    assert rig.state() == REVOKED and not rig.host.migrating


def test_a_lane_may_end_in_good_order(rig: Rig) -> None:
    rig.lane_kind = pb.LANE_KIND_TCP
    rig.prepare()
    assert rig.pages(batch(1)) == [1]
    rig.connections[0].sendall(pack_end())
    assert rig.connections[0].recv(1) == b""
    assert rig.state() == PREPARING
    assert rig.pages(batch(1, 700), lane="1") == [1]


def test_a_revoked_session_tells_its_lanes_why(rig: Rig) -> None:
    rig.lane_kind = pb.LANE_KIND_TCP
    rig.prepare()
    rig.pages(batch(1))
    rig.abort()
    assert refused(lambda: rig.pages(batch(2))) == "CANNOT_LOAD: told to"


def test_a_bad_stream_ends_the_session_and_the_machine(lanes: Rig) -> None:
    lanes.prepare()
    refused(lambda: lanes.pages(batch(2)))
    assert lanes.state() == REVOKED and lanes.machine.did("shutdown") and not lanes.host.migrating
    assert not lanes.machine.memory.bytes[: 8 * PAGE_SIZE].any()


def test_a_stream_after_the_end_is_told_why(rig: Rig) -> None:
    rig.prepare()
    refused(lambda: rig.pages(batch(2)))
    assert refused(lambda: rig.pages(batch(1))) == "WRONG_STATE: the session is REVOKED: lane 0: batch 2 after 0"


def test_a_port_that_cannot_be_had_is_told(rig: Rig) -> None:
    rig.lane_kind = pb.LANE_KIND_TCP
    with socket.create_server(("127.0.0.1", 0)) as taken:
        rig.servicer._lane_listen = taken.getsockname()
        assert refused(rig.prepare).startswith("CANNOT_LISTEN: page lanes: port")
    assert rig.state() == REVOKED and not rig.host.migrating


def test_a_source_that_is_gone_ends_the_session(rig: Rig) -> None:
    rig.prepare()
    stream = rig.servicer.SendPages(iter([serialize(batch(1))]), rig.context(active=False, lane="0"))
    assert [answer.applied_sequence for answer in stream] == [1]
    assert rig.state() == REVOKED


def test_streams_belong_to_a_session(rig: Rig) -> None:
    rig.prepare()
    assert refused(lambda: rig.pages(batch(1), session_id="another")).startswith("NO_SESSION")
    nobody = cast("grpc.ServicerContext", SimpleNamespace(invocation_metadata=lambda: ()))
    assert "'session-id' is missing" in refused(lambda: list(rig.servicer.SendMappings(iter([]), nobody)))
    assert "'device' is missing" in refused(lambda: list(rig.servicer.SendDeviceState(iter([]), rig.context())))
    assert rig.state() == PREPARING


def test_records_reach_their_device(rig: Rig) -> None:
    rig.prepare()
    answers = rig.records(
        device_record(1, PRECOPY, b"ab"), device_record(2, LOADED), device_record(3, DATA, b"c"), device_record(4, END)
    )
    assert [answer.applied_sequence for answer in answers] == [1, 2, 3, 4]
    assert [answer.initial_data_loaded for answer in answers] == [False, True, True, True]
    assert rig.machine.did("write_device") == [("write_device", "nic0", b"ab"), ("write_device", "nic0", b"c")]


def test_a_restart_makes_what_came_before_it_void(rig: Rig) -> None:
    rig.prepare()
    answers = rig.records(
        device_record(1, PRECOPY, b"ab"),
        device_record(2, LOADED),
        device_record(3, RESTART),
        device_record(4, PRECOPY, b"cd"),
        device_record(5, LOADED),
    )
    assert [answer.initial_data_loaded for answer in answers] == [False, True, False, False, True]
    assert rig.machine.did("write_device", "restart_device") == [
        ("write_device", "nic0", b"ab"),
        ("restart_device", "nic0"),
        ("write_device", "nic0", b"cd"),
    ]


def test_a_device_without_precopy_acknowledges_no_initial_data(rig: Rig) -> None:
    rig.prepare()
    assert [a.initial_data_loaded for a in rig.records(device_record(1, LOADED), device="nvme0")] == [False]


@pytest.mark.parametrize(
    ("device", "records", "said"),
    [
        ("nobody", [device_record(1, END)], "there is no device nobody"),
        ("nic0", [device_record(2, END)], "nic0: record 2 after 0"),
        ("nic0", [device_record(1, LOADED), device_record(1, LOADED)], "nic0: record 1 after 1"),
        ("nic0", [device_record(1, END), device_record(2, DATA, b"x")], "nic0: a record after the end"),
        ("nic0", [device_record(1, END), device_record(2, END)], "nic0: a record after the end"),
        ("nic0", [device_record(1, 0)], "nic0: unknown record kind 0"),
        ("nic0", [device_record(1, 99)], "nic0: unknown record kind 99"),
        ("nic0", [device_record(1, DATA)], "nic0: a record of kind DEVICE_STATE_KIND_STOP_COPY_DATA with 0 bytes"),
        ("nic0", [device_record(1, END, b"x")], "nic0: a record of kind DEVICE_STATE_KIND_END with 1 bytes"),
        ("nic0", [device_record(1, RESTART, b"x")], "nic0: a record of kind DEVICE_STATE_KIND_RESTART with 1 bytes"),
        ("nic0", [device_record(1, END), device_record(2, RESTART)], "nic0: a record after the end"),
        (
            "nic0",
            [device_record(1, DATA, b"", last=True)],
            "nic0: a record of kind DEVICE_STATE_KIND_STOP_COPY_DATA with 0 bytes",
        ),
        (
            "nic0",
            [device_record(1, PRECOPY, b"x", last=True)],
            "nic0: a record of kind DEVICE_STATE_KIND_PRECOPY_DATA cannot be the last",
        ),
        ("nic0", [device_record(1, END, last=True)], "nic0: a record of kind DEVICE_STATE_KIND_END cannot be the last"),
    ],
)
def test_records_that_are_not_in_order_are_refused(
    rig: Rig, device: str, records: list[pb.SendDeviceStateRequest], said: str
) -> None:
    rig.prepare()
    assert refused(lambda: rig.records(*records, device=device)) == f"BAD_REQUEST: {said}"
    assert rig.state() == REVOKED and not rig.machine.did("write_device")


def test_nothing_comes_behind_the_last_data(rig: Rig) -> None:
    rig.prepare()
    rig.records(device_record(1, DATA, b"x", last=True))
    assert refused(lambda: rig.records(device_record(2, END))) == "BAD_REQUEST: nic0: a record after the end"
    assert rig.machine.did("write_device") == [("write_device", "nic0", b"x")]


def test_a_device_that_does_not_take_its_data_ends_the_session(rig: Rig) -> None:
    rig.prepare()
    rig.machine.refuses = {"write_device"}
    assert refused(lambda: rig.records(device_record(1, DATA, b"x"))) == "CANNOT_LOAD: cannot write_device"
    assert rig.state() == REVOKED
    # The source may hear of it from another stream first.
    assert refused(lambda: rig.pages(batch(1))) == "CANNOT_LOAD: the session is REVOKED: cannot write_device"


def test_mappings_arrive_in_order(rig: Rig) -> None:
    rig.prepare()
    where = pb.MappingRange(container="default", iova=0x1000, size=0x2000)
    added = pb.Mapping(range=where, gpa=0x5000, readable=True)
    assert rig.mappings(
        pb.SendMappingsRequest(sequence=1, added=[added]), pb.SendMappingsRequest(sequence=2, removed=[where])
    ) == [1, 2]
    assert rig.machine.did("change_mappings") == [
        ("change_mappings", Changes((), (MappingChange("default", 0x1000, 0x2000, 0x5000, True, False),))),
        ("change_mappings", Changes((MappingChange("default", 0x1000, 0x2000),), ())),
    ]
    assert refused(lambda: rig.mappings(pb.SendMappingsRequest(sequence=2))) == (
        "BAD_REQUEST: mappings: batch 2 after 2"
    )


# after a loss of the network


RECONNECTS: dict[str, Any] = {"features": [versions.RECONNECT], "reconnect_s": 30.0}


def reconnect(rig: Rig, generation: int = 1) -> pb.ReconnectResponse:
    request = pb.ReconnectRequest(session_id=SESSION, generation=generation)
    answer = rig.servicer.Reconnect(request, CONTEXT)
    if rig.lane_kind == pb.LANE_KIND_TCP:
        rig.answer = pb.PrepareResponse(lane_port=answer.lane_port, lane_tokens=answer.lane_tokens)
        for connection in rig.connections.values():
            connection.close()
        rig.connections.clear()
    return answer


def again(rig: Rig, *batches: PageBatch) -> list[int]:
    """Send batches on lane 0 in generation 1; return the acks."""
    if rig.lane_kind == pb.LANE_KIND_TCP:
        return rig.pages(*batches)
    messages = (serialize(item) for item in batches)
    stream = rig.servicer.SendPages(messages, rig.context(lane="0", generation="1"))
    return [ack.applied_sequence for ack in stream]


def lose(rig: Rig, *messages: bytes, **metadata: str) -> None:
    """Send batches on a lane whose source is gone then."""
    list(rig.servicer.SendPages(iter(messages), rig.context(active=False, lane="0", **metadata)))


def fills(rig: Rig, first: int, end: int) -> list[int]:
    found: list[int] = rig.machine.memory.bytes.reshape(-1, PAGE_SIZE)[first:end, 0].tolist()
    return found


def test_a_destination_may_wait_less_than_it_is_asked_to(rig: Rig) -> None:
    rig.servicer._max_reconnect_s = 12.0
    assert rig.prepare(**RECONNECTS).reconnect_s == 12.0
    rig.abort()
    assert rig.prepare(session_id="another", **RECONNECTS | {"reconnect_s": 3.0}).reconnect_s == 3.0


def _stranger(**metadata: str) -> grpc.ServicerContext:
    pairs = tuple({"session-id": SESSION, **metadata}.items())
    given = SimpleNamespace(**vars(STRANGER), invocation_metadata=lambda: pairs, is_active=lambda: True)
    return cast("grpc.ServicerContext", given)


CALLS: dict[str, Callable[[MigrationServicer], object]] = {
    "Reconnect": lambda servicer: servicer.Reconnect(pb.ReconnectRequest(session_id=SESSION, generation=1), STRANGER),
    "Finish": lambda servicer: servicer.Finish(pb.FinishRequest(session_id=SESSION), STRANGER),
    "Verify": lambda servicer: servicer.Verify(pb.VerifyRequest(session_id=SESSION), STRANGER),
    "Commit": lambda servicer: servicer.Commit(pb.CommitRequest(session_id=SESSION), STRANGER),
    "SendPages": lambda servicer: list(servicer.SendPages(iter([b""]), _stranger(lane="0"))),
    "SendDeviceState": lambda servicer: list(servicer.SendDeviceState(iter([]), _stranger(device="nic0"))),
    "SendMappings": lambda servicer: list(servicer.SendMappings(iter([]), _stranger())),
    "Resolve": lambda servicer: servicer.Resolve(pb.ResolveRequest(session_id=SESSION), STRANGER),
    "Abort": lambda servicer: servicer.Abort(pb.AbortRequest(session_id=SESSION), STRANGER),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_session_is_of_the_certificate_that_has_begun_it(rig: Rig, call: str) -> None:
    rig.ready(**RECONNECTS)
    assert refused(lambda: CALLS[call](rig.servicer)) == "NOT_ALLOWED: other has not begun this session"
    assert rig.state() == READY
    assert rig.commit().state == RUNNING


def test_who_has_lost_his_name_learns_all_the_same_what_was_decided(rig: Rig) -> None:
    """A certificate that was made anew, with other names, must not leave its host undecided."""
    rig.ready()
    rig.commit()
    rig.settled()
    assert rig.servicer.Resolve(pb.ResolveRequest(session_id=SESSION), STRANGER).state == RUNNING


def test_what_never_came_is_not_kept_from_coming(rig: Rig) -> None:
    assert rig.servicer.Resolve(pb.ResolveRequest(session_id=SESSION), STRANGER).state == REVOKED
    rig.prepare()
    assert rig.state() == PREPARING


@pytest.mark.parametrize("changes", [{}, {"reconnect_s": 30.0}, {"features": [versions.RECONNECT]}])
def test_a_session_that_was_not_prepared_for_it_does_not_survive_a_stream(rig: Rig, changes: dict[str, Any]) -> None:
    rig.prepare(**changes)
    assert refused(lambda: reconnect(rig)).startswith("BAD_REQUEST: the session was not prepared for this")
    lose(rig, serialize(batch(1)))
    assert rig.state() == REVOKED


@pytest.mark.parametrize("seconds", [-1.0, 3601.0, float("nan"), float("inf")])
def test_a_session_is_not_kept_for_any_time(rig: Rig, seconds: float) -> None:
    assert refused(lambda: rig.prepare(features=[versions.RECONNECT], reconnect_s=seconds)).startswith("BAD_REQUEST")
    assert rig.launches == 0


def test_streams_go_on_behind_what_was_applied(lanes: Rig) -> None:
    lanes.prepare(**RECONNECTS)
    assert list(lanes.answer.features) == [versions.RECONNECT]
    lanes.pages(batch(1, fill=7), batch(2, 5, fill=9))
    lanes.records(device_record(1, PRECOPY, b"a"), device_record(2, LOADED))
    lanes.mappings(pb.SendMappingsRequest(sequence=1))
    answer = reconnect(lanes)
    assert [ack.applied_sequence for ack in answer.lanes] == [2, 0]
    assert {name: (ack.applied_sequence, ack.initial_data_loaded) for name, ack in answer.devices.items()} == {
        "nic0": (2, True),
        "nvme0": (0, False),
    }
    assert answer.mappings.applied_sequence == 1
    assert again(lanes, batch(3, fill=11)) == [3]
    assert fills(lanes, 3, 7) == [11, 11, 9, 9] and lanes.state() == PREPARING


def test_a_stream_of_an_old_generation_is_refused_and_changes_nothing(rig: Rig) -> None:
    rig.prepare(**RECONNECTS)
    reconnect(rig, 3)
    assert refused(lambda: rig.pages(batch(1))).startswith("OLD_GENERATION")
    assert refused(lambda: rig.records(device_record(1, END))).startswith("OLD_GENERATION")
    assert refused(lambda: rig.mappings(pb.SendMappingsRequest(sequence=1))).startswith("OLD_GENERATION")
    assert refused(lambda: reconnect(rig, 3)).startswith("OLD_GENERATION")
    assert "no generation number" in refused(lambda: lose(rig, generation="0x3"))
    assert rig.state() == PREPARING and not rig.machine.memory.bytes.any()


def test_a_token_of_an_old_generation_opens_nothing(rig: Rig) -> None:
    rig.lane_kind = pb.LANE_KIND_TCP
    rig.prepare(**RECONNECTS)
    old = rig.answer
    reconnect(rig)
    new, rig.answer = rig.answer, old
    with pytest.raises((ConnectionError, AssertionError)):
        rig.pages(batch(1))
    rig.connections.pop(0).close()
    rig.answer = new
    assert rig.pages(batch(1)) == [1] and rig.state() == PREPARING


def test_a_batch_that_was_held_back_is_applied_before_anything_newer_or_never(
    lanes: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stale one was taken, and is about to be written, when its source is back."""
    lanes.prepare(**RECONNECTS)
    arrival = lanes.servicer._arrival
    assert arrival is not None and arrival._lanes.applier is not None
    kind = type(arrival._lanes.applier)
    held, may_go_on, apply = threading.Event(), threading.Event(), kind.apply

    def hold(self: Any, item: PageBatch, receive: Any = None) -> Any:
        if not held.is_set():
            held.set()
            assert may_go_on.wait(10)
        return apply(self, item, receive)

    monkeypatch.setattr(kind, "apply", hold)

    def send() -> None:
        with suppress(OSError, RefusalError):  # a TCP lane is closed to it
            lanes.pages(batch(1, fill=7))

    stale = threading.Thread(target=send, daemon=True)
    stale.start()
    assert held.wait(10)
    answers: list[pb.ReconnectResponse] = []
    back = threading.Thread(target=lambda: answers.append(reconnect(lanes)), daemon=True)
    back.start()
    back.join(0.1)
    assert not answers  # nobody is told where to go on as long as that may still be written
    may_go_on.set()
    back.join(10)
    stale.join(10)
    (answer,) = answers
    applied = answer.lanes[0].applied_sequence
    assert again(lanes, batch(applied + 1, fill=9)) == [applied + 1]
    assert fills(lanes, 3, 5) == [9, 9]


def test_a_session_waits_for_its_source_for_so_long_only(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival_module, "NOTICE_SECONDS", 0.0)
    rig.prepare(features=[versions.RECONNECT], reconnect_s=0.01)
    lose(rig, serialize(batch(1)))
    assert rig.state() == PREPARING
    for _ in range(1000):
        if rig.state() == REVOKED and not rig.host.migrating:
            break
        threading.Event().wait(0.01)
    assert rig.state() == REVOKED and not rig.host.migrating


def test_a_stream_that_is_refused_ends_the_session_all_the_same(rig: Rig) -> None:
    rig.prepare(**RECONNECTS)
    refused(lambda: rig.pages(batch(2)))
    assert rig.state() == REVOKED
    assert refused(lambda: reconnect(rig)).startswith("WRONG_STATE")


def test_a_session_that_waits_makes_way_for_the_next_of_its_machine(rig: Rig) -> None:
    rig.prepare(**RECONNECTS)
    lose(rig, serialize(batch(1)))
    other = UUID[:-1] + "2"
    spec = dataclasses.replace(SPEC, uuid=other)
    strange: dict[str, Any] = {"session_id": "strange", "machine_uuid": other, "machine_json": to_json(spec)}
    assert refused(lambda: rig.prepare(**strange)).startswith("MIGRATION_RUNS")
    assert rig.state() == PREPARING
    assert refused(lambda: rig.prepare(session_id="another", caller=STRANGER)).startswith("MIGRATION_RUNS")
    assert rig.state() == PREPARING
    rig.prepare(session_id="other", **RECONNECTS)
    assert rig.state() == REVOKED and rig.launches == 2


def test_a_session_whose_streams_were_lost_before_they_came_makes_way_too(rig: Rig) -> None:
    rig.prepare(**RECONNECTS)
    assert refused(lambda: rig.prepare(session_id="another", caller=STRANGER)).startswith("MIGRATION_RUNS")
    rig.prepare(session_id="other", **RECONNECTS)
    assert rig.state() == REVOKED and rig.launches == 2
    # But not one whose streams are open.
    messages = iter([serialize(batch(1)), serialize(batch(2))])
    acks = iter(rig.servicer.SendPages(messages, rig.context(lane="0", session_id="other")))
    next(acks)
    assert refused(lambda: rig.prepare(session_id="another")).startswith("MIGRATION_RUNS")
    assert [ack.applied_sequence for ack in acks] == [2]


def test_what_was_finished_is_answered_again(rig: Rig) -> None:
    rig.all_has_come(**RECONNECTS)
    first = rig.finish()
    assert [ack.applied_sequence for ack in reconnect(rig).lanes] == [1, 0]
    assert rig.finish() == first and rig.state() == READY and len(rig.machine.did("load")) == 1
    assert refused(lambda: rig.finish(paused=True)).startswith("WRONG_STATE")


# switchover


def test_finish_loads_what_is_left(lanes: Rig) -> None:
    rig = lanes
    rig.all_has_come()
    rig.finish(paused=True)
    ((_, vcpu, configs, *_rest),) = rig.machine.did("load")
    assert vcpu == {"clock": 1, "runs": 2}
    assert configs == [DeviceConfig("nic0", CONFIG, Pending((2,))), DeviceConfig("nvme0", CONFIG, Pending((), (0,)))]
    assert rig.state() == READY
    assert refused(rig.finish) == "WRONG_STATE: the session is READY"
    assert refused(lambda: rig.pages(batch(2))) == "WRONG_STATE: the session is READY"


def devices_with(**changes: Any) -> list[pb.DeviceConfig]:
    members = {"record_sequence": 1, "config_space": CONFIG, **changes}
    return [pb.DeviceConfig(name=name, **members) for name in ("nic0", "nvme0")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lane_sequences": [2, 0]}, "not all page batches have arrived"),
        ({"lane_sequences": [1]}, "not all page batches have arrived"),
        ({"lane_sequences": [0, 0]}, "not all page batches have arrived"),
        ({"mapping_sequence": 1}, "not all mapping changes have arrived"),
        ({"devices": []}, "the devices are not those that were prepared"),
        ({"devices": [pb.DeviceConfig(name="nic0", record_sequence=1)]}, "the devices are not those"),
        ({"vcpu_json": "{"}, "vCPU state: "),
        ({"vcpu_json": "{}"}, "vCPU state: "),
        ({"vcpu_json": "[1]"}, "vCPU state: "),
        ({"vcpu_json": '{"runs": null}'}, "vCPU state: "),
        ({"vcpu_json": '{"runs": 1e999}'}, "vCPU state: "),
        ({"vcpu_json": "[" * 100_000}, "vCPU state: "),
        ({"vcpu_json": '{"runs": 1}' + " " * (1 << 20)}, "vCPU state: "),
        ({"lane_sequences": [1, 0] * 1000}, "not all page batches have arrived"),
        ({"devices": [pb.DeviceConfig(name=name) for name in ("nic0", "nvme0", "nic0")]}, "the devices are not those"),
        ({"devices": devices_with(config_space=b"abc")}, "nic0: a configuration space of 3 bytes"),
        ({"devices": devices_with(pending_vectors=range(2049))}, "nic0: more than 2048 pending"),
        (
            {
                "devices": [
                    pb.DeviceConfig(name=name, record_sequence=1, config_space=CONFIG) for name in ("nic0", "nvme0")
                ]
            },
            "nvme0: its state has not arrived whole",
        ),
    ],
)
def test_nothing_is_loaded_before_all_has_come(lanes: Rig, changes: dict[str, Any], said: str) -> None:
    rig = lanes
    rig.all_has_come()
    assert refused(lambda: rig.finish(**changes)).startswith(f"BAD_REQUEST: {said}")
    assert rig.state() == PREPARING and not rig.machine.did("load")
    rig.finish()


def test_a_device_without_its_last_record_is_not_whole(rig: Rig) -> None:
    rig.prepare()
    rig.pages(batch(1))
    rig.records(device_record(1, END))
    rig.records(device_record(1, DATA, b"x"), device_record(2, DATA, b"y"), device="nvme0")
    assert refused(rig.finish) == "BAD_REQUEST: nvme0: its state has not arrived whole"


def test_a_state_that_no_device_accepts_is_not_committed(rig: Rig) -> None:
    rig.all_has_come()
    rig.machine.refuses = {"load"}
    assert refused(rig.finish) == "CANNOT_LOAD: cannot load"
    # Asked again, a device that was reset meanwhile would seem to have taken it.
    rig.machine.refuses = set()
    assert rig.state() == REVOKED and refused(rig.finish).startswith("CANNOT_LOAD: the session is REVOKED")
    assert refused(rig.commit).startswith("NOT_READY")


# verification


def verify(rig: Rig, *devices: pb.DeviceDigest, digests: bytes = bytes(32 * 8)) -> pb.VerifyResponse:
    request = pb.VerifyRequest(session_id=SESSION, chunk_digests=digests, devices=devices)
    return rig.servicer.Verify(request, CONTEXT)


def test_what_was_not_read_is_not_verified(rig: Rig) -> None:
    rig.ready()
    assert refused(lambda: verify(rig)).startswith("NOT_READ")


def test_all_of_ram_is_compared_and_what_both_sides_could_read_of_devices(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    differing = [pb.ChunkMismatch(chunk=3, page_digests=b"x")]
    monkeypatch.setattr(FakeVerifier, "mismatches", differing)
    rig.ready(verify=pb.VERIFY_MODE_STRICT)
    answer = verify(
        rig,
        pb.DeviceDigest(name="nic0", config=4, bars=[2], compared=True),
        pb.DeviceDigest(name="nvme0", config=99, compared=True),  # has only its config space to read here
        pb.DeviceDigest(name="nobody", compared=True),
    )
    assert answer.chunks == 32 and list(answer.mismatches) == differing
    assert list(answer.compared_devices) == ["nic0"]
    assert [(d.name, d.what) for d in answer.devices] == [("nic0", "BARs"), ("nvme0", "config space")]
    assert refused(lambda: verify(rig, digests=b"123")) == "BAD_REQUEST: 3 bytes of digests for 32 chunks"
    (verifier,) = FakeVerifier.made
    assert not verifier.early and verifier.calls == ["read_all", "compare True", "compare True"]


def test_what_is_compared_later_was_read_before_the_start(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.ready(verify=pb.VERIFY_MODE_DEFERRED)
    rig.commit()
    rig.settled()
    monkeypatch.setattr(rig.machine, "digests", None)  # nobody reads a device that runs
    answer = verify(rig, pb.DeviceDigest(name="nic0", config=4, bars=[1], compared=True))
    assert list(answer.compared_devices) == ["nic0"] and not answer.devices
    (verifier,) = FakeVerifier.made
    # No pages: the machine has changed them since. And RAM is let go once nobody compares it any more.
    assert verifier.early and verifier.calls == ["complete", "compare False", "close"]
    assert refused(lambda: verify(rig)).startswith("NOT_READ")


def test_what_was_read_for_a_verdict_is_let_go_if_nobody_asks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival_module, "WATCH_SECONDS", 0.01)
    others = threading.enumerate()
    rig.ready(verify=pb.VERIFY_MODE_DEFERRED)
    rig.commit()
    rig.settled()
    (watch,) = (thread for thread in threading.enumerate() if thread.name == "watch" and thread not in others)
    monkeypatch.setattr(arrival_module, "VERDICT_SECONDS", 0.0)
    monkeypatch.setattr(arrival_module, "VERDICT_SECONDS_PER_GIB", 0.0)
    watch.join(10)
    (verifier,) = FakeVerifier.made
    assert not watch.is_alive() and verifier.calls == ["complete", "close"]
    assert refused(lambda: verify(rig)).startswith("NOT_READ") and rig.state() == RUNNING


def test_a_strict_verdict_is_of_a_machine_that_stands_still(rig: Rig) -> None:
    rig.ready(verify=pb.VERIFY_MODE_STRICT)
    rig.machine.refuses = {"take_over"}
    refused(rig.commit)
    assert refused(lambda: verify(rig)) == "WRONG_STATE: the session is STARTING"


def test_nothing_is_compared_once_its_machine_has_settled(rig: Rig) -> None:
    """RAM is the machine's alone then."""
    rig.ready(verify=pb.VERIFY_MODE_STRICT)
    rig.commit()
    rig.settled()
    assert refused(lambda: verify(rig)) == "WRONG_STATE: the session is RUNNING"
    (verifier,) = FakeVerifier.made
    assert verifier.calls == ["read_all", "close"]


# versions


def test_a_source_of_before_there_were_ranges_and_features(rig: Rig) -> None:
    """It names one version and nothing else, and is answered in fields that it knows."""
    answer = rig.prepare()
    assert (answer.protocol_version, list(answer.features)) == (1, [])


def test_the_highest_version_and_the_features_that_both_have(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "HIGHEST", 3)
    monkeypatch.setattr(versions, "FEATURES", frozenset({"b", "c", "d"}))
    answer = rig.prepare(protocol_version=1, highest_protocol_version=4, features=["d", "a", "b"])
    assert (answer.protocol_version, list(answer.features)) == (3, ["b", "d"])


# handover


def test_a_machine_that_is_not_what_it_was_is_halted(rig: Rig) -> None:
    def halt(session_id: str = SESSION, context: grpc.ServicerContext = CONTEXT) -> None:
        rig.servicer.Halt(pb.HaltRequest(session_id=session_id, reason="memory differs"), context)

    rig.ready(verify=pb.VERIFY_MODE_DEFERRED)
    assert refused(halt).startswith("NO_SESSION")
    rig.commit()
    rig.settled()
    record.write(
        rig.host.record_path, Record(UUID, "vm", INCARNATION, Ownership.OWNER, "/d", SESSION)
    )  # as a machine does that is told to
    assert refused(lambda: halt("another")).startswith("NO_SESSION")
    assert refused(lambda: halt(context=STRANGER)).startswith("NOT_ALLOWED")
    halt()
    arrival, rig.servicer._arrival = rig.servicer._arrival, None  # as after a new start
    assert refused(lambda: halt(context=STRANGER)).startswith("NOT_ALLOWED")
    halt()
    assert rig.machine.did("pause") == [("pause",)] * 2
    rig.servicer._arrival = arrival  # which ends it


def test_a_decision_is_on_disk_before_anyone_acts_on_it(rig: Rig) -> None:
    rig.ready()
    answer = rig.commit()
    rig.settled()
    assert answer.state == RUNNING
    handed_over = rig.machine.did("record", "load", "take_over", "resume")
    assert [note[:2] if note[0] == "record" else note[0] for note in handed_over] == [
        "load",
        ("record", Ownership.COMMITTED),
        ("record", Ownership.STARTING),
        "take_over",
        ("record", Ownership.OWNER),
    ]
    assert handed_over[1][2:] == (SESSION, INCARNATION)
    assert cast("FakeMachine", rig.host.require_machine()) is rig.machine and not rig.host.migrating
    session = rig.servicer.GetSession(pb.GetSessionRequest(session_id=SESSION), CONTEXT)
    assert (session.state, session.guest_gap_us, session.machine_uuid) == (RUNNING, 4321, UUID)
    assert rig.machine.asked_gaps == [3] * 3  # of the run that began here, until there is one
    assert rig.host.decision(SESSION) == DECIDED_COMMITTED


def test_commit_may_come_again(rig: Rig) -> None:
    rig.ready()
    assert [rig.commit().state for _ in range(3)] == [RUNNING] * 3
    assert len(rig.machine.did("take_over")) == 1
    assert len([note for note in rig.machine.did("record") if note[1] is Ownership.COMMITTED]) == 1


@pytest.mark.parametrize("incarnation", [0, INCARNATION - 1, INCARNATION + 1])
def test_commit_names_the_incarnation(rig: Rig, incarnation: int) -> None:
    rig.ready()
    assert refused(lambda: rig.commit(incarnation)).startswith("WRONG_INCARNATION")
    assert rig.state() == READY and not rig.machine.did("record", "take_over")


def test_commit_before_all_is_loaded_is_refused(rig: Rig) -> None:
    rig.all_has_come()
    assert refused(rig.commit) == "NOT_READY: commit is not possible in PREPARING"
    assert refused(lambda: rig.commit(session_id="another")).startswith("NO_SESSION")


def test_a_machine_that_has_failed_is_not_committed(rig: Rig) -> None:
    """It still runs at its source."""
    rig.ready()
    rig.machine.failure = "nic0 has ended"
    assert refused(rig.commit) == "NOT_READY: the machine has failed: nic0 has ended"
    assert rig.state() == READY and not rig.machine.did("record", "take_over")
    assert rig.resolve() == REVOKED


def test_a_machine_that_is_ours_and_does_not_start_is_said_to(rig: Rig) -> None:
    """From STARTING on nobody knows what its devices have done, so nothing starts it again, here or there."""
    rig.ready()
    rig.machine.refuses = {"take_over"}
    assert refused(rig.commit) == "NOT_STARTED: cannot take_over"
    session = rig.servicer.GetSession(pb.GetSessionRequest(session_id=SESSION), CONTEXT)
    assert (session.state, session.failure) == (STARTING, "cannot take_over")
    assert [note[1] for note in rig.machine.did("record")] == [Ownership.COMMITTED, Ownership.STARTING]
    assert rig.resolve() == STARTING and not rig.machine.did("shutdown")
    rig.machine.refuses = set()
    assert rig.commit().state == STARTING and not rig.machine.did("take_over")
    assert refused(rig.abort).startswith("COMMITTED")


def test_a_machine_that_is_lost_unstarted_is_given_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends between COMMITTED and STARTING: the source is told, and goes on; the next machine may come."""
    rig.ready()
    record_ = rig.machine.record

    def dies(ownership: Ownership, **named: Any) -> None:
        if ownership is Ownership.STARTING:
            monkeypatch.setattr(rig.machine, "has_ended", lambda: True, raising=False)
            raise ClosedError
        record_(ownership, **named)
        known = Record(UUID, "vm", INCARNATION, ownership, str(rig.machine.directory), SESSION)
        record.write(rig.host.record_path, known)

    monkeypatch.setattr(rig.machine, "record", dies, raising=False)
    assert refused(rig.commit).startswith("NOT_STARTED")
    assert rig.state() == REVOKED and rig.resolve() == REVOKED
    assert refused(rig.commit).startswith("NOT_READY")
    assert (rig.host.record(), rig.host.machine, rig.host.migrating) == (None, None, False)
    assert rig.host.decision(SESSION) == DECIDED_REVOKED


def test_a_start_that_was_not_begun_is_begun_by_the_next_commit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.ready()
    fail = [True]

    def adopt(_: object) -> None:
        if fail:
            fail.pop()
            raise OSError("not now")

    monkeypatch.setattr(rig.host, "adopt", adopt)
    assert refused(rig.commit) == "NOT_STARTED: not now"
    assert rig.state() == COMMITTED
    assert rig.commit().state == RUNNING
    assert len([note for note in rig.machine.did("record") if note[1] is Ownership.COMMITTED]) == 1


def test_commit_after_revoked_is_refused(rig: Rig) -> None:
    rig.ready()
    rig.abort()
    assert refused(rig.commit) == "NOT_READY: commit is not possible in REVOKED"
    assert not rig.machine.did("record", "take_over") and rig.host.machine is None


def test_abort_ends_what_is_not_committed(rig: Rig) -> None:
    rig.ready()
    rig.abort("another")
    assert rig.state() == READY
    rig.abort()
    rig.abort()
    assert rig.state() == REVOKED and not rig.host.migrating
    assert len(rig.machine.did("shutdown")) == 1
    assert rig.host.decision(SESSION) == DECIDED_REVOKED


def test_abort_after_commit_is_refused(rig: Rig) -> None:
    rig.ready()
    rig.commit()
    rig.settled()
    assert refused(rig.abort) == "COMMITTED: revoke is not possible in RUNNING"
    assert rig.state() == RUNNING and not rig.machine.did("shutdown")


@pytest.mark.parametrize("loaded", [False, True])
def test_resolve_revokes_what_is_not_committed_and_says_so_for_ever(rig: Rig, loaded: bool) -> None:
    (rig.ready if loaded else rig.prepare)()
    assert rig.resolve() == REVOKED
    assert rig.host.decision(SESSION) == DECIDED_REVOKED and rig.machine.did("shutdown")
    assert rig.resolve() == REVOKED
    refused(rig.commit)


def test_resolve_after_commit_is_the_same_answer_every_time(rig: Rig) -> None:
    rig.ready()
    rig.commit()
    rig.settled()
    assert rig.resolve() in (COMMITTED, STARTING, RUNNING)
    assert rig.resolve() in (COMMITTED, STARTING, RUNNING)
    assert not rig.machine.did("shutdown")


def test_a_destination_that_was_started_anew_says_so(rig: Rig) -> None:
    rig.prepare(**RECONNECTS)
    arrival, rig.servicer._arrival = rig.servicer._arrival, None
    lost = refused(lambda: reconnect(rig))
    assert lost.startswith("NO_SESSION: the destination was started anew: what had come is gone")
    unknown = refused(lambda: rig.commit(session_id="another"))
    assert unknown == "NO_SESSION: no such session is known here"
    rig.servicer._arrival = arrival


def test_resolve_of_a_session_that_nobody_remembers_revokes_it(rig: Rig) -> None:
    """Its COMMIT may still be on the way."""
    rig.host.decide(SESSION, OPEN)
    assert rig.resolve() == REVOKED
    assert rig.host.decision(SESSION) == DECIDED_REVOKED
    assert refused(rig.prepare).startswith("SESSION_ENDED")
    rig.prepare(session_id="another")


@pytest.mark.parametrize("ownership", [Ownership.COMMITTED, Ownership.STARTING, Ownership.OWNER, Ownership.OFF])
def test_resolve_after_a_restart_finds_the_record(rig: Rig, ownership: Ownership) -> None:
    record.write(rig.host.record_path, Record(UUID, "vm", INCARNATION, ownership, "/d", SESSION))
    assert rig.resolve() in (COMMITTED, STARTING, RUNNING)
    lost = "" if ownership is Ownership.OFF else "its process has ended"
    session = rig.servicer.GetSession(pb.GetSessionRequest(session_id=SESSION), CONTEXT)
    assert (session.state, session.failure) == (RUNNING, lost)
    assert rig.resolve("another") == REVOKED


@pytest.mark.parametrize("session_id", ["", "../../evil", "/etc/x", "a\0b", "ä", "a" * 65])
def test_resolve_writes_nothing_for_a_name_that_is_none(rig: Rig, session_id: str) -> None:
    assert refused(lambda: rig.resolve(session_id)).startswith("BAD_REQUEST")


def test_looking_changes_nothing(rig: Rig) -> None:
    assert rig.state() == 0 and rig.host.decision(SESSION) is None
    rig.ready()
    assert rig.state() == READY


@pytest.mark.parametrize("loaded", [False, True])
def test_a_daemon_that_ends_revokes_what_is_not_committed(rig: Rig, loaded: bool) -> None:
    (rig.ready if loaded else rig.prepare)()
    rig.servicer.close()
    assert rig.state() == REVOKED and rig.host.decision(SESSION) == DECIDED_REVOKED


def test_a_daemon_that_ends_leaves_a_machine_that_runs(rig: Rig) -> None:
    rig.ready()
    rig.commit()
    rig.settled()
    rig.servicer.close()
    assert rig.state() == RUNNING and not rig.machine.did("shutdown")


def test_the_description_is_what_the_source_sent() -> None:
    """The spec of these tests is a real one."""
    assert json.loads(to_json(SPEC))["uuid"] == UUID
