"""The difference between two hosts' monotonic clocks, which count from different moments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ClockOffset", "measure"]

ROUND_TRIPS = 20


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The other clock minus ours, in nanoseconds; it is off by at most `error_ns`."""

    offset_ns: int
    error_ns: int


def measure(read_other_clock: Callable[[], int], round_trips: int = ROUND_TRIPS) -> ClockOffset:
    """Read the other clock many times and believe the quickest round trip, which leaves the least room for error."""
    best: ClockOffset | None = None
    for _ in range(round_trips):
        before = time.monotonic_ns()
        other = read_other_clock()
        after = time.monotonic_ns()
        sample = ClockOffset(other - (before + after) // 2, (after - before + 1) // 2)
        if best is None or sample.error_ns < best.error_ns:
            best = sample
    assert best is not None
    return best
