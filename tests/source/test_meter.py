from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from source import meter as meter_module
from source.meter import ENOUGH_BYTES, ENOUGH_SECONDS, Meter

MIB = 1 << 20


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved by hand."""
    moment = [1000.0]
    monkeypatch.setattr(meter_module, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    return moment


def test_nothing_is_known_before_a_round_ends(now: list[float]) -> None:
    meter = Meter()
    assert meter.bandwidth == 0 and meter.current_bandwidth() == 0
    meter.applied(256, MIB)
    assert meter.bandwidth == 0


def test_counts_acks(now: list[float]) -> None:
    meter = Meter()
    meter.applied(256, MIB)
    meter.applied(1, 100)
    assert (meter.total_bytes, meter.round_pages) == (MIB + 100, 257)


def test_the_first_round_is_better_than_nothing() -> None:
    meter = Meter()
    meter.round_done(0.01, 4096)
    assert meter.bandwidth == pytest.approx(409_600)


def test_a_round_that_is_too_small_does_not_change_the_estimate() -> None:
    """An idle machine's rounds wait for one answer each; however many there are, they say nothing of the link."""
    meter = Meter()
    meter.round_done(1.0, 100 * MIB)
    for _ in range(1000):
        meter.round_done(0.02, 4096)
        meter.round_done(0.00001, 4096)
    assert meter.bandwidth == 100 * MIB
    # One that was small but long is taken together with the last that was large.
    meter.round_done(1.0, 4096)
    assert meter.bandwidth == pytest.approx(50 * MIB, rel=0.01)
    meter.round_done(0.5, 100 * MIB)
    assert meter.bandwidth == pytest.approx(200 * MIB)


def test_while_nothing_better_is_known_the_best_of_small_rounds_is_believed() -> None:
    meter = Meter()
    for seconds, size in ((0.01, 4096), (0.001, 4096), (0.01, 4096)):
        meter.round_done(seconds, size)
    assert meter.bandwidth == pytest.approx(4096_000)
    meter.round_done(0.5, MIB)
    assert meter.bandwidth == 2 * MIB


def test_nothing_in_no_time_is_no_bandwidth() -> None:
    meter = Meter()
    meter.round_done(0.0, 0)
    assert meter.bandwidth == 0


@given(
    st.lists(st.tuples(st.floats(1e-6, 10), st.integers(0, 1 << 34)), min_size=1, max_size=100),
)
def test_the_estimate_is_the_mean_of_the_fewest_last_long_or_large_rounds_that_suffice(
    rounds: list[tuple[float, int]],
) -> None:
    expected = 0.0
    rounds = [each for each in rounds if each[0] >= ENOUGH_SECONDS or each[1] >= ENOUGH_BYTES]
    meter = Meter()
    for end in range(1, len(rounds) + 1):
        meter.round_done(*rounds[end - 1])
        for start in range(end - 1, max(end - 65, -1), -1):
            spent = sum(seconds for seconds, _ in rounds[start:end])
            sent = sum(size for _, size in rounds[start:end])
            if spent >= ENOUGH_SECONDS and sent >= ENOUGH_BYTES:
                expected = sent / spent
                break
        else:
            expected = expected or sent / spent
        assert meter.bandwidth == pytest.approx(expected)


def test_the_bandwidth_shown_is_of_the_last_second(now: list[float]) -> None:
    meter = Meter()
    for size in (8, 3, 2):  # the first is longer ago than that
        now[0] += 0.5
        meter.applied(1, size * MIB)
    now[0] += 0.25
    assert meter.current_bandwidth() == pytest.approx((3 + 2) * MIB)
    assert meter.total_bytes == 13 * MIB


def test_acks_that_come_seldom_are_shown_as_the_rate_that_they_make(now: list[float]) -> None:
    meter = Meter()
    shown = []
    for _ in range(10):  # batches of 4 MiB through a link of 1 MiB/s
        for _ in range(8):
            now[0] += 0.5
            shown.append(meter.current_bandwidth())
        meter.applied(1024, 4 * MIB)
    assert min(shown[8:]) >= MIB / 2 and max(shown[8:]) <= 2 * MIB


def test_the_first_ack_is_not_an_infinite_bandwidth(now: list[float]) -> None:
    meter = Meter()
    now[0] += 0.001
    meter.applied(256, MIB)
    assert meter.current_bandwidth() == pytest.approx(MIB / ENOUGH_SECONDS)


def test_a_time_without_pages_is_not_a_slow_link(now: list[float]) -> None:
    meter = Meter()
    now[0] += 10  # of setup
    for _ in range(2):
        meter.round_begins()
        for _ in range(5):
            now[0] += 0.1
            meter.applied(256, MIB)
            assert meter.current_bandwidth() == pytest.approx(10 * MIB)
        now[0] += 5  # of devices, mappings, dirty pages that are collected


def test_a_link_that_carries_nothing_any_more_shows_ever_less(now: list[float]) -> None:
    meter = Meter()
    for _ in range(100):
        now[0] += 0.1
        meter.applied(1, 8 * MIB)
    before = meter.current_bandwidth()
    now[0] += 5.0
    assert meter.current_bandwidth() < before / 25
