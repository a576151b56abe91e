"""Batches of pages, packed ahead of the lanes that send them.

A lane takes its batches from here. While it waits for the link, a few threads pack what comes next, so that one lane
can keep several cores busy; the batches of a lane stay in order. Which method is used is told by the operator, or
decided anew for each batch (source/compression.py) by what was measured of those before it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from switchover.v1 import host_pb2

from common.memory import runs
from common.memory.compression import LZ4, METHODS, NONE, ZSTD, Method
from common.memory.layout import PAGE_SIZE
from common.memory.pages import PageBatch, encode, pack
from common.memory.ram import GuestRam
from common.memory.runs import Runs
from common.memory.sent import SentPages
from source.compression import Link, Speed, choose, next_link

__all__ = ["Packer", "Tuner"]

# More threads than this serve nobody but a link that is faster than the other end unpacks.
MAX_WORKERS = 4
# Contents of pages that were sent more than once, for differences.
CACHE_BYTES = 64 << 20
# A small round is cut finer, so that every worker has some of it, but no finer than this.
MIN_UNIT_PAGES = 64
# The link is looked at after this long, so many acks and so much.
LOOK_SECONDS, LOOK_ACKS, LOOK_BYTES = 0.05, 4, 1 << 20
# The first batch of about this size goes to see how fast the link is; nothing else is sent for at most so long.
FIRST_LOOK_BYTES, FIRST_LOOK_SECONDS = 1 << 19, 0.5
# What a method has shown is forgotten after this long, and it is tried again.
MEMORY_SECONDS = 5.0
# How much a new measurement counts.
WEIGHT = 0.5
# A link that seems to carry more than this, in bytes per second, is looked at again before anything is compressed.
FAST_LINK = 200e6
# Where no core is idle packing gets its share all the same.
FEWEST_CORES = 0.5

FIXED = {
    host_pb2.COMPRESSION_OFF: NONE,
    host_pb2.COMPRESSION_LZ4: LZ4,
    host_pb2.COMPRESSION_ZSTD: ZSTD,
}


def idle_seconds() -> float:
    """Return how long this host's cores have been idle, all together."""
    with open("/proc/stat") as lines:
        fields = lines.readline().split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


class Tuner:
    """Keeps what was measured, and the method that follows from it. Any thread may call any method."""

    def __init__(
        self,
        *,
        workers: int,
        lanes: int,
        clock: Callable[[], float] = time.monotonic,
        idle: Callable[[], float] = idle_seconds,
    ) -> None:
        """`idle` is how many seconds this host's cores have been idle, all together."""
        self._workers = workers
        self._lanes = lanes
        self._clock = clock
        self._idle = idle
        self._was_idle = idle()
        self._cores = float(workers)
        self._lock = threading.Lock()
        self._seen: dict[Method, tuple[Speed, float]] = {}
        self._link: float | None = None
        self._under_way = 0
        self._busy_since = 0.0
        self._looked_at = clock()
        self._forget_counts()
        self.method = METHODS[2]

    def _forget_counts(self) -> None:
        self._busy = self._held_up = self._packing = self._unpacking = 0.0
        self._acks = self._acked_bytes = 0

    @property
    def link(self) -> float | None:
        """What the link is believed to carry, in bytes per second; None as long as nothing was seen of it."""
        return self._link

    def packed(self, method: Method, size: int, packed_size: int, seconds: float) -> None:
        """Note that a worker packed `size` bytes of pages into `packed_size`, in so many seconds of a core."""
        speed = Speed(packed_size / size, size / max(seconds, 1e-9))
        with self._lock:
            self._packing += seconds
            if method in self._seen:
                before = self._seen[method][0]
                speed = Speed(
                    before.share + WEIGHT * (speed.share - before.share),
                    # Rates are averaged as the times that they stand for.
                    1 / (1 / before.rate + WEIGHT * (1 / speed.rate - 1 / before.rate)),
                )
            self._seen[method] = speed, self._clock()

    def held_up(self, seconds: float) -> None:
        """Note how long the link has held a lane up."""
        with self._lock:
            self._held_up += seconds

    def sending(self, pages: int, size: int, method: Method) -> None:
        """Note that pages go to the link, `size` bytes of them packed with a method."""
        with self._lock:
            self._unpacking += size / method.unpack_rate
            if not self._under_way:
                self._busy_since = self._clock()
            self._under_way += pages

    def applied(self, pages: int, size: int) -> None:
        """Note that pages have arrived, with `size` bytes in all."""
        now = self._clock()
        with self._lock:
            self._under_way -= pages
            self._acks += 1
            self._acked_bytes += size
            if not self._under_way:
                self._busy += now - self._busy_since
            first = self._link is None and size >= FIRST_LOOK_BYTES
            enough = self._acks >= LOOK_ACKS and self._acked_bytes >= LOOK_BYTES
            if first or (enough and now - self._looked_at >= LOOK_SECONDS):
                self._look(now)

    def _look(self, now: float) -> None:
        if self._under_way:
            self._busy += now - self._busy_since
            self._busy_since = now
        if self._busy > 0:
            lane_seconds = self._busy * self._lanes
            seen = Link(self._acked_bytes / self._busy, self._held_up / lane_seconds, self._unpacking / lane_seconds)
            # One batch alone does not show how fast a fast link is.
            wait_and_see = self._link is None and seen.rate > FAST_LINK
            self._link = next_link(self._link, seen)
            self.method = NONE if wait_and_see else self._choose(now)
        self._looked_at = now
        self._forget_counts()

    def _choose(self, now: float) -> Method:
        idle = self._idle()
        elapsed = now - self._looked_at
        if elapsed >= LOOK_SECONDS:
            # What is idle now, and what packing itself has used.
            cores = (idle - self._was_idle + self._packing) / elapsed
            self._cores += WEIGHT * (min(max(cores, FEWEST_CORES), self._workers) - self._cores)
        self._was_idle = idle
        self._seen = {method: entry for method, entry in self._seen.items() if now - entry[1] < MEMORY_SECONDS}
        speeds = {method: speed for method, (speed, _) in self._seen.items()}
        assert self._link is not None
        return choose(self.method, self._link, speeds, cores=self._cores, lanes=self._lanes)


class Packer:
    """Makes the batches of all lanes; `close` ends its threads."""

    def __init__(self, ram: GuestRam, compression: host_pb2.Compression.ValueType, lanes: int) -> None:
        self._ram = ram
        self._sent = [SentPages(ram.layout.pages, CACHE_BYTES // lanes) for _ in range(lanes)]
        cores = len(os.sched_getaffinity(0))
        workers = min(cores, MAX_WORKERS)
        self._fixed = FIXED.get(compression)
        self._tuner = Tuner(workers=workers, lanes=lanes)
        self._workers = workers
        self._ahead = max(workers // lanes, 1) + 1
        self._looking = threading.Lock()  # taken by the lane that looks first, and kept
        self._first_look = threading.Event()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")

    @property
    def method(self) -> Method:
        """How the next batch is packed."""
        return self._fixed or self._tuner.method

    def batches(self, lane: int, pages: Runs, data: Runs, number: int) -> Iterator[PageBatch]:
        """Yield a lane's batches of round `number`; they may refer to RAM, until the next one is asked for.

        `data` are the runs of RAM that are not holes: no page outside them is read.
        """
        method = NONE
        sent = self._sent[lane]
        most = max(runs.total(runs.intersect(pages, data)) // (2 * self._workers), MIN_UNIT_PAGES)

        def copied() -> int:
            nonlocal method
            method = NONE if self._sees_nothing else self.method
            return 0 if method is NONE else min(method.unit_pages, most)

        packing: deque[Future[tuple[PageBatch, Method]]] = deque()
        for batch in encode(self._ram, *pages, round=number, data=data, copied=copied):
            if method is not NONE and batch.payload:
                sent.reduce(batch)
                packing.append(self._pool.submit(self._pack, batch, method))
                yield from self._finish(packing, self._ahead)
                continue
            sent.forget(batch)
            yield from self._finish(packing, 0)
            if self._sees_nothing and batch.payload_bytes >= FIRST_LOOK_BYTES:
                yield from self._look_first(batch)
            else:
                yield from self._hand_over(batch)
        yield from self._finish(packing, 0)

    @property
    def _sees_nothing(self) -> bool:
        return self._fixed is None and not self._first_look.is_set()

    def _look_first(self, batch: PageBatch) -> Iterator[PageBatch]:
        """Send a batch alone, the first of all lanes, and wait until it has shown how fast the link is."""
        if self._looking.acquire(blocking=False):
            yield from self._hand_over(batch)
            self._first_look.wait(FIRST_LOOK_SECONDS)
            self._first_look.set()
        else:
            self._first_look.wait(2 * FIRST_LOOK_SECONDS)
            yield from self._hand_over(batch)

    def _pack(self, batch: PageBatch, method: Method) -> tuple[PageBatch, Method]:
        size = batch.payload_bytes
        began = time.thread_time()
        if not size or not pack(batch, method):
            return batch, NONE
        self._tuner.packed(method, size, batch.payload_bytes, time.thread_time() - began)
        return batch, method

    def _finish(self, packing: deque[Future[tuple[PageBatch, Method]]], left: int) -> Iterator[PageBatch]:
        while len(packing) > left:
            yield from self._hand_over(*packing.popleft().result())

    def _hand_over(self, batch: PageBatch, method: Method = NONE) -> Iterator[PageBatch]:
        self._tuner.sending(batch.pages, batch.payload_pages * PAGE_SIZE, method)
        began = time.monotonic()
        yield batch
        self._tuner.held_up(time.monotonic() - began)

    def applied(self, pages: int, size: int) -> None:
        """Note an ack."""
        self._tuner.applied(pages, size)
        if self._tuner.link is not None:
            self._first_look.set()

    def close(self) -> None:
        """End the threads; what they pack is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
