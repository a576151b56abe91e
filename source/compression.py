"""How to compress what comes next: a pure function of what the link, the codec and the cores have shown.

Packing, the link and unpacking are three stages side by side, and the slowest of them sets the pace. A method that
leaves less of the pages makes the link faster and the codec slower; the best is where they meet. A link that had to
wait for the codec may carry more than was seen of it, so it is believed to be faster, by more each time in a row; one
that kept the codec waiting has shown what it carries, unless no core was idle: then what sends was kept waiting for a
core, and to compress more would make that worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.memory.compression import METHODS, Method

__all__ = ["Belief", "Link", "Speed", "choose", "next_belief", "pace"]

# Better by less than this is not worth a change.
HYSTERESIS = 1.05
# Within this of the best the one that takes the least CPU is as good.
AS_GOOD = 0.985
# A link that waited may be faster: by so much, and each time that it does so again by so much more; at most it is so
# many times as fast as the best that was ever seen of it.
OPTIMISM, MOST_TIMES, MOST_HOPE = 1.02, 32, 3.0
# With fewer idle cores than this, what sends may have waited for a core.
FEW_IDLE = 0.05
# How much a new measurement counts; but a link that has held us up even once is not believed to carry much more.
WEIGHT, MOST_DOUBT = 0.5, 1.05


@dataclass(frozen=True, slots=True)
class Speed:
    """What a method has shown lately: the share that it leaves, and bytes of pages per second of a core."""

    share: float
    rate: float


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
    if seen.held_up >= 0.5 and seen.unpacking < 0.8 and seen.idle >= FEW_IDLE:
        return Belief(min(before.rate + WEIGHT * (seen.rate - before.rate), MOST_DOUBT * seen.rate), best)
    waited = before.waited + 1
    hoped = min(before.rate * OPTIMISM ** min(waited, MOST_TIMES), MOST_HOPE * best)
    return Belief(max(hoped, seen.rate), best, waited)


def pace(method: Method, link: float, speed: Speed, *, cores: float, lanes: int) -> float:
    """Return the bytes of pages per second that a method leads to."""
    return min(link / speed.share, speed.rate * cores, method.unpack_rate * lanes)


def choose(current: Method, link: float, last: tuple[Method, Speed] | None, *, cores: float, lanes: int) -> Method:
    """Return the method for what comes next, with so many cores that have nothing else to do.

    `last` is what was packed last. The others are taken to differ from it as they did when the table was measured: what
    they have shown themselves they have shown with other pages, some of which are three times as small as others.
    """
    paces = [pace(method, link, _expected(method, last), cores=cores, lanes=lanes) for method in METHODS]
    best = max(paces)
    if paces[METHODS.index(current)] * HYSTERESIS >= best:
        return current
    return next(method for method, rate in zip(METHODS, paces, strict=True) if rate >= AS_GOOD * best)


def _expected(method: Method, last: tuple[Method, Speed] | None) -> Speed:
    if last is None:
        return Speed(method.share, method.rate)
    known, speed = last
    # Shares go together as powers do: what leaves all of the pages does so with every method.
    power = math.log(speed.share) / math.log(known.share)
    return Speed(method.share**power, method.rate * speed.rate / known.rate)
