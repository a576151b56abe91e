"""A device's stream around a device that says what the test has it say, to a destination that the test is."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import pytest
from switchover.v1 import migration_pb2 as pb

from common.ipc.channel import RequestError
from common.machine.client import Changes, DeviceInfo, DeviceSizes, MachineClient, MappingChange
from common.machine.device import Saved
from source import state_streams
from source.failures import explain
from source.limiter import Limiter
from source.reconnect import Link
from source.state_streams import (
    FAILED_LENGTH,
    READ_SIZE,
    DeviceStream,
    EndlessStateError,
    MappingStream,
    most_stop_copy,
)

PRECOPY, LOADED = pb.DEVICE_STATE_KIND_PRECOPY_DATA, pb.DEVICE_STATE_KIND_INIT_DATA_SENT
STOP_COPY, END = pb.DEVICE_STATE_KIND_STOP_COPY_DATA, pb.DEVICE_STATE_KIND_END
RESTART = pb.DEVICE_STATE_KIND_RESTART
SECONDS = 10.0
LINK = Link(cast("Any", None), "5e55", lambda _: None, lambda _: None)  # that is never lost


class Device:
    """The machine's end: reads take what was put in, or nothing; sizes are what is set."""

    def __init__(self) -> None:
        self.reads: queue.Queue[tuple[int, bytes] | Exception] = queue.Queue()
        self.sizes_now = DeviceSizes(1, 1 << 20, 0, 5 << 20, length_failed=False)
        self.asked: list[int] = []
        self.left = False
        self.ends = False  # says with its last data that they are

    def read_device(self, _name: str, size: int) -> Saved:
        self.asked.append(size)
        try:
            found = self.reads.get_nowait()
        except queue.Empty:
            return Saved(self.sizes_now.session, b"", ended=True)
        if isinstance(found, Exception):
            raise found
        return Saved(*found, ended=self.ends and self.reads.empty())

    def sizes(self, _name: str) -> DeviceSizes:
        return self.sizes_now

    def leave_stop_copy(self, _name: str) -> None:
        self.left = True

    def close(self) -> None:
        pass


class Destination:
    """The other end in place of gRPC's call: takes records, and acknowledges each as the test wants it to."""

    def __init__(self) -> None:
        self.records: queue.Queue[Any] = queue.Queue()
        self.loads = True
        self.answers = threading.Event()
        self.answers.set()
        self._requests: Iterator[Any] = iter(())

    def SendDeviceState(self, requests: Iterator[Any], **_: Any) -> Destination:  # noqa: N802  # as gRPC has it
        self._requests = requests
        return self

    def SendMappings(self, requests: Iterator[Any], **_: Any) -> Destination:  # noqa: N802  # as gRPC has it
        self._requests = requests
        return self

    def __iter__(self) -> Iterator[Any]:
        loaded = False
        for record in self._requests:
            if isinstance(record, pb.SendMappingsRequest):
                self.records.put(record)
                yield pb.SendMappingsResponse(applied_sequence=record.sequence)
                continue
            self.records.put((record.kind, bytes(record.data), *(("last",) if record.last else ())))
            loaded = (loaded or record.kind == LOADED) and record.kind != RESTART
            answer = pb.SendDeviceStateResponse(
                applied_sequence=record.sequence, initial_data_loaded=loaded and self.loads
            )
            self.answers.wait(SECONDS)
            yield answer

    def cancel(self) -> None:
        pass

    def take(self, count: int) -> list[Any]:
        return [self.records.get(timeout=SECONDS) for _ in range(count)]


class Channel:
    def close(self) -> None:
        pass


Opened = tuple[DeviceStream, Device, Destination]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Opened]]:
    made: list[DeviceStream] = []

    def start(flags: int = 7, *, loads_ahead: bool = True, marks_last: bool = True) -> Opened:
        device, destination = Device(), Destination()
        monkeypatch.setattr(state_streams.migration_pb2_grpc, "MigrationServiceStub", lambda _channel: destination)
        info = DeviceInfo("nic0", "nic", flags, "RUNNING", comparable_dump=True)
        machine = cast("MachineClient", device)
        made.append(
            DeviceStream(
                lambda: cast("grpc.Channel", Channel()),
                "5e55",
                LINK,
                info,
                machine,
                Limiter(None),
                loads_ahead=loads_ahead,
                marks_last=marks_last,
            )
        )
        return made[-1], device, destination

    yield start
    for stream in made:
        stream.close(abort=True)


def sizes(session: int, initial: int | None, dirty: int | None = 0, length: int | None = 0) -> DeviceSizes:
    return DeviceSizes(session, initial, dirty, length, length_failed=False)


def wait_until_loaded(stream: DeviceStream) -> None:
    stream._stream.drain()
    assert stream.initial_data_loaded


@pytest.mark.parametrize(
    ("length", "asked"),
    [(5 << 20, READ_SIZE), (READ_SIZE, READ_SIZE), (12_345, 12_345), (0, READ_SIZE), (None, READ_SIZE)],
)
def test_no_more_is_read_at_once_than_there_is(opened: Callable[..., Opened], length: int | None, asked: int) -> None:
    """QEMU: vfio_save_setup, whose buffer of no bytes fails; a device that has nothing now may have something later."""
    stream, device, _ = opened(flags=1)
    device.sizes_now = sizes(0, None, None, length)
    stream.start()
    stream.stop_copy()
    assert device.asked == [asked]


@pytest.mark.parametrize(
    ("marks_last", "sent"),
    [
        (True, [(STOP_COPY, b"almost"), (STOP_COPY, b"all", "last")]),
        (False, [(STOP_COPY, b"almost"), (STOP_COPY, b"all"), (END, b"")]),
    ],
)
def test_what_is_known_to_be_all_is_not_asked_for_more(
    opened: Callable[..., Opened], marks_last: bool, sent: list[Any]
) -> None:
    stream, device, destination = opened(flags=1, marks_last=marks_last)
    device.ends = True
    device.reads.put((1, b"almost"))
    device.reads.put((1, b"all"))
    stream.start()
    stream.stop_copy()
    assert destination.take(len(sent)) == sent
    assert destination.records.empty() and len(device.asked) == 2


def test_a_device_that_fails_to_say_its_length_is_read_with_a_whole_buffer(opened: Callable[..., Opened]) -> None:
    stream, device, _ = opened(flags=1)
    device.sizes_now = DeviceSizes(0, None, None, None, length_failed=True)
    stream.start()
    stream.stop_copy()
    assert device.asked == [READ_SIZE]


@pytest.mark.parametrize("declared", [None, 7])
def test_a_state_without_an_end_is_not_sent_for_ever(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch, declared: int | None
) -> None:
    monkeypatch.setattr(state_streams, "FAILED_LENGTH", 20)
    monkeypatch.setattr(state_streams, "UNDECLARED_LENGTH", 6)
    stream, device, destination = opened(flags=1)
    device.sizes_now = sizes(1, None, None, declared)
    stream.start()
    stream.remaining()
    for _ in range(5):
        device.reads.put((1, b"12345"))
    with pytest.raises(EndlessStateError, match="nic0: more than 20 bytes of state in STOP_COPY") as error:
        stream.stop_copy()
    assert explain(error.value, "b:1")[0] == "ENDLESS_STATE"
    assert destination.take(5) == [(STOP_COPY, b"12345")] * 5


def test_what_a_device_declares_is_an_estimate() -> None:
    assert most_stop_copy(None) == 100 << 30
    assert most_stop_copy(0) == 1 << 30
    assert most_stop_copy(4 << 30) == 9 << 30


def test_initial_data_are_said_to_be_sent_once(opened: Callable[..., Opened]) -> None:
    stream, device, destination = opened()
    stream.start()
    assert not stream.initial_data_loaded
    device.reads.put((1, b"first"))
    assert destination.take(1) == [(PRECOPY, b"first")]
    assert not stream.initial_data_loaded
    device.reads.put((1, b"last"))
    device.sizes_now = sizes(1, 0, 4096)
    assert destination.take(2) == [(PRECOPY, b"last"), (LOADED, b"")]
    wait_until_loaded(stream)
    device.reads.put((1, b"dirty"))
    device.reads.put((1, b"dirtier"))
    assert destination.take(2) == [(PRECOPY, b"dirty"), (PRECOPY, b"dirtier")]
    stream.end_precopy()
    device.reads.put((1, b"end"))
    stream.stop_copy()
    assert destination.take(2) == [(STOP_COPY, b"end"), (END, b"")]
    assert destination.records.empty() and not device.left
    stream.leave_stop_copy()
    assert device.left
    assert (stream.precopy_bytes, stream.stop_copy_bytes) == (len("firstlastdirtydirtier"), len("end"))


def test_a_device_is_read_without_a_pause_as_long_as_it_has_much(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes again may wait, in all less than a read."""
    monkeypatch.setattr(state_streams, "IDLE_SECONDS", 1000.0)
    stream, device, destination = opened()
    monkeypatch.setattr(device, "sizes", lambda _: sizes(1, 0, device.reads.qsize() * READ_SIZE, READ_SIZE))
    for data in (b"much", b"more", b"rest"):
        device.reads.put((1, data))
    stream.start()
    assert destination.take(4) == [(PRECOPY, b"much"), (LOADED, b""), (PRECOPY, b"more"), (PRECOPY, b"rest")]
    device.reads.put((1, b"again"))
    time.sleep(0.05)
    assert len(device.asked) == 3
    stream.end_precopy()


def test_a_device_that_cannot_say_has_sent_its_initial_data_when_there_is_nothing_to_read(
    opened: Callable[..., Opened],
) -> None:
    stream, device, destination = opened()
    device.sizes_now = sizes(1, None, None, None)
    device.reads.put((1, b"all"))
    stream.start()
    assert destination.take(2) == [(PRECOPY, b"all"), (LOADED, b"")]
    wait_until_loaded(stream)


def test_what_was_sent_of_a_session_that_ended_is_void_and_its_ack_does_not_count(
    opened: Callable[..., Opened],
) -> None:
    stream, device, destination = opened()
    device.reads.put((1, b"old"))
    device.sizes_now = sizes(1, 0)
    stream.start()
    assert destination.take(2) == [(PRECOPY, b"old"), (LOADED, b"")]
    wait_until_loaded(stream)
    device.sizes_now = sizes(2, 100)
    stream.remaining()
    assert not stream.initial_data_loaded
    device.reads.put((2, b"new"))
    assert destination.take(2) == [(RESTART, b""), (PRECOPY, b"new")]
    stream._stream.drain()
    assert not stream.initial_data_loaded
    device.reads.put((2, b"rest"))
    device.sizes_now = sizes(2, 0)
    assert destination.take(2) == [(PRECOPY, b"rest"), (LOADED, b"")]
    wait_until_loaded(stream)


def test_an_ack_that_is_late_does_not_count_for_the_session_after(opened: Callable[..., Opened]) -> None:
    stream, device, destination = opened()
    destination.answers.clear()
    device.reads.put((1, b""))
    device.sizes_now = sizes(1, 0)
    stream.start()
    assert destination.take(1) == [(LOADED, b"")]
    destination.loads = False
    device.reads.put((2, b"new"))
    device.sizes_now = sizes(2, 0)
    deadline = time.monotonic() + SECONDS
    while stream.sequence < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    destination.answers.set()
    assert destination.take(3) == [(RESTART, b""), (PRECOPY, b"new"), (LOADED, b"")]
    stream._stream.drain()
    assert not stream.initial_data_loaded


def test_nothing_is_void_where_nothing_was_sent(opened: Callable[..., Opened]) -> None:
    stream, device, destination = opened()
    device.sizes_now = sizes(0, None, None)
    stream.start()
    stream.end_precopy()
    device.sizes_now = sizes(1, None, None)
    device.reads.put((1, b"all of it"))
    stream.stop_copy()
    assert destination.take(2) == [(STOP_COPY, b"all of it"), (END, b"")]


def test_nobody_waits_for_who_does_not_load_ahead(opened: Callable[..., Opened]) -> None:
    stream, _, _ = opened(loads_ahead=False)
    assert stream.initial_data_loaded


def test_what_is_left_is_the_length_of_stop_copy_and_nothing_on_top(opened: Callable[..., Opened]) -> None:
    """It holds what pre-copy has not moved yet; QEMU once counted that twice (fixed in October 2024)."""
    stream, device, _ = opened()
    device.sizes_now = sizes(1, 700, 300, 5000)
    assert stream.remaining() == 5000
    assert stream.progress().stop_copy_length == 5000


def test_a_length_that_is_not_known_is_nothing_and_one_that_failed_is_too_much(opened: Callable[..., Opened]) -> None:
    stream, device, _ = opened()
    device.sizes_now = sizes(1, 700, 300, None)
    assert stream.remaining() == 0
    device.sizes_now = DeviceSizes(1, 700, 300, None, length_failed=True)
    assert stream.remaining() == FAILED_LENGTH == 100 << 30
    assert stream.progress().stop_copy_length == -1


def test_what_went_wrong_in_precopy_is_raised_where_the_story_looks(opened: Callable[..., Opened]) -> None:
    stream, device, _ = opened()
    stream.start()
    device.reads.put(RequestError("EIO", "nic0: MIG_DATA_READ: Input/output error"))
    stream._thread.join(SECONDS)
    for call in (stream.remaining, stream.end_precopy):
        with pytest.raises(RequestError, match="nic0: MIG_DATA_READ"):
            call()


def test_all_that_is_gone_is_told_before_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_streams, "BATCH", 2)
    destination = Destination()
    stream = MappingStream(cast("Any", destination), "5e55", LINK)
    changes = [MappingChange("default", n << 12, 4096, n << 13, readable=True, writable=n > 1) for n in range(3)]
    stream.send(Changes(tuple(changes), tuple(changes)))
    batches = destination.take(3)
    assert [batch.sequence for batch in batches] == [1, 2, 3] and stream.sequence == 3
    removed = [(item.container, item.iova, item.size) for batch in batches[:2] for item in batch.removed]
    assert removed == [("default", n << 12, 4096) for n in range(3)]
    assert [len(batch.added) for batch in batches] == [0, 1, 2]
    added = [item for batch in batches for item in batch.added]
    assert [(item.range.iova, item.gpa, item.readable, item.writable) for item in added] == [
        (n << 12, n << 13, True, n > 1) for n in range(3)
    ]
    assert stream.mappings == 3
    stream.close(abort=False)
