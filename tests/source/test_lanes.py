"""Rounds across connections: what comes again is what was not acknowledged, as it is in RAM then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import numpy as np
import pytest
from switchover.v1 import host_pb2
from switchover.v1 import migration_pb2 as pb

from common.memory import runs
from common.memory.compression import MAX_UNIT_PAGES
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE
from common.memory.pages import Applier, PageBatch
from common.memory.ram import GuestRam
from common.rpc.errors import PeerError
from common.rpc.page_batch import parse, serialize
from source import reconnect
from source.lanes import OnApplied, OnSent, PageLanes, Unacked
from source.packer import Packer
from source.reconnect import Connection, Link

CHUNKS = 24
PAGES = CHUNKS * CHUNK_PAGES
ALL = runs.one(0, PAGES)
LOST = PeerError("UNREACHABLE", "reset", grpc.StatusCode.UNAVAILABLE)


class Lane:
    """A lane whose destination is in the test: it applies at once, and acknowledges late."""

    def __init__(self, network: Network, number: int, connection: Connection, on_applied: OnApplied) -> None:
        self._network = network
        self._number = number
        self._generation = connection.generation
        self._unacked = Unacked(on_applied)
        network.open.append(self)
        self.sequence = connection.begins.lanes[number].applied_sequence
        self.failure: Exception | None = None

    def send_all(self, batches: Iterator[PageBatch], sent: OnSent) -> None:
        for batch in batches:
            if self.failure is not None:
                raise self.failure
            self.sequence = batch.sequence = self.sequence + 1
            message = serialize(batch)
            self._unacked.add(batch, len(message))
            self._network.carry(self._number, self._generation, parse(message))
            if self.sequence > self._network.unacked:
                self._unacked.applied(self.sequence - self._network.unacked)
            sent(batch, len(message))

    def drain(self) -> None:
        if self.failure is not None:
            raise self.failure
        self._unacked.applied(self.sequence)

    def settle(self, sequence: int) -> int:
        return self._unacked.settle(sequence, self.sequence)

    def interrupt(self, failure: Exception) -> None:
        self.failure = self.failure or failure

    def close(self, *, abort: bool) -> None:
        pass


class Network:
    """Carries batches to the destination's RAM, until it breaks; `on_break` is what happens meanwhile."""

    def __init__(self, target: GuestRam, lanes: int, *, breaks: tuple[int, ...], lost: int, unacked: int) -> None:
        self.unacked = unacked
        self.carried: list[PageBatch] = []
        self.on_break: Callable[[], None] = lambda: None
        self._breaks = list(breaks)
        self._lost = lost  # of the batches before a break so many never arrive
        self._applier = Applier(target)
        self._lanes = lanes
        self._on_the_way: list[list[PageBatch]] = [[] for _ in range(lanes)]
        self.applied = [0] * lanes
        self.open: list[Lane] = []
        self._generation = 0
        self._lock = threading.Lock()
        self.Reconnect = self
        self.link = Link(cast("Any", self), "5e55", lambda _: None, self._lose)
        self.link.open(pb.ReconnectResponse(lanes=[pb.SendPagesResponse()] * lanes), 30.0)

    def _lose(self, failure: Exception) -> None:
        for lane in self.open:
            lane.interrupt(failure)

    def carry(self, lane: int, generation: int, batch: PageBatch) -> None:
        with self._lock:
            if generation != self._generation:
                raise LOST
            self.carried.append(batch)
            self._on_the_way[lane].append(batch)
            if self._breaks and len(self.carried) >= self._breaks[0]:
                self._breaks.pop(0)
                raise LOST
            while len(self._on_the_way[lane]) > self._lost:
                self._arrive(lane)

    def _arrive(self, lane: int) -> None:
        batch = self._on_the_way[lane].pop(0)
        self._applier.apply(batch)
        self.applied[lane] = batch.sequence

    def arrive(self) -> None:
        """Let all that is on the way arrive."""
        for lane in range(self._lanes):
            while self._on_the_way[lane]:
                self._arrive(lane)

    def future(self, request: pb.ReconnectRequest, **_: Any) -> Any:
        with self._lock:
            self._generation = request.generation
            self.on_break()
            for waiting in self._on_the_way:
                waiting.clear()
            answer = pb.ReconnectResponse(
                lanes=[pb.SendPagesResponse(applied_sequence=sequence) for sequence in self.applied]
            )

        class Answered:
            def result(self) -> pb.ReconnectResponse:
                return answer

            def cancel(self) -> None:
                pass

        return Answered()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnect, "RETRY_SECONDS", 0.0)


@pytest.fixture
def source() -> Iterator[GuestRam]:
    """Three quarters of it words that compress, with zero pages among them; the rest holes."""
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as ram:
        filled = PAGES * 3 // 4
        ram.words[:filled] = np.random.default_rng(1).integers(1, 50, 512, np.uint64)
        ram.words[:filled, 0] = np.arange(1, filled + 1)
        ram.words[:filled:7] = 0
        yield ram


@pytest.fixture
def target() -> Iterator[GuestRam]:
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as ram:
        yield ram


def open_lanes(
    network: Network, source: GuestRam, lanes: int, compression: host_pb2.Compression.ValueType
) -> PageLanes:
    return PageLanes(
        lanes,
        network.link,
        lambda number, connection, on_applied: Lane(network, number, connection, on_applied),
        Packer(source, compression, lanes, (MAX_UNIT_PAGES, MAX_UNIT_PAGES)),
        lambda *_: None,
    )


@pytest.mark.parametrize(
    ("lanes", "breaks", "compression"),
    [
        (1, (1,), host_pb2.COMPRESSION_OFF),
        (1, (4, 5, 9), host_pb2.COMPRESSION_OFF),
        (3, (4,), host_pb2.COMPRESSION_OFF),
        (1, (4,), host_pb2.COMPRESSION_LZ4),
        (3, (4, 5, 9), host_pb2.COMPRESSION_LZ4),
    ],
)
def test_a_round_goes_on_where_it_was(
    source: GuestRam,
    target: GuestRam,
    lanes: int,
    breaks: tuple[int, ...],
    compression: host_pb2.Compression.ValueType,
) -> None:
    network = Network(target, lanes, breaks=breaks, lost=2, unacked=3)
    sender = open_lanes(network, source, lanes, compression)
    stats = sender.send(ALL, source.data_runs(), 0)
    network.arrive()
    again = sum(batch.pages for batch in network.carried) - PAGES
    sender.close(abort=False)
    assert np.array_equal(source.pages, target.pages)
    assert network.link.reconnects == len(breaks)
    assert {batch.round for batch in network.carried} == {0}
    # Of the pages before a break those come again that were on the way to it: holes are a batch of their own.
    assert 0 < again < PAGES and stats.pages - PAGES <= again


def test_pages_are_read_again_not_sent_again(source: GuestRam, target: GuestRam) -> None:
    network = Network(target, 1, breaks=(8,), lost=3, unacked=3)
    sender = open_lanes(network, source, 1, host_pb2.COMPRESSION_OFF)
    lost: list[PageBatch] = []

    def write() -> None:
        """The guest writes to what is on the way, and to what has arrived."""
        lost.extend(network.carried[4:8])
        source.words[: PAGES * 3 // 4, 7] = 77

    network.on_break = write
    sender.send(ALL, source.data_runs(), 0)
    network.arrive()
    numbers = np.concatenate([batch.numbers() for batch in lost if batch.payload])
    assert numbers.size and (target.words[numbers, 7] == 77).all()
    # The rest is for the next round: it was applied, and will be found dirty.
    assert (target.words[: PAGES // 8, 7] != 77).any()
    sender.send(ALL, source.data_runs(), 1)
    network.arrive()
    assert np.array_equal(source.pages, target.pages)
    sender.close(abort=False)


def test_what_an_earlier_round_has_carried_is_not_taken_for_this_one(source: GuestRam, target: GuestRam) -> None:
    network = Network(target, 1, breaks=(), lost=2, unacked=3)
    sender = open_lanes(network, source, 1, host_pb2.COMPRESSION_OFF)
    sender.send(ALL, source.data_runs(), 0)
    source.words[:, 7] = 78
    network._breaks = [len(network.carried) + 4]
    sender.send(ALL, source.data_runs(), 1)
    network.arrive()
    assert network.link.reconnects == 1 and np.array_equal(source.pages, target.pages)
    sender.close(abort=False)


def test_nothing_refers_to_what_a_lost_connection_has_carried(source: GuestRam, target: GuestRam) -> None:
    network = Network(target, 1, breaks=(), lost=0, unacked=1)
    sender = open_lanes(network, source, 1, host_pb2.COMPRESSION_LZ4)
    sender.send(ALL, source.data_runs(), 0)
    network._breaks = [len(network.carried) + 2]
    at = len(network.carried)
    sender.send(ALL, source.data_runs(), 1)
    before, after = network.carried[at : at + 2], network.carried[at + 2 :]
    assert any(batch.unchanged for batch in before)
    assert not any(batch.unchanged or batch.delta for batch in after)
    assert np.array_equal(source.pages, target.pages)
    sender.close(abort=False)


def test_what_is_no_loss_ends_the_round(source: GuestRam, target: GuestRam) -> None:
    network = Network(target, 2, breaks=(), lost=0, unacked=1)
    sender = open_lanes(network, source, 2, host_pb2.COMPRESSION_OFF)
    sender.interrupt(KeyError("cancelled"))
    with pytest.raises(KeyError):
        sender.send(ALL, source.data_runs(), 0)
    assert network.link.reconnects == 0
    sender.close(abort=True)
