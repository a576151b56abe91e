"""Batches of pages, packed ahead of the lanes that send them.

A lane takes its batches from here. While it waits for the link, a few threads pack what comes next, so that one lane
can keep several cores busy; the batches of a lane stay in order. Which method is used is told by the operator, or
decided (source/compression.py) by what was measured of those before it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from switchover.v1 import host_pb2

from common.memory import runs
from common.memory.compression import LZ4, MAX_UNIT_PAGES, NONE, ZSTD, Encoding, Method
from common.memory.layout import PAGE_SIZE
from common.memory.pages import PageBatch, encode, pack
from common.memory.ram import GuestRam
from common.memory.runs import Runs
from common.memory.sent import SentPages
from source.tuner import Tuner

__all__ = ["Packer", "next_unit"]

# More threads than this only serve links that are faster than the other end unpacks.
MAX_WORKERS = 4
# Contents of pages that were sent more than once, for differences.
CACHE_BYTES = 64 << 20
# What is left of a round is cut finer towards its end, so that every worker has some of it, but no finer than this.
MIN_UNIT_PAGES = 64
# An ack costs both ends more than a batch of 1 MiB does, so they are asked for after so much, or so long.
ACK_BYTES, ACK_SECONDS = 8 << 20, 0.05
# The code of both ends is out of the processor's caches after each batch, so batches grow while the link is fast; where
# it is slow they stay small, for an ack tells how far it has come.
QUICK_SECONDS, SLOW_SECONDS = 0.01, 0.04
# Batches of so many pages go first, one at a time, to see how fast the link is: another one if that was too little.
FIRST_LOOKS = (64, 256, 1024)
# The first that a lane packs in a round is so large, lest the link wait long, and each one half as large again.
FIRST_UNIT_PAGES = 128

# Batches that are being packed, in order: bytes of pages, and what comes of them.
_Queue = deque[tuple[int, Future[tuple[PageBatch, Method]]]]

FIXED = {
    host_pb2.COMPRESSION_OFF: NONE,
    host_pb2.COMPRESSION_LZ4: LZ4,
    host_pb2.COMPRESSION_ZSTD: ZSTD,
}


def next_unit(pages: int, seconds: float, limits: tuple[int, int]) -> int:
    """Return how many raw pages to send at once, from least to most, after so many have taken so long."""
    least, most = limits
    if seconds < QUICK_SECONDS:
        return min(2 * pages, most)
    return max(pages // 2, least) if seconds > SLOW_SECONDS else pages


class Packer:
    """Makes the batches of all lanes; `close` ends its threads."""

    def __init__(
        self,
        ram: GuestRam,
        compression: host_pb2.Compression.ValueType,
        lanes: int,
        unit_pages: tuple[int, int],
        *,
        packing: bool = True,
    ) -> None:
        """`unit_pages`: least and most of a batch that is not compressed.

        Without `packing` the destination knows nothing but whole pages and lz4: what would be zstd is that too.
        """
        self._ram = ram
        self._unit_pages = unit_pages
        self._units = [unit_pages[0]] * lanes
        self._lanes = lanes
        self._sent = [self._nothing_sent() for _ in range(lanes)]
        workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS)
        self._fixed = FIXED.get(compression)
        self._refers = packing
        if not packing and self._fixed is not NONE:
            self._fixed = LZ4
        self._tuner = Tuner(workers=workers, lanes=lanes) if self._fixed is None else None  # nothing to decide
        self._workers = workers
        self._ahead = max(workers // lanes, 1) + 1
        self._looks = list(FIRST_LOOKS) if self._fixed is None else []
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")

    def _nothing_sent(self) -> SentPages:
        return SentPages(self._ram.layout.pages, CACHE_BYTES // self._lanes)

    def forget(self, lane: int, lost: int) -> None:
        """Believe no more that the other end has anything of what a lane has sent; `lost` pages were on their way."""
        self._sent[lane] = self._nothing_sent()
        if self._tuner is not None:
            self._tuner.lost(lost)

    def batches(
        self, lane: int, pages: Runs, data: Runs, number: int, drain: Callable[[], None]
    ) -> Iterator[PageBatch]:
        """Yield a lane's batches of round `number`; they may refer to RAM as it changes.

        `data` are the runs of RAM that are not holes: no page outside them is read. `drain` waits until everything that
        the lane has sent is applied.
        """
        left = runs.total(pages)
        asked_at, unasked = time.monotonic(), 0
        for batch in self._batches(lane, pages, data, number, drain):
            left -= batch.pages
            unasked += batch.payload_bytes
            now = time.monotonic()
            batch.more = batch.more and left > 0 and unasked < ACK_BYTES and now - asked_at < ACK_SECONDS
            if not batch.more:
                asked_at, unasked = now, 0
            yield batch
            if batch.encoding == Encoding.RAW and batch.payload_pages >= self._unit_pages[0]:
                self._units[lane] = next_unit(batch.payload_pages, time.monotonic() - now, self._unit_pages)

    def _batches(
        self, lane: int, pages: Runs, data: Runs, number: int, drain: Callable[[], None]
    ) -> Iterator[PageBatch]:
        def unit() -> int:
            return self._units[lane]

        if self._fixed is NONE:
            # Nothing to pack, to measure, or to remember.
            for batch in encode(self._ram, *pages, round=number, data=data, unit_pages=unit):
                batch.more = True
                yield batch
            return
        method = NONE
        sent = self._sent[lane]
        left, packed_unit, most = runs.total(pages), FIRST_UNIT_PAGES, 0

        def copied() -> int:
            nonlocal method, most
            if looks := self._looks:  # of all lanes
                return looks[0]
            most = min(packed_unit, max(left // (2 * self._workers), MIN_UNIT_PAGES))
            method = self._next_method(lane, most)
            return 0 if method is NONE else min(method.unit_pages, most)

        packing: _Queue = deque()
        for batch in encode(self._ram, *pages, round=number, data=data, copied=copied, unit_pages=unit):
            left -= batch.pages
            if method is not NONE and batch.payload:
                packed_unit = min(3 * packed_unit // 2, MAX_UNIT_PAGES)
                size = batch.payload_bytes  # before it is reduced, perhaps to nothing
                if self._refers:
                    sent.reduce(batch)
                packing.append((size, self._pool.submit(self._pack, batch, method)))
                # Behind a large unit, which takes long, there may be many small ones. While units grow, the first is
                # the measure, lest the link wait until they are large.
                unit_bytes = most * PAGE_SIZE if packed_unit == MAX_UNIT_PAGES else packing[0][0]
                yield from self._finish(packing, self._ahead * unit_bytes)
            else:
                sent.forget(batch)
                yield from self._finish(packing, 0)
                look = bool(self._looks and batch.payload)
                # What is packed is large, and its ack tells how fast the link is, as that of a look does.
                batch.more = not look
                yield from self._hand_over(batch)
                if look and self._tuner is not None:
                    drain()
                    self._looks = self._looks[1:] if self._tuner.look_first() else []
        yield from self._finish(packing, 0)

    def _pack(self, batch: PageBatch, method: Method) -> tuple[PageBatch, Method]:
        """Pack a batch; return it, and how it was packed."""
        size = batch.payload_bytes
        began = time.thread_time()
        if not size or not pack(batch, method):
            return batch, NONE
        if self._tuner is not None:
            self._tuner.packed(method, size, batch.payload_bytes, time.thread_time() - began)
        return batch, method

    def _finish(self, packing: _Queue, ahead: int) -> Iterator[PageBatch]:
        """Yield what was submitted first, until no more than `ahead` bytes of pages are left."""
        while sum(size for size, _ in packing) > ahead:
            _, packed = packing.popleft()
            yield from self._hand_over(*packed.result())

    def _hand_over(self, batch: PageBatch, method: Method = NONE) -> Iterator[PageBatch]:
        if self._tuner is None:
            yield batch
            return
        self._tuner.sending(batch.pages, batch.payload_pages * PAGE_SIZE, method)
        began = time.monotonic()
        yield batch
        self._tuner.held_up(time.monotonic() - began)

    def applied(self, pages: int, size: int) -> None:
        """Note an ack."""
        if self._tuner is not None:
            self._tuner.applied(pages, size)

    def _next_method(self, lane: int, most: int) -> Method:
        if self._tuner is not None:
            return self._tuner.next_method(lane, most)
        assert self._fixed is not None
        return self._fixed

    @property
    def compression(self) -> str:
        """How pages are packed at present."""
        if self._tuner is not None:
            return self._tuner.blend.name
        assert self._fixed is not None
        return self._fixed.name

    def close(self) -> None:
        """End the threads; what they pack is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
