"""A TCP page lane whose destination is the test: what it sends, which acks it believes, and how it ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from common.memory import runs
from common.memory.pages import PageBatch
from common.rpc.errors import PeerError
from common.rpc.lane_frame import (
    HEADER_SIZE,
    HELLO_SIZE,
    pack_ack,
    pack_batch,
    pack_end,
    pack_hello,
    pack_refusal,
    parse_header,
)
from source import tcp_lane
from source.limiter import Limiter
from source.tcp_lane import MAX_UNACKED, LanePort, TcpLane

SECONDS = 10.0
TOKEN = bytes(range(32))


def send(lane: TcpLane, one: PageBatch) -> int:
    """Send a batch; return its size."""
    sizes: list[int] = []
    lane.send_all(iter([one]), lambda _, size: sizes.append(size))
    (size,) = sizes
    return size


def batch(pages: int = 1) -> PageBatch:
    covered = np.array([0], np.uint64), np.array([pages], np.uint64)
    return PageBatch(0, 0, 1, *covered, bytes((pages + 7) // 8), (memoryview(bytearray(4096 * pages)),))


SIZE = sum(map(len, pack_batch(batch())))


class Destination:
    """The other end of one lane."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = LanePort("127.0.0.1", self._listener.getsockname()[1], None)
        self.applied: list[tuple[int, int]] = []

    def note(self, pages: runs.Runs, size: int) -> None:
        self.applied.append((runs.total(pages), size))

    def open(self, welcome: bytes = pack_ack(0), applied: int = 0) -> TcpLane:
        thread = threading.Thread(target=self._welcome, args=(welcome,))
        thread.start()
        try:
            self.lane = TcpLane(self.port, TOKEN, applied, Limiter(None), self.note)
        finally:
            thread.join()
        return self.lane

    def _welcome(self, welcome: bytes) -> None:
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(SECONDS)
        assert self.take(HELLO_SIZE) == pack_hello(TOKEN)
        self.connection.sendall(welcome)
        if not welcome:
            self.connection.close()

    def take(self, size: int) -> bytes:
        return self.connection.recv(size, socket.MSG_WAITALL)

    def say(self, data: bytes) -> None:
        self.connection.sendall(data)

    def close(self) -> None:
        self._listener.close()
        if hasattr(self, "connection"):
            self.connection.close()
        if hasattr(self, "lane"):
            self.lane.close(abort=True)


@pytest.fixture
def destination() -> Iterator[Destination]:
    made = Destination()
    yield made
    made.close()


def send_on(lane: TcpLane) -> None:
    """Send more than any buffer takes."""
    for _ in range(1000):
        send(lane, batch(64))


class Background:
    """A call in a thread of its own, and what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.failure: Exception | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:  # noqa: BLE001  # what it was is what the test looks at
            self.failure = error

    def waits(self) -> bool:
        self._thread.join(0.05)
        return self._thread.is_alive()

    def ended(self) -> bool:
        self._thread.join(SECONDS)
        return not self._thread.is_alive()


def test_batches_are_numbered_and_drained_when_they_are_applied(destination: Destination) -> None:
    lane = destination.open()
    assert send(lane, batch()) == send(lane, batch()) == SIZE
    for sequence in (1, 2):
        header = parse_header(destination.take(SIZE)[:HEADER_SIZE])
        assert header is not None and header.sequence == sequence
    draining = Background(lane.drain)
    destination.say(pack_ack(1))
    assert draining.waits()
    destination.say(pack_ack(2))
    assert draining.ended() and draining.failure is None
    assert sum(pages for pages, _ in destination.applied) == 2
    assert sum(size for _, size in destination.applied) == 2 * SIZE
    lane.close(abort=False)
    assert destination.take(HEADER_SIZE + 1) == pack_end()


def test_an_ack_may_stand_for_several_and_come_in_pieces(destination: Destination) -> None:
    lane = destination.open()
    for _ in range(3):
        send(lane, batch(2))
    data = pack_ack(1) + pack_ack(3)
    destination.say(data[:11])
    draining = Background(lane.drain)
    assert draining.waits()
    destination.say(data[11:])
    assert draining.ended() and draining.failure is None
    assert sum(pages for pages, _ in destination.applied) == 6


def test_only_so_many_batches_are_on_their_way(destination: Destination) -> None:
    lane = destination.open()
    sending = Background(lambda: [send(lane, batch()) for _ in range(MAX_UNACKED + 1)])
    assert sending.waits() and lane.sequence == MAX_UNACKED
    destination.say(pack_ack(1))
    assert Background(lambda: destination.take(SIZE * (MAX_UNACKED + 1))).ended()


def test_a_lane_goes_on_behind_what_was_applied_before(destination: Destination) -> None:
    lane = destination.open(applied=7)
    lane.drain()
    send(lane, batch())
    header = parse_header(destination.take(SIZE)[:HEADER_SIZE])
    assert header is not None and header.sequence == lane.sequence == 8
    destination.say(pack_ack(8))
    lane.drain()


def test_what_was_applied_and_not_acknowledged_counts_once_it_is_known(destination: Destination) -> None:
    lane = destination.open()
    for _ in range(3):
        send(lane, batch())
    destination.say(pack_ack(1))
    destination.connection.close()
    with pytest.raises(PeerError):
        lane.drain()
    for wrong in (0, 4):
        with pytest.raises(ConnectionError, match=f"goes on behind batch {wrong} of 3"):
            lane.settle(wrong)
    assert lane.settle(2) == 1
    assert lane.settle(2) == 1
    assert destination.applied == [(1, SIZE), (1, SIZE)]


@pytest.mark.parametrize("sequence", [2, 1 << 63])
def test_an_ack_of_what_was_never_sent_is_refused(destination: Destination, sequence: int) -> None:
    lane = destination.open()
    send(lane, batch())
    destination.say(pack_ack(sequence))
    for call in (lane.drain, lane.drain, lambda: send(lane, batch())):
        with pytest.raises(ConnectionError, match=f"acknowledges {sequence}, never sent"):
            call()
    assert destination.applied == []


def test_an_ack_does_not_go_back(destination: Destination) -> None:
    lane = destination.open()
    for _ in range(3):
        send(lane, batch())
    destination.say(pack_ack(2) + pack_ack(1))
    with pytest.raises(ConnectionError, match="acknowledges 1"):
        lane.drain()


@pytest.mark.parametrize("closes", [False, True])
def test_the_destinations_last_word_is_told(destination: Destination, closes: bool) -> None:
    lane = destination.open()
    send(lane, batch())
    destination.say(pack_refusal("BAD_REQUEST", "no such pages"))
    if closes:
        destination.connection.close()
    with pytest.raises(PeerError, match="no such pages") as failed:
        send_on(lane)
    assert failed.value.reason == "BAD_REQUEST"


def test_a_destination_that_is_gone(destination: Destination) -> None:
    lane = destination.open()
    send(lane, batch())
    destination.connection.close()
    for _ in range(2):
        with pytest.raises(PeerError, match="a page lane has ended") as failed:
            lane.drain()
        assert failed.value.reason == "UNREACHABLE"
    lane.close(abort=False)


@pytest.mark.parametrize("welcome", [b"", pack_ack(7)])
def test_a_lane_that_is_not_welcome(destination: Destination, welcome: bytes) -> None:
    with pytest.raises(PeerError, match=f"no page lane to port {destination.port.port}: "):
        destination.open(welcome)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(PeerError, match="refused"):
        TcpLane(LanePort("127.0.0.1", port, None), TOKEN, 0, Limiter(None), lambda *_: None)


def test_one_who_never_answers(destination: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_lane, "BEGIN_SECONDS", 0.1)
    with pytest.raises(PeerError, match=r"too long|timed out"):
        TcpLane(destination.port, TOKEN, 0, Limiter(None), lambda *_: None)


def test_who_waits_is_interrupted(destination: Destination) -> None:
    lane = destination.open()
    send(lane, batch())
    draining = Background(lane.drain)
    assert draining.waits()
    lane.interrupt(KeyError("cancelled"))
    lane.interrupt(ValueError("later"))
    assert draining.ended() and isinstance(draining.failure, KeyError)
    for call in (lane.drain, lambda: send(lane, batch())):
        with pytest.raises(KeyError):
            call()


def test_who_sends_to_one_who_does_not_read_is_interrupted(destination: Destination) -> None:
    lane = destination.open()
    sending = Background(lambda: [send(lane, batch(8192)) for _ in range(MAX_UNACKED + 1)])
    assert sending.waits()
    lane.interrupt(KeyError("cancelled"))
    assert sending.ended() and isinstance(sending.failure, KeyError)
