"""Page lanes: what carries batches of pages to the destination.

A 2 MiB chunk of RAM always travels on the same lane, so two versions of a page never race. Each lane encodes in a
thread of its own. There are two kinds, which differ in nothing but how bytes travel: gRPC streams
(`source.grpc_lane`) and TCP connections (`source.tcp_lane`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.memory.pages import PageBatch, split_lanes
from common.memory.runs import Runs
from source.lane_stats import LaneStats, total
from source.packer import Packer

__all__ = ["PageLane", "PageLanes", "Unacked"]


class PageLane(Protocol):
    """One lane. Failures are `PeerError`, ConnectionError, or what `interrupt` was given; once failed, it stays so."""

    @property
    def sequence(self) -> int:
        """Number of the last batch."""

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

    def __init__(self, lanes: Sequence[PageLane], packer: Packer) -> None:
        self._lanes = lanes
        self._packer = packer
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
            self._pool.submit(self._send, index, part, data, number)
            for index, part in enumerate(split_lanes(*runs, len(self._lanes)))
        ]
        return total([future.result() for future in futures])

    def _send(self, index: int, runs: Runs, data: Runs, number: int) -> LaneStats:
        lane, stats = self._lanes[index], LaneStats()
        for batch in self._packer.batches(index, runs, data, number, lane.drain):
            stats.count(batch, lane.send(batch))
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
