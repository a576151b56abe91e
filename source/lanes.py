"""Page lanes: what carries batches of pages to the destination.

A 2 MiB chunk of RAM always travels on the same lane, so two versions of a page never race. Each lane encodes in a
thread of its own. There are two kinds, which differ in nothing but how bytes travel: gRPC streams
(`source.grpc_lane`) and TCP connections (`source.tcp_lane`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.memory.layout import PAGE_SIZE
from common.memory.pages import PageBatch, encode, split_lanes
from common.memory.ram import GuestRam
from common.memory.runs import Runs

__all__ = ["LaneStats", "PageLane", "PageLanes", "Unacked"]


@dataclass(slots=True)
class LaneStats:
    """What was sent: pages, of those zero ones, and bytes on the wire."""

    pages: int = 0
    zero_pages: int = 0
    sent_bytes: int = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages that are not zero, before compression."""
        return (self.pages - self.zero_pages) * PAGE_SIZE


class PageLane(Protocol):
    """One lane. Failures are `PeerError`, ConnectionError, or what `interrupt` was given; once failed, it stays so."""

    @property
    def sequence(self) -> int:
        """Number of the last batch."""

    @property
    def batch_pages(self) -> int:
        """How many pages with a payload a batch should have."""

    def send(self, batch: PageBatch) -> int:
        """Number a batch and send it, as soon as the bandwidth limit and the destination let it; return its size."""

    def drain(self) -> None:
        """Wait until everything that was sent is in the destination's RAM."""

    def interrupt(self, failure: Exception) -> None:
        """Let every call fail with `failure`, those that wait too; the first one counts."""

    def close(self, *, abort: bool) -> None:
        """End the lane: in good order, or at once."""


class Unacked:
    """The batches of a lane that are on their way: which pages, and bytes on the wire. Two threads may share it."""

    def __init__(self, on_applied: Callable[[int, int], None]) -> None:
        """`on_applied` is told (pages, bytes) of every ack."""
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
        self._on_applied(sum(int(pages.sum()) for _, pages, _ in acked), sum(size for _, _, size in acked))


class PageLanes:
    """All lanes of a migration; failures are those of `PageLane`."""

    def __init__(self, ram: GuestRam, lanes: Sequence[PageLane], *, compress: bool) -> None:
        self._ram = ram
        self._compress = compress
        self._lanes = lanes
        self._pool = ThreadPoolExecutor(len(lanes), thread_name_prefix="lane")

    @property
    def sequences(self) -> list[int]:
        """The last batch number of each lane."""
        return [lane.sequence for lane in self._lanes]

    def send(self, runs: Runs, data: Runs, number: int) -> LaneStats:
        """Send the pages of `runs` as round `number`; return when they are in the destination's RAM.

        `data` are the runs of RAM that are not holes: no page outside them is read.
        """
        futures: list[Future[LaneStats]] = [
            self._pool.submit(self._send, lane, part, data, number)
            for lane, part in zip(self._lanes, split_lanes(*runs, len(self._lanes)), strict=True)
        ]
        parts = [future.result() for future in futures]
        return LaneStats(
            sum(part.pages for part in parts),
            sum(part.zero_pages for part in parts),
            sum(part.sent_bytes for part in parts),
        )

    def _send(self, lane: PageLane, runs: Runs, data: Runs, number: int) -> LaneStats:
        stats = LaneStats()
        size = lane.batch_pages
        for batch in encode(self._ram, *runs, round=number, compress=self._compress, data=data, batch_pages=size):
            stats.sent_bytes += lane.send(batch)
            stats.pages += batch.pages
            stats.zero_pages += batch.zero_pages
        lane.drain()
        return stats

    def interrupt(self, failure: Exception) -> None:
        """Let a `send` that runs, and every later one, fail with `failure`."""
        for lane in self._lanes:
            lane.interrupt(failure)

    def close(self, *, abort: bool) -> None:
        """End the lanes: in good order, or at once."""
        if abort:
            self.interrupt(ConnectionError("the migration has ended"))
        # Nobody may use a connection any more when it is closed.
        self._pool.shutdown()
        for lane in self._lanes:
            lane.close(abort=abort)
