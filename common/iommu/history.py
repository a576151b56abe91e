"""Who could have written a page: which mappings led to it, and when. Read when a page turns out to differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from common.iommu.iova_tree import Mapping
from common.memory.layout import PAGE_SIZE

__all__ = ["Interval", "MappingHistory"]

_FIRST_ROWS = 1024
_ROW = np.dtype([("page", "i8"), ("pages", "i8"), ("iova", "i8"), ("since", "f8"), ("until", "f8")])


class Interval(NamedTuple):
    """A time in which devices could write a page at `iova`; in the clock's seconds.

    `since` None: before the recording began; `until` None: to this day.
    """

    iova: int
    since: float | None
    until: float | None


class MappingHistory:
    """Writable mappings of RAM since a moment, the last `capacity` that are gone and all that are there.

    Locked by its owner. A guest that maps and unmaps all day long must not fill our memory, hence the limit;
    `forgotten` says how many were dropped.
    """

    def __init__(self, mapped: Iterable[Mapping], *, clock: Callable[[], float], capacity: int = 1 << 20) -> None:
        """Start to record; `mapped` is there already."""
        self._clock = clock
        self._capacity = capacity
        self._rows = np.zeros(min(_FIRST_ROWS, capacity), _ROW)
        self._closed = 0
        self._open: dict[int, tuple[Mapping, float]] = {m.iova: (m, np.nan) for m in mapped if _counts(m)}

    @property
    def forgotten(self) -> int:
        """How many mappings were dropped to make room."""
        return max(0, self._closed - self._capacity)

    def opened(self, mapping: Mapping) -> None:
        """Note a new mapping."""
        if _counts(mapping):
            self._open[mapping.iova] = (mapping, self._clock())

    def closed(self, mapping: Mapping) -> None:
        """Note that a mapping is gone."""
        known = self._open.pop(mapping.iova, None)
        if known is None:
            return
        if self._closed == len(self._rows) < self._capacity:
            self._rows = np.concatenate([self._rows, np.zeros(len(self._rows), _ROW)])[: self._capacity]
        self._rows[self._closed % self._capacity] = (*_place(mapping), known[1], self._clock())
        self._closed += 1

    def of_page(self, page: int) -> list[Interval]:
        """Return every interval in which a RAM page could be written, those that are over first, oldest first."""
        start = self._closed % self._capacity if self._closed > self._capacity else 0
        rows = np.roll(self._rows, -start)[: min(self._closed, self._capacity)]
        hits = rows[(rows["page"] <= page) & (page < rows["page"] + rows["pages"])]
        found = [
            Interval(iova + (page - first) * PAGE_SIZE, None if np.isnan(since) else since, until)
            for first, _, iova, since, until in hits.tolist()
        ]
        for mapping, since in self._open.values():
            if mapping.ram_page <= page < mapping.ram_page + mapping.pages:
                iova = mapping.iova + (page - mapping.ram_page) * PAGE_SIZE
                found.append(Interval(iova, None if np.isnan(since) else since, None))
        return found


def _counts(mapping: Mapping) -> bool:
    return mapping.writable and mapping.ram_page >= 0


def _place(mapping: Mapping) -> tuple[int, int, int]:
    return mapping.ram_page, mapping.pages, mapping.iova
