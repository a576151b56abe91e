"""What to ask of DMA logs: ranges for START, windows for REPORT. Pure functions of mappings and limits.

Two different things. START wants few ranges (kernel: at most 256), fixed for the session, that cover what will be
written; what they miss is dirty at every sync. REPORT wants few messages and small bitmaps for what is mapped now: a
48-bit aperture is one range to START, and would be 8 GiB of bitmap to REPORT.

No device says what it can log before START is tried, so a plan is a list of attempts, tried in order until the devices
accept one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.iommu.iova_tree import MappingArrays
from common.memory.layout import PAGE_SIZE
from common.vfio.feature import LOG_MAX_RANGES, Range

__all__ = [
    "MAX_BITMAP",
    "MAX_EXACT_BITMAP",
    "Attempt",
    "Coverage",
    "StartPlan",
    "Strategy",
    "aperture_sizes",
    "merge",
    "plan_start",
    "plan_windows",
]

Strategy = Literal["auto", "mapped", "minmax", "aperture"]

MAX_BITMAP = 4 << 20
"""Largest bitmap of one REPORT in bytes: 128 GiB of IOVA space, in some two milliseconds."""

MAX_EXACT_BITMAP = 16 << 20
"""Largest bitmap in bytes that is asked for where nothing but a whole mapping can be reported: 512 GiB."""

# A REPORT costs a round trip of some 70 µs to each device; in that time a bitmap grows by about 64 KiB of zeros.
_GAP = (64 << 10) * 8 * PAGE_SIZE
_UINT32_MAX = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Attempt:
    """Ranges to try START with; none: nothing is mapped yet, and nothing is started. `what` is for people."""

    ranges: tuple[Range, ...]
    what: str


@dataclass(frozen=True, slots=True)
class StartPlan:
    """Attempts in order, all different, at least one; and why these, in a sentence."""

    attempts: tuple[Attempt, ...]
    reason: str


class Coverage:
    """The union of armed ranges: what a log has seen.

    `exact` are devices that cannot be asked for more or less than a mapping. Then a mapping that shares one of their
    pages of `granule` bytes with another is not covered, because asking for one would clear the bits of both, and none
    whose bitmap would have more than `MAX_EXACT_BITMAP` bytes.
    """

    def __init__(self, ranges: Sequence[Range], *, exact: bool = False, granule: int = PAGE_SIZE) -> None:
        self.ranges = tuple(ranges)
        self._alignment = granule if exact else PAGE_SIZE
        self._largest = MAX_EXACT_BITMAP * 8 * PAGE_SIZE if exact else 1 << 62
        starts = np.array([item.iova for item in ranges], np.int64)
        merged = merge(starts, starts + np.array([item.length for item in ranges], np.int64), max(1, len(ranges)))
        self._starts = np.array([item.iova for item in merged], np.int64)
        self._ends = np.array([item.iova + item.length for item in merged], np.int64)

    def covers(self, iova: int, size: int) -> bool:
        """Whether all of [iova, iova + size) is covered (QEMU series patch 15: even partly untracked is untracked)."""
        return bool(self.mask(np.array([iova]), np.array([size]))[0])

    def mask(self, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell for each range whether all of it is covered."""
        if not len(self._starts):
            return np.zeros(len(starts), np.bool_)
        index = np.searchsorted(self._starts, starts, side="right") - 1
        inside = (index >= 0) & (starts + sizes <= self._ends[index])
        covered: NDArray[np.bool_] = inside & ((starts | sizes) % self._alignment == 0) & (sizes <= self._largest)
        return covered


def merge(starts: NDArray[np.int64], ends: NDArray[np.int64], limit: int) -> list[Range]:
    """Return at most `limit` (≥ 1) ranges that cover [starts, ends), ascending; the smallest gaps are closed first.

    Touching and overlapping ranges become one. (kernel: mlx5 combine_ranges.)
    """
    if not len(starts):
        return []
    order = np.argsort(starts)
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    gaps = starts[1:] - reach[:-1]
    cuts = np.flatnonzero(gaps > 0)
    if len(cuts) >= limit:
        largest = np.argpartition(gaps[cuts], len(cuts) - limit)[len(cuts) - limit + 1 :]
        cuts = np.sort(cuts[largest])
    first = starts[np.concatenate([[0], cuts + 1])].tolist()
    last = reach[np.concatenate([cuts, [len(reach) - 1]])].tolist()
    return [Range(start, end - start) for start, end in zip(first, last, strict=True)]


def aperture_sizes(max_iova: int | None, ram_size: int) -> list[int]:
    """Return sizes T of the range [0, T) to try, largest first, whole pages (QEMU series patch 15).

    The whole aperture, then 2^39 or half of it, then RAM or half of that; `max_iova` None: the vIOMMU does not tell.
    """
    sizes = [] if max_iova is None else [_align_up(max_iova)]
    retry = (1 << 39) - 1 if max_iova is None else min((1 << 39) - 1, max_iova // 2)
    sizes += [_align_up(retry), _align_up(min(ram_size, retry // 2))]
    return [size for size, _ in itertools.groupby(sizes)]


def plan_start(
    strategy: Strategy, arrays: MappingArrays, *, max_iova: int | None, ram_size: int, max_ranges: int = LOG_MAX_RANGES
) -> StartPlan:
    """Plan START for a container with these mappings; `max_iova` is the vIOMMU's last address, None without one.

    `mapped` logs exactly what is mapped writable, merged where there are more ranges than the devices take; `minmax`
    the span of mappings below 4 GiB, of those above, and of BARs above (QEMU: vfio_dirty_tracking_update_range);
    `aperture` the vIOMMU's whole space or part of it; `auto` the aperture if the devices accept one that holds all
    that is mapped now, else `mapped`.
    """
    if strategy == "mapped":
        return StartPlan(_mapped(arrays, max_ranges), "the mapped ranges were asked for")
    if strategy == "minmax":
        return StartPlan((_minmax(arrays),), "the spans of low, high and BAR mappings were asked for")
    apertures = tuple(_aperture(size) for size in aperture_sizes(max_iova, ram_size))
    if strategy == "aperture":
        return StartPlan(apertures, "the aperture was asked for")
    if max_iova is None:
        return StartPlan(_mapped(arrays, max_ranges), "without a vIOMMU the mappings never change")
    writable = arrays.ram_writable
    last = int(arrays.ends[writable].max()) if writable.any() else 0
    holding = tuple(attempt for attempt in apertures if attempt.ranges[0].length >= last)
    return StartPlan(
        holding + _mapped(arrays, max_ranges),
        f"behind a {(max_iova + 1).bit_length() - 1}-bit vIOMMU an aperture needs no arming again as the guest maps",
    )


def plan_windows(
    arrays: MappingArrays,
    coverage: Coverage,
    *,
    granule: int = PAGE_SIZE,
    arbitrary: bool = True,
    max_bitmap: int = MAX_BITMAP,
) -> list[Range]:
    """Plan the REPORTs of a sync: ranges that together hold every covered mapping of writable RAM, ascending.

    `granule` is the largest page size in bytes that a device logs with: windows are whole granules, for a report may
    clear the rest of one. A bitmap has a bit for 4 KiB and at most `max_bitmap` bytes. If all fits into one, it is one
    window (QEMU series patch 16); else gaps stay out that cost more than a message. If the devices take no `arbitrary`
    ranges, each mapping is a window, however large: what is too large for that is not covered.
    """
    wanted = arrays.ram_writable & coverage.mask(arrays.starts, arrays.sizes)
    starts, ends = arrays.starts[wanted], arrays.ends[wanted]
    if not len(starts):
        return []
    if not arbitrary:
        return [Range(start, end - start) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    starts, ends = starts // granule * granule, -(-ends // granule) * granule
    span = max(max_bitmap * 8 * PAGE_SIZE // granule, 1) * granule
    if int(ends[-1] - starts[0]) <= span:
        return [Range(int(starts[0]), int(ends[-1] - starts[0]))]
    cuts = np.flatnonzero(starts[1:] - ends[:-1] > _GAP)
    first = np.concatenate([[0], cuts + 1]).tolist()
    last = np.concatenate([cuts, [len(ends) - 1]]).tolist()
    windows: list[Range] = []
    for low, high in zip(first, last, strict=True):
        windows += _cut(starts[low : high + 1], ends[low : high + 1], span)
    return windows


def _cut(starts: NDArray[np.int64], ends: NDArray[np.int64], span: int) -> list[Range]:
    """Cut mappings into windows of at most `span` bytes, leaving out the gaps between windows."""
    windows = []
    at, end = int(starts[0]), int(ends[-1])
    while at < end:
        following = int(np.searchsorted(starts, at + span))
        stop = min(int(ends[following - 1]), at + span)
        windows.append(Range(at, stop - at))
        at = stop if stop < ends[following - 1] or following == len(starts) else max(stop, int(starts[following]))
    return windows


def _mapped(arrays: MappingArrays, max_ranges: int) -> tuple[Attempt, ...]:
    wanted = arrays.ram_writable
    starts, ends = arrays.starts[wanted], arrays.ends[wanted]
    attempts: list[Attempt] = []
    limit = max_ranges
    while True:
        ranges = tuple(merge(starts, ends, limit))
        if not attempts or attempts[-1].ranges != ranges:
            what = f"{len(starts)} mappings as {len(ranges)} ranges"
            attempts.append(Attempt(ranges, what))
        # Fewer ranges are larger in sum: a device may refuse the one as well as the other.
        if limit == 1 or len(ranges) <= 1:
            return tuple(attempts)
        limit = max(1, min(limit, len(ranges)) // 4)


def _minmax(arrays: MappingArrays) -> Attempt:
    writable, starts, ends = arrays.writable, arrays.starts, arrays.ends
    low = writable & (ends - 1 <= _UINT32_MAX)
    bars = writable & ~low & (arrays.pages < 0) & (starts >= _UINT32_MAX)
    groups = [group for group in (low, writable & ~low & ~bars, bars) if group.any()]
    spans = [Range(int(starts[group].min()), int(ends[group].max() - starts[group].min())) for group in groups]
    # A mapping across 4 GiB belongs to the upper span, which may then reach into the lower one; START takes no overlap.
    bounds = np.array([(item.iova, item.iova + item.length) for item in spans], np.int64).reshape(-1, 2)
    ranges = merge(bounds[:, 0], bounds[:, 1], max(1, len(spans)))
    return Attempt(tuple(ranges), f"{len(ranges)} spans of mappings")


def _aperture(size: int) -> Attempt:
    exact = size & (size - 1) == 0
    return Attempt((Range(0, size),), f"the aperture up to 2^{size.bit_length() - 1}" if exact else f"[0, {size:#x})")


def _align_up(address: int) -> int:
    aligned = -(-address // PAGE_SIZE) * PAGE_SIZE
    # 2^64 does not fit a range (QEMU series patch 15 drops the last page), nor 2^63 the arrays here.
    return aligned if aligned < 1 << 63 else (1 << 63) - PAGE_SIZE
