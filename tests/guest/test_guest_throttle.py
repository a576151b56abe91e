from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.guest.throttle import TIMESLICE_NS, awake_ns, sleep_left_ns

ELAPSED = st.integers(0, 10**13)
PERCENT = st.integers(0, 99)


@given(ELAPSED, PERCENT)
def test_while_it_sleeps_it_is_not_awake_and_wakes_when_it_said(elapsed: int, percent: int) -> None:
    left = sleep_left_ns(elapsed, percent)
    assert awake_ns(elapsed + left, percent) == awake_ns(elapsed, percent)
    if left:
        assert sleep_left_ns(elapsed + left - 1, percent) == 1
        assert sleep_left_ns(elapsed + left, percent) == 0
    else:
        assert awake_ns(elapsed + 1, percent) == awake_ns(elapsed, percent) + 1


def test_the_share_of_time_awake_is_what_was_asked_for() -> None:
    assert awake_ns(1_000 * TIMESLICE_NS, 75) == 250 * TIMESLICE_NS
    assert awake_ns(1_000 * TIMESLICE_NS, 0) == 1_000 * TIMESLICE_NS


@pytest.mark.parametrize("percent", [-1, 100])
def test_impossible_percentages_are_refused(percent: int) -> None:
    with pytest.raises(ValueError):
        sleep_left_ns(0, percent)
