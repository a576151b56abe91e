from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from source import limiter
from source.limiter import BURST_SECONDS, Limiter


class FakeTime:
    """A clock that only sleeping, and who sends, moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds
        return False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(limiter, "time", self)
        patch.setattr(limiter, "threading", SimpleNamespace(Lock=threading.Lock, Event=lambda: self))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    fake.install(monkeypatch)
    return fake


def test_no_limit_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = Limiter(None)
    monkeypatch.setattr(limiter, "time", SimpleNamespace())  # not even a look at the clock
    unlimited.take(1 << 40)


@given(
    st.floats(1e3, 1e10),
    st.lists(st.tuples(st.integers(0, 1 << 24), st.floats(0, 0.5)), min_size=1, max_size=40),
)
def test_never_more_than_the_rate_allows(rate: float, takes: list[tuple[int, float]]) -> None:
    """Over any span from the start or from an idle moment on: the rate, and a hundredth of a second of burst."""
    fake = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        fake.install(patch)
        limited = Limiter(rate)
        starts: list[tuple[float, int]] = [(fake.now, 0)]
        sent = 0
        for size, idle in takes:
            fake.now += idle
            starts.append((fake.now, sent))
            limited.take(size)
            sent += size
            for since, before in starts:
                allowed = rate * (fake.now - since + BURST_SECONDS)
                assert sent - before <= allowed * (1 + 1e-9) + 1e-3


def test_the_rate_is_used_up(clock: FakeTime) -> None:
    limited = Limiter(1e6)
    for _ in range(100):
        limited.take(10_000)
    assert clock.now - 100.0 == pytest.approx(1.0, abs=BURST_SECONDS)


def test_time_unused_is_gone(clock: FakeTime) -> None:
    """After an hour of silence no more than the burst is free."""
    limited = Limiter(1e6)
    clock.now += 3600
    limited.take(5_000)
    assert clock.slept == []
    limited.take(25_000)
    assert clock.slept == [pytest.approx(0.02)]


def test_all_streams_draw_from_one_budget(clock: FakeTime) -> None:
    """Whoever comes second waits for the first one's bytes too: the lock is not held while the first one sleeps."""
    limited = Limiter(1e6)
    limited.take(0)
    nested: list[float] = []

    def wait(seconds: float) -> bool:
        if not nested:
            nested.append(seconds)
            limited.take(1_000_000)
        else:
            nested.append(seconds)
        return False

    clock.wait = wait  # type: ignore[method-assign]  # as another thread would come in between
    limited.take(1_000_000)
    assert nested == [pytest.approx(1.0, abs=BURST_SECONDS), pytest.approx(2.0, abs=BURST_SECONDS)]


def test_lifting_it_lets_go_who_waits_and_who_comes() -> None:
    limited = Limiter(1.0)
    waiting = [threading.Thread(target=limited.take, args=(1 << 20,), daemon=True) for _ in range(3)]
    for thread in waiting:
        thread.start()
    waiting[0].join(0.05)
    assert waiting[0].is_alive()
    limited.lift()
    limited.take(1 << 20)
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()
