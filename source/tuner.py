"""What is measured for the choice of a compression method: acks, time to pack, idle cores.

The decisions are in source/compression.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from common.memory.compression import METHODS, Method
from source.compression import AS_IN_TABLE, NOTHING, Belief, Blend, Link, choose, next_belief, next_pages

__all__ = ["Tuner"]

# The link is looked at after this long, so many acks and so much.
LOOK_SECONDS, LOOK_ACKS, LOOK_BYTES = 0.2, 4, 1 << 20
# A link that seems to carry more than this at first, in bytes per second, is looked at again before anything is packed:
# of a quick answer a thread that woke up late may be most, and a burst of the link may be lent. From the second of
# these on nothing is packed at first.
QUICK_LINK, FAST_LINK = 30e6, 200e6
# How much a new measurement of idle cores counts.
WEIGHT = 0.5
# Where no core is idle packing gets its share all the same.
FEWEST_CORES = 0.5


def _idle_seconds() -> float:
    with open("/proc/stat") as lines:
        fields = lines.readline().split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


class Tuner:
    """Keeps what was measured, and the methods that follow from it. Any thread may call any method."""

    def __init__(
        self,
        *,
        workers: int,
        lanes: int,
        clock: Callable[[], float] = time.monotonic,
        idle: Callable[[], float] = _idle_seconds,
    ) -> None:
        """`idle` is how many seconds this host's cores have been idle, all together."""
        self._workers = workers
        self._lanes = lanes
        self._clock = clock
        self._idle = idle
        self._cores = workers / 2  # who else needs them is not known yet
        self._lock = threading.Lock()
        self._pages = AS_IN_TABLE
        self._link: Belief | None = None
        self._under_way = 0
        self._begin(clock())
        self.blend = Blend(METHODS[2], METHODS[2], 0.0)
        # Of each lane, pages that should have been packed with the second method, and were not.
        self._owed = [0.0] * lanes

    def _begin(self, now: float) -> None:
        """Begin to measure."""
        self._looked_at = self._busy_since = now
        self._was_idle = self._idle()
        self._busy = self._held_up = self._packing = self._unpacking = 0.0
        self._acks = self._acked_bytes = 0

    def look_first(self) -> bool:
        """Decide for the first time: what was sent alone, and has arrived, shows how fast the link is.

        Return whether that was too little to tell.
        """
        with self._lock:
            now = self._clock()
            self._count_busy(now)
            again = False
            if self._busy > 0:
                rate = self._acked_bytes / self._busy
                self._link = Belief(rate, rate)
                again = rate > QUICK_LINK
                self.blend = NOTHING if rate > FAST_LINK else self._choose()
            self._begin(now)
            return again

    def _count_busy(self, now: float) -> None:
        if self._under_way:
            self._busy += now - self._busy_since
            self._busy_since = now

    def next_method(self, lane: int, most: int) -> Method:
        """Return how to pack the next unit of a lane, of at most so many pages."""
        with self._lock:
            first, second, part = self.blend.first, self.blend.second, self.blend.part
            is_second = self._owed[lane] >= (1 - part) * min(second.unit_pages, most) / 2
            method = second if is_second else first
            self._owed[lane] += (part - is_second) * min(method.unit_pages, most)
            return method

    def packed(self, method: Method, size: int, packed_size: int, seconds: float) -> None:
        """Note that a worker packed `size` bytes of pages into `packed_size`, in so many seconds of a core."""
        with self._lock:
            self._packing += seconds
            self._pages = next_pages(self._pages, method, size, packed_size / size, size / max(seconds, 1e-9))

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
            enough = self._acks >= LOOK_ACKS and self._acked_bytes >= LOOK_BYTES
            if enough and now - self._looked_at >= LOOK_SECONDS:
                self._look(now)

    def lost(self, pages: int) -> None:
        """Note that pages will not arrive, for their connection was lost: nothing of the time since is measured."""
        with self._lock:
            self._under_way -= pages
            self._begin(self._clock())

    def _look(self, now: float) -> None:
        self._count_busy(now)
        if self._busy > 0:
            lane_seconds = self._busy * self._lanes
            elapsed = now - self._looked_at
            idle = (self._idle() - self._was_idle) / elapsed
            self._link = next_belief(
                self._link,
                Link(
                    self._acked_bytes / self._busy, self._held_up / lane_seconds, idle, self._unpacking / lane_seconds
                ),
            )
            # What is idle, and what packing itself has used.
            cores = idle + self._packing / elapsed
            self._cores += WEIGHT * (min(max(cores, FEWEST_CORES), self._workers) - self._cores)
            self.blend = self._choose()
        self._begin(now)

    def _choose(self) -> Blend:
        assert self._link is not None
        return choose(self._link.rate, self._pages, cores=self._cores, lanes=self._lanes)
