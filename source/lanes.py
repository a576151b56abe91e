"""Page lanes: what carries batches of pages to the destination.

A 2 MiB chunk of RAM always travels on the same lane, so two versions of a page never race. Each lane encodes in a
thread of its own. There are two kinds, which differ in nothing but how bytes travel: gRPC streams
(`source.grpc_lane`) and TCP connections (`source.tcp_lane`).

When a connection is lost, its lane goes on with a round where it was: pages that were not acknowledged are read and
packed afresh, never taken from what was sent before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.memory import runs
from common.memory.pages import PageBatch, split_lanes
from common.memory.runs import Runs
from common.rpc.errors import PeerError
from source.lane_stats import LaneStats, total
from source.packer import Packer
from source.reconnect import Connection, Link

__all__ = ["OnApplied", "OnSent", "OpenLane", "PageLane", "PageLanes", "Unacked"]

OnApplied = Callable[[Runs, int], None]
"""Is told of every ack: the pages, and the bytes on the wire."""
OnSent = Callable[[PageBatch, int], None]
"""Is told of every batch that is sent, and its size."""


class PageLane(Protocol):
    """One lane. Failures are `PeerError`, ConnectionError, or what `interrupt` was given; once failed, it stays so."""

    @property
    def sequence(self) -> int:
        """Number of the last batch."""

    def send_all(self, batches: Iterator[PageBatch], sent: OnSent) -> None:
        """Number batches and send them, as soon as the bandwidth limit and the destination let it; tell of each.

        `batches` is run in whatever thread sends, and no more when this returns or raises.
        """

    def drain(self) -> None:
        """Wait until everything that was sent is in the destination's RAM."""

    def settle(self, sequence: int) -> int:
        """Note of a lane that was closed which batch was applied last; return how many pages were sent and lost.

        ConnectionError if that cannot be.
        """

    def interrupt(self, failure: Exception) -> None:
        """Let every call fail with `failure`, those that wait too; the first one counts."""

    def close(self, *, abort: bool) -> None:
        """End the lane: in good order, or at once."""


OpenLane = Callable[[int, Connection, OnApplied], PageLane]
"""Opens the lane of a number."""


# Acks of a round that are kept one by one: pages that follow each other are one run when they are put together.
_MAX_ACKED = 1 << 10


class Unacked:
    """The batches of a lane that are on their way: which pages, and bytes on the wire. Two threads may share it."""

    def __init__(self, on_applied: OnApplied) -> None:
        self._on_applied = on_applied
        self._batches: dict[int, tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], int]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: PageBatch, size: int) -> None:
        """Note a batch before it is sent."""
        self._batches[batch.sequence] = (batch.run_first, batch.run_pages, size)

    def applied(self, sequence: int) -> None:
        """Note that all batches up to this one are applied."""
        done = [number for number in list(self._batches) if number <= sequence]
        acked = [self._batches.pop(number) for number in done]
        if acked:
            first, pages, sizes = zip(*acked, strict=True)
            self._on_applied(
                (np.concatenate(first).astype(np.int64), np.concatenate(pages).astype(np.int64)), sum(sizes)
            )

    def settle(self, sequence: int, last: int) -> int:
        """Note that of all batches up to `last` those up to `sequence` are applied, and the others never will be.

        Return how many pages those have. ConnectionError if that contradicts an ack, or what was sent.
        """
        if not min(self._batches, default=last + 1) - 1 <= sequence <= last:
            raise ConnectionError(f"the destination goes on behind batch {sequence} of {last}")
        self.applied(sequence)
        return sum(int(pages.sum()) for _, pages, _ in self._batches.values())


class _Sender:
    """What sends on one lane, through all its connections."""

    def __init__(
        self,
        number: int,
        link: Link,
        open_lane: OpenLane,
        packer: Packer,
        on_applied: Callable[[int, int], None],
    ) -> None:
        self._number = number
        self._link = link
        self._open = open_lane
        self._packer = packer
        self._on_applied = on_applied
        self._acked: list[Runs] = []  # of the round that goes on; only the thread that takes acks adds to it
        self._connection = link.current
        self.sent = LaneStats()
        self.lane = open_lane(number, self._connection, self._applied)

    def _applied(self, pages: Runs, size: int) -> None:
        self._acked.append(pages)
        if len(self._acked) > _MAX_ACKED:
            self._acked[:] = [runs.union(*self._acked)]
        self._on_applied(runs.total(pages), size)

    def send(self, pages: Runs, data: Runs, number: int) -> LaneStats:
        """Send the lane's pages of a round; return when they are applied."""
        before = replace(self.sent)
        left = pages
        while True:
            try:
                lane = self.lane
                lane.send_all(self._packer.batches(self._number, left, data, number, lane.drain), self.sent.count)
                lane.drain()
            except PeerError as failure:
                self._reopen(failure)
                left = runs.subtract(pages, runs.union(*self._acked))
            else:
                self._acked.clear()
                return self.sent.since(before)

    def _reopen(self, failure: PeerError) -> None:
        """Open the lane on the next connection; raise what ends the migration."""
        while True:
            self.lane.close(abort=True)
            self._connection = self._link.restore(self._connection, failure)
            lost = self.lane.settle(self._connection.begins.lanes[self._number].applied_sequence)
            try:
                self.lane = self._open(self._number, self._connection, self._applied)
                self._link.check(self._connection)
            except PeerError as error:
                failure = error
            else:
                self._packer.forget(self._number, lost)
                return


class PageLanes:
    """All lanes of a migration; failures are those of `PageLane`, and what ends the waiting for a connection."""

    def __init__(
        self,
        count: int,
        link: Link,
        open_lane: OpenLane,
        packer: Packer,
        on_applied: Callable[[int, int], None],
    ) -> None:
        """`on_applied` is told (pages, bytes) of every ack."""
        self._senders: list[_Sender] = []
        try:
            for number in range(count):
                self._senders.append(_Sender(number, link, open_lane, packer, on_applied))
        except BaseException:
            for sender in self._senders:
                sender.lane.close(abort=True)
            raise
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="lane")

    @property
    def sent(self) -> LaneStats:
        """What has gone over all lanes so far."""
        return total([sender.sent for sender in self._senders])

    @property
    def sequences(self) -> list[int]:
        """The last batch number of each lane."""
        return [sender.lane.sequence for sender in self._senders]

    def send(self, pages: Runs, data: Runs, number: int) -> LaneStats:
        """Send pages as round `number`; return when they are in the destination's RAM.

        `data` are the runs of RAM that are not holes: no page outside them is read.
        """
        futures: list[Future[LaneStats]] = [
            self._pool.submit(sender.send, part, data, number)
            for sender, part in zip(self._senders, split_lanes(*pages, len(self._senders)), strict=True)
        ]
        return total([future.result() for future in futures])

    def interrupt(self, failure: Exception) -> None:
        """Let a `send` that runs, and every later one, fail with `failure`."""
        for sender in self._senders:
            sender.lane.interrupt(failure)

    def close(self, *, abort: bool) -> None:
        """End the lanes: in good order, or at once."""
        if abort:
            self.interrupt(ConnectionError("the migration has ended"))
        # Nobody may use a connection any more when it is closed.
        self._pool.shutdown()
        for sender in self._senders:
            sender.lane.close(abort=abort)
