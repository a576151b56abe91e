from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.memory.compression import LZ4, MAX_UNIT_PAGES, METHODS, NONE, Method
from common.memory.layout import PAGE_SIZE
from source.compression import (
    AS_GOOD,
    AS_IN_TABLE,
    MOST_UNPACKING,
    NOTHING,
    Belief,
    Blend,
    Link,
    Pages,
    choose,
    next_belief,
    next_pages,
)
from source.packer import FIRST_LOOKS
from source.tuner import Tuner

MBIT, GBIT = 1e6 / 8, 1e9 / 8
LARGEST = MAX_UNIT_PAGES * PAGE_SIZE
QUEUED = 4
# What was seen of a link that waited for the codec, and of one that the codec waited for.
WAITED, HELD_UP = Link(50, 0.0, 1.0), Link(50, 1.0, 1.0)


def chosen(link: float, cores: float = 2, pages: Pages = AS_IN_TABLE) -> Blend:
    return choose(link, pages, cores=cores, lanes=1)


def strength(blend: Blend) -> float:
    first, second = METHODS.index(blend.first), METHODS.index(blend.second)
    return first + (second - first) * blend.part


def seconds(blend: Blend, link: float, pages: Pages, cores: float, lanes: int) -> tuple[float, float, float]:
    """What a byte of pages takes on the link, of the packing cores, and of the lanes that unpack."""

    def mean(first: float, second: float) -> float:
        return (1 - blend.part) * first + blend.part * second

    first, second = blend.first, blend.second
    return (
        mean(first.share**pages.power, second.share**pages.power) / link,
        mean(1 / first.rate, 1 / second.rate) * pages.slowness / cores,
        mean(1 / first.unpack_rate, 1 / second.unpack_rate) / lanes / MOST_UNPACKING,
    )


def test_a_faster_link_is_given_less_compression() -> None:
    links = [10 * MBIT, 100 * MBIT, *(times * GBIT for times in (0.5, 1, 2, 4, 10, 100))]
    strengths = [strength(chosen(link)) for link in links]
    assert strengths == sorted(strengths, reverse=True)
    assert (strengths[0], strengths[-1]) == (len(METHODS) - 1, 0)
    assert 2 <= strength(chosen(GBIT)) <= 4  # zstd-1 to zstd-3


def test_more_cores_are_given_more_compression() -> None:
    assert chosen(10 * GBIT, cores=1).name == "none"
    assert chosen(10 * GBIT, cores=4).name == "lz4"
    strengths = [strength(chosen(GBIT, cores)) for cores in (0.5, 1, 2, 4, 8, 16, 32)]
    assert strengths == sorted(strengths) and len(set(strengths)) > 5


@given(
    link=st.floats(1e6, 1e10),
    power=st.floats(0.02, 4),
    slowness=st.floats(0.3, 10),
    cores=st.floats(0.5, 16),
    lanes=st.integers(1, 8),
)
def test_no_method_alone_is_faster_and_two_keep_link_and_codec_busy(
    link: float, power: float, slowness: float, cores: float, lanes: int
) -> None:
    pages = Pages(power, slowness)
    blend = choose(link, pages, cores=cores, lanes=lanes)
    times = seconds(blend, link, pages, cores, lanes)
    for method in METHODS:
        alone = max(seconds(Blend(method, method, 0.0), link, pages, cores, lanes))
        assert AS_GOOD * max(times) <= alone * (1 + 1e-9)
    if 0 < blend.part < 1:
        assert times[0] / max(times[1:]) == pytest.approx(1)


def test_what_cannot_be_compressed_is_sent_as_it_is() -> None:
    assert chosen(GBIT, pages=Pages(0.0, 10.0)) == NOTHING
    assert chosen(GBIT, pages=Pages(1.0, 10.0)) == NOTHING  # packing would take longer than the link does
    assert chosen(GBIT, pages=Pages(0.05, 1.0)).first is not NONE


def test_pages_are_known_by_what_was_packed_of_them_with_whatever_method() -> None:
    for method in METHODS[1:]:
        pages = AS_IN_TABLE
        for _ in range(30):
            pages = next_pages(pages, method, LARGEST, method.share**2, method.rate / 3)
        assert (pages.power, pages.slowness) == (pytest.approx(2, rel=0.01), pytest.approx(3, rel=0.01))
    assert 1 < next_pages(AS_IN_TABLE, LZ4, LARGEST, LZ4.share**2, LZ4.rate).power < 1.5


def test_what_is_left_of_pages_is_averaged_by_their_bytes() -> None:
    pages = AS_IN_TABLE
    for share in [0.5, 0.002] * 30:
        pages = next_pages(pages, LZ4, LARGEST // 8, share, LZ4.rate)
    assert LZ4.share**pages.power == pytest.approx(0.25, rel=0.1)
    tiny = next_pages(AS_IN_TABLE, LZ4, PAGE_SIZE, 30 / PAGE_SIZE, LZ4.rate / 5)
    assert (tiny.power, tiny.slowness) == (pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.01))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("most", [64, 512, MAX_UNIT_PAGES], ids=lambda most: f"units of at most {most} pages")
def test_two_methods_take_turns_on_each_lane(part: float, most: int) -> None:
    first, second = LZ4, METHODS[2]
    tuner = Tuner(workers=2, lanes=2)
    tuner.blend = Blend(first, second, part)
    both = [(tuner.next_method(0, most), tuner.next_method(1, most)) for _ in range(400)]
    for taken in zip(*both, strict=True):
        sizes = [min(method.unit_pages, most) for method in taken]
        seconds = [size for size, method in zip(sizes, taken, strict=True) if method is second]
        assert sum(seconds) == pytest.approx(part * sum(sizes), abs=most)
        # Neither waits longer than it has to.
        turns = [len(list(turn)) for _, turn in itertools.groupby(taken)]
        if 0 < part < 1:
            larger = min(second.unit_pages, most) / min(first.unit_pages, most)
            longest = max(larger * (1 - part) / part, part / (1 - part) / larger)
            assert max(turns) <= math.ceil(longest) + 1
    tuner.blend = NOTHING
    assert {tuner.next_method(0, most) for _ in range(9)} == {NONE}


def test_a_link_that_waits_may_be_faster_and_one_that_holds_up_is_as_it_is() -> None:
    assert next_belief(None, WAITED) == Belief(50, 50)
    assert next_belief(Belief(100, 100), replace(WAITED, rate=300)) == Belief(300, 300, 1)
    belief = next_belief(Belief(100, 100, 7), HELD_UP)
    assert 50 < belief.rate < 100 and not belief.waited
    for _ in range(10):
        belief = next_belief(belief, HELD_UP)
    assert belief.rate == pytest.approx(50, rel=0.01)
    # What is far too much is not believed for long.
    assert next_belief(Belief(5000, 5000), HELD_UP).rate == pytest.approx(52.5)


def test_a_link_that_goes_on_waiting_is_believed_to_be_faster_and_faster() -> None:
    steps = []
    belief = Belief(100, 1000)
    for _ in range(6):
        before = belief
        belief = next_belief(before, WAITED)
        steps.append(belief.rate / before.rate)
    assert belief.waited == 6 and 1 < steps[0] < 1.1
    assert all(b == pytest.approx(a * steps[0]) for a, b in itertools.pairwise(steps))
    assert next_belief(Belief(100, 1000, 99), WAITED).rate < 200
    for _ in range(3000):
        belief = next_belief(belief, WAITED)
    assert belief.rate == 3000  # thrice the best that was seen
    assert next_belief(belief, HELD_UP).rate == pytest.approx(52.5)


def test_what_has_waited_for_a_core_says_nothing_of_the_link() -> None:
    assert next_belief(Belief(100, 100), replace(HELD_UP, idle=0.0)) == next_belief(Belief(100, 100), WAITED)


@dataclass
class Host:
    """A lane, its workers, a link and the other end, in virtual time."""

    link: float
    shares: dict[str, float]
    rates: dict[str, float]
    workers: int = 2
    latency: float = 0.0005
    now: float = 0.0
    packed_seconds: float = 0.0
    used: list[tuple[float, Method]] = field(default_factory=list)

    def idle(self) -> float:
        return self.now * self.workers - self.packed_seconds

    def run(self, size: float, tuner: Tuner | Method) -> float:
        """Return how long it takes to send `size` bytes of pages."""
        self.packed_seconds = 0.0
        free = [0.0] * self.workers
        packing: deque[tuple[float, float, Method, float]] = deque()
        acks: list[tuple[float, int, float]] = []
        link_free = unpack_free = 0.0
        queue: deque[float] = deque()
        ahead = self.workers + 1
        left = size

        def tell(until: float) -> None:
            while acks and acks[0][0] <= until:
                at, pages, wire = heapq.heappop(acks)
                self.now = at
                if isinstance(tuner, Tuner):
                    tuner.applied(pages, int(wire))
            self.now = until

        def send(ready: float, pages: float, wire: float, method: Method = NONE) -> None:
            nonlocal link_free, unpack_free
            tell(max(self.now, ready))
            began = self.now
            if isinstance(tuner, Tuner):
                tuner.sending(int(pages / PAGE_SIZE), int(pages), method)
            while len(queue) > QUEUED:
                tell(max(self.now, queue.popleft()))
            link_free = max(link_free, self.now) + wire / self.link
            unpack_free = max(unpack_free, link_free) + pages / method.unpack_rate
            queue.append(unpack_free)
            heapq.heappush(acks, (unpack_free + self.latency, int(pages / PAGE_SIZE), wire))
            if isinstance(tuner, Tuner):
                tuner.held_up(self.now - began)

        for look in FIRST_LOOKS if isinstance(tuner, Tuner) else ():
            pages = look * PAGE_SIZE
            send(self.now, pages, pages)
            left -= pages
            tell(acks[0][0])
            if not tuner.look_first():
                break
        for _ in itertools.count():
            if left <= 0:
                break
            method = tuner.next_method(0, MAX_UNIT_PAGES) if isinstance(tuner, Tuner) else tuner
            self.used.append((self.now, method))
            pages = min(method.unit_pages * PAGE_SIZE, left)
            left -= pages
            if method is NONE:
                while packing:
                    self._finish(packing, send, tuner)
                send(self.now, pages, pages)
                continue
            heapq.heappush(free, heapq.heappop(free))
            begun = max(heapq.heappop(free), self.now)
            seconds = pages / self.rates[method.name]
            self.packed_seconds += seconds
            heapq.heappush(free, begun + seconds)
            packing.append((begun + seconds, pages, method, seconds))
            while sum(pages for _, pages, _, _ in packing) > ahead * LARGEST:
                self._finish(packing, send, tuner)
        while packing:
            self._finish(packing, send, tuner)
        return unpack_free

    def _finish(self, packing, send, tuner) -> None:  # type: ignore[no-untyped-def]
        ready, pages, method, seconds = packing.popleft()
        wire = pages * self.shares[method.name]
        if isinstance(tuner, Tuner):
            tuner.packed(method, int(pages), int(wire), seconds)
        send(ready, pages, wire, method)


def host(link: float, *, workers: int = 2, speed: float = 1.0, power: float = 1.0) -> Host:
    """A host whose codec is `speed` times as fast as the table says; its memory leaves the table's shares ** power."""
    shares = {method.name: method.share**power for method in METHODS}
    return Host(link, shares, {method.name: method.rate * speed for method in METHODS}, workers)


@pytest.mark.parametrize("speed", [0.4, 1.0, 2.0], ids=lambda speed: f"{speed} x as fast a codec")
@pytest.mark.parametrize("workers", [1, 4], ids=lambda workers: f"{workers} workers")
@pytest.mark.parametrize("link", [100 * MBIT, GBIT, 10 * GBIT, 40 * GBIT], ids=lambda link: f"{link / GBIT:g} Gbit/s")
@pytest.mark.parametrize("power", [0.05, 1.0], ids=lambda power: f"shares ** {power}")
def test_it_is_about_as_fast_as_the_best_fixed_method(link: float, workers: int, speed: float, power: float) -> None:
    size = 60 * min(link, GBIT)
    best = min(host(link, workers=workers, speed=speed, power=power).run(size, method) for method in METHODS)
    tuned = host(link, workers=workers, speed=speed, power=power)
    tuner = Tuner(workers=workers, lanes=1, clock=lambda: tuned.now, idle=tuned.idle)
    assert tuned.run(size, tuner) <= 1.1 * best


@pytest.mark.parametrize(("link", "workers", "speed"), [(GBIT, 1, 1.0), (GBIT, 2, 0.4), (2.5 * GBIT, 2, 1.0)])
def test_where_link_and_codec_meet_between_two_methods_it_is_faster_than_any(
    link: float, workers: int, speed: float
) -> None:
    size = 60 * GBIT
    best = min(host(link, workers=workers, speed=speed).run(size, method) for method in METHODS)
    tuned = host(link, workers=workers, speed=speed)
    tuner = Tuner(workers=workers, lanes=1, clock=lambda: tuned.now, idle=tuned.idle)
    assert tuned.run(size, tuner) < 0.95 * best


class Clock:
    """A lane that sends a batch ten times a second and is held up for half of the time, as a tuner sees it."""

    def __init__(self, busy_until: float = 0.0) -> None:
        self.now = 0.0
        self.tuner = Tuner(workers=2, lanes=1, clock=lambda: self.now, idle=lambda: 2 * max(self.now - busy_until, 0.0))

    def send(self, rate: float, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.tuner.sending(256, 256 * PAGE_SIZE, NONE)
            self.now += 0.05
            self.tuner.held_up(0.05)
            self.tuner.applied(256, int(rate / 20))
            self.now += 0.05


def test_what_cores_did_before_the_first_pages_says_nothing() -> None:
    clock = Clock(busy_until=10.0)  # while it was set up
    clock.now = 10.0
    clock.tuner.sending(64, 64 * PAGE_SIZE, NONE)
    clock.now += 64 * PAGE_SIZE / (100 * MBIT)
    clock.tuner.applied(64, 64 * PAGE_SIZE)
    assert not clock.tuner.look_first()
    assert strength(clock.tuner.blend) == pytest.approx(strength(chosen(100 * MBIT, cores=1)))
    clock.send(100 * MBIT, 3)
    assert clock.tuner._cores == pytest.approx(2, rel=0.01)


def test_what_an_outage_has_lost_is_not_under_way_any_more() -> None:
    clock = Clock()
    clock.send(10 * GBIT, 1)
    clock.tuner.sending(256, 256 * PAGE_SIZE, NONE)
    clock.now += 100
    clock.tuner.lost(256)
    for rate in (10 * GBIT, 100 * MBIT):
        clock.send(rate, 2)
        assert clock.tuner._link is not None and clock.tuner._link.rate == pytest.approx(rate, rel=0.06)


def test_it_follows_a_link_that_changes() -> None:
    tuned = host(GBIT)
    tuner = Tuner(workers=2, lanes=1, clock=lambda: tuned.now, idle=tuned.idle)
    for link, expected in (
        (100 * MBIT, {"zstd-6", "zstd-7"}),
        (40 * GBIT, {"none"}),
        (GBIT, {"zstd-1", "zstd-2", "zstd-3"}),
    ):
        tuned.link = link
        tuned.run(60 * min(link, GBIT), tuner)
        assert {method.name for _, method in tuned.used[-20:]} <= expected
