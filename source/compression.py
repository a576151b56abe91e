"""How to compress what comes next: a pure function of what the link, the codec and the cores have shown.

Packing, the link and unpacking are three stages side by side, and the slowest of them sets the pace. A method that
leaves less of the pages makes the link faster and the codec slower; the best is where they meet. That is mostly between
two methods, so some pages are packed with one of them and the others with the other, in turns: link and codec are busy
at once then, where one method for a while and then the other would let the one and then the other wait.

A link that had to wait for the codec may carry more than was seen of it, so it is believed to be faster, by more each
time in a row; one that kept the codec waiting has shown what it carries, unless no core was idle: then what sends was
kept waiting for a core, and to compress more would make that worse.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from common.memory.compression import LZ4, MAX_UNIT_PAGES, METHODS, NONE, Method
from common.memory.layout import PAGE_SIZE

__all__ = ["AS_IN_TABLE", "NOTHING", "Belief", "Blend", "Link", "Pages", "choose", "next_belief", "next_pages"]

# Within this of the best the one that takes the least CPU is as good.
AS_GOOD = 0.985
# A link that waited may be faster: by so much, and each time that it does so again by so much more; at most it is so
# many times as fast as the best that was ever seen of it.
OPTIMISM, MOST_TIMES, MOST_HOPE = 1.02, 32, 3.0
# With fewer idle cores than this, what sends may have waited for a core.
FEW_IDLE = 0.05
# How much a new measurement counts; but a link that has held us up even once is not believed to carry much more.
WEIGHT, MOST_DOUBT = 0.5, 1.05
# The other end is given no more to unpack than for so much of its time; what it holds up tells nothing of the link.
MOST_UNPACKING = 0.8
# How much the largest unit counts that was packed last; others in proportion.
LAST = 0.4


@dataclass(frozen=True, slots=True)
class Pages:
    """How pages differ from those that the table of methods was measured with.

    What a method leaves of them is its share to the power of `power`: what leaves all of them does so with every
    method. To pack them takes `slowness` times as long.
    """

    power: float
    slowness: float


AS_IN_TABLE = Pages(1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Blend:
    """Of `part` of the pages, from 0 to 1, the second method, of the others the first."""

    first: Method
    second: Method
    part: float

    @property
    def name(self) -> str:
        """What people are told."""
        if 0 < self.part < 1:
            return f"{self.first.name} and {self.second.name}"
        return self.second.name if self.part else self.first.name


NOTHING = Blend(NONE, NONE, 0.0)


@dataclass(frozen=True, slots=True)
class Link:
    """What was seen of the link while anything was under way.

    `rate` is bytes per second; `held_up` the share of the time in which we waited for it, `unpacking` the share that
    the other end is thought to have needed for unpacking, `idle` how many cores were idle.
    """

    rate: float
    held_up: float
    idle: float
    unpacking: float = 0.0


@dataclass(frozen=True, slots=True)
class Belief:
    """What the link is believed to carry.

    `rate` is bytes per second, `best` the most that was seen, `waited` how often in a row it seems to have waited.
    """

    rate: float
    best: float
    waited: int = 0


def next_belief(before: Belief | None, seen: Link) -> Belief:
    """Return what the link is believed to carry after this was seen of it."""
    if before is None:
        return Belief(seen.rate, seen.rate)
    best = max(before.best, seen.rate)
    if seen.held_up >= 0.5 and seen.unpacking < MOST_UNPACKING and seen.idle >= FEW_IDLE:
        return Belief(min(before.rate + WEIGHT * (seen.rate - before.rate), MOST_DOUBT * seen.rate), best)
    waited = before.waited + 1
    hoped = min(before.rate * OPTIMISM ** min(waited, MOST_TIMES), MOST_HOPE * best)
    return Belief(max(hoped, seen.rate), best, waited)


def next_pages(before: Pages, method: Method, size: int, share: float, rate: float) -> Pages:
    """Return how pages differ, after `size` bytes were packed to this share at so many bytes per second of a core."""
    weight = LAST * size / (MAX_UNIT_PAGES * PAGE_SIZE)
    # Bytes are averaged, not powers: of what one method leaves, whichever it was.
    leaves = LZ4.share ** (math.log(share) / math.log(method.share))
    known = LZ4.share**before.power
    return Pages(
        math.log(known + weight * (leaves - known)) / math.log(LZ4.share),
        before.slowness + weight * (method.rate / rate - before.slowness),
    )


def choose(link: float, pages: Pages, *, cores: float, lanes: int) -> Blend:
    """Return how to pack what comes next, with so many cores that have nothing else to do."""
    alone = [_stages(method, link, pages, cores, lanes) for method in METHODS]
    choices = [(alone[0], NOTHING)]
    # Neighbours only: a batch that is much slower to pack than the others would hold up those behind it.
    for first, second in itertools.pairwise(range(1, len(METHODS))):
        part = _meeting(alone[first], alone[second])
        choices.append((_mix(alone[first], alone[second], part), Blend(METHODS[first], METHODS[second], part)))
    fastest = min(max(stages) for stages, _ in choices)
    good = (choice for choice in choices if AS_GOOD * max(choice[0]) <= fastest)
    return min(good, key=lambda choice: choice[0].packing)[1]


class _Stages(NamedTuple):
    """What a byte of pages takes in each stage, in seconds: the slowest one sets the pace."""

    link: float
    packing: float
    unpacking: float


def _stages(method: Method, link: float, pages: Pages, cores: float, lanes: int) -> _Stages:
    return _Stages(
        method.share**pages.power / link,
        pages.slowness / (method.rate * cores),
        1 / (method.unpack_rate * lanes * MOST_UNPACKING),
    )


def _mix(first: _Stages, second: _Stages, part: float) -> _Stages:
    return _Stages(*(one + part * (other - one) for one, other in zip(first, second, strict=True)))


def _meeting(first: _Stages, second: _Stages) -> float:
    """Return which part of the pages the second method is for, so that the link is as slow as the slower end."""

    def part(one: float, other: float) -> float:
        # From the first to the second, of which less is left, the link becomes faster and an end slower.
        closing = (first.link - second.link) + (other - one)
        return (first.link - one) / closing if closing > 0 else 0.0

    meets = min(part(first.packing, second.packing), part(first.unpacking, second.unpacking))
    return min(max(meets, 0.0), 1.0)
