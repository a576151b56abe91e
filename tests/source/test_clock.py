from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from source import clock
from source.clock import ClockOffset, measure

DELAYS = st.integers(0, 10**10)


class Hosts:
    """Two clocks, and a wire between them that takes as long as it is told, either way."""

    def __init__(self, offset: int, trips: list[tuple[int, int]]) -> None:
        self.now = 5_000_000
        self.trips = list(trips)
        self.offset = offset

    def monotonic_ns(self) -> int:
        return self.now

    def read_other(self) -> int:
        there, back = self.trips.pop(0)
        self.now += there
        other = self.now + self.offset
        self.now += back
        return other

    def measure(self) -> ClockOffset:
        """Until the wire has no more to say."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clock, "time", SimpleNamespace(monotonic_ns=self.monotonic_ns))
            patch.setattr(clock, "MIN_ROUND_TRIPS", len(self.trips))
            patch.setattr(clock, "MEASURE_SECONDS", 0)
            return measure(self.read_other)


@given(st.integers(-(10**15), 10**15), st.lists(st.tuples(DELAYS, DELAYS), min_size=1, max_size=25))
def test_the_error_bounds_what_the_wire_may_have_hidden(offset: int, trips: list[tuple[int, int]]) -> None:
    """Ways there and back may differ as they like: the truth is never further away than the error says."""
    measured = Hosts(offset, trips).measure()
    assert abs(measured.offset_ns - offset) <= measured.error_ns
    assert measured.error_ns == min((there + back + 1) // 2 for there, back in trips)


def test_the_quickest_round_trip_is_believed() -> None:
    measured = Hosts(1000, [(0, 900), (30, 50), (40, 40), (700, 0)]).measure()
    assert measured == ClockOffset(990, 40)


@pytest.mark.parametrize(("trip_ns", "trips"), [(100_000, 40), (1_000_000, 4), (50_000_000, 3)])
def test_a_slow_wire_is_not_asked_for_long(monkeypatch: pytest.MonkeyPatch, trip_ns: int, trips: int) -> None:
    """The guest runs, and writes, until the clocks are compared."""
    hosts = Hosts(1000, [(trip_ns // 2, trip_ns // 2)] * 200)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic_ns=hosts.monotonic_ns))
    assert measure(hosts.read_other) == ClockOffset(1000, trip_ns // 2)
    assert 200 - len(hosts.trips) == trips
