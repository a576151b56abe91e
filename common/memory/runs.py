"""Runs of pages: sets of page numbers as two int64 arrays, first pages and numbers of pages.

Every function takes and returns runs that ascend, do not overlap, and are not empty (`union` takes any order). Two
million scattered pages and a hole of a tebibyte are both small in this form, and nothing here loops in Python.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.memory.layout import CHUNK_PAGES

__all__ = ["Runs", "cut_at_chunks", "expand", "from_pages", "intersect", "one", "subtract", "total", "union"]

Runs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
_END = np.iinfo(np.int64).max


def one(first: int, count: int) -> Runs:
    """Return the run of `count` pages from `first`; nothing if `count` is 0."""
    size = 1 if count else 0
    return np.full(size, first, np.int64), np.full(size, count, np.int64)


def total(runs: Runs) -> int:
    """Return the number of pages."""
    return int(runs[1].sum())


def expand(runs: Runs) -> npt.NDArray[np.int64]:
    """Return every page number, ascending."""
    first, count = runs
    ends = np.cumsum(count)
    pages = np.arange(int(ends[-1]) if ends.size else 0, dtype=np.int64)
    pages += np.repeat(first - ends + count, count)
    return pages


def from_pages(pages: npt.NDArray[np.int64]) -> Runs:
    """Return the runs of page numbers that ascend strictly."""
    if not pages.size:
        return one(0, 0)
    cuts = np.flatnonzero(pages[1:] - pages[:-1] != 1) + 1
    edges = np.empty(cuts.size + 2, np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, cuts, pages.size
    return pages[edges[:-1]], edges[1:] - edges[:-1]


def intersect(a: Runs, b: Runs) -> Runs:
    """Return the pages that are in both; where runs of `a` touch, they stay apart."""
    a_first, a_end = a[0], a[0] + a[1]
    b_first, b_end = b[0], b[0] + b[1]
    low = np.searchsorted(b_end, a_first, "right")
    overlaps = np.maximum(np.searchsorted(b_first, a_end, "left") - low, 0)
    in_a = np.repeat(np.arange(a_first.size), overlaps)
    in_b = expand((low, overlaps))
    first = np.maximum(a_first[in_a], b_first[in_b])
    return first, np.minimum(a_end[in_a], b_end[in_b]) - first


def subtract(a: Runs, b: Runs) -> Runs:
    """Return the pages of `a` that are not in `b`."""
    first = np.concatenate(([0], b[0] + b[1]))
    count = np.concatenate((b[0], [_END])) - first
    filled = count > 0
    return intersect(a, (first[filled], count[filled]))


def union(*parts: Runs) -> Runs:
    """Return the pages that are in any of these, in as few runs as possible; the runs may come in any order."""
    first = np.concatenate((one(0, 0)[0], *(part[0] for part in parts)))
    if not first.size:
        return one(0, 0)
    order = np.argsort(first, kind="stable")
    first = first[order]
    reach = np.maximum.accumulate(first + np.concatenate([part[1] for part in parts])[order])
    starts = np.concatenate(([0], np.flatnonzero(first[1:] > reach[:-1]) + 1))
    ends = reach[np.append(starts[1:] - 1, reach.size - 1)]
    return first[starts], ends - first[starts]


def cut_at_chunks(runs: Runs) -> Runs:
    """Return the same pages in runs that do not cross a 2 MiB boundary."""
    first, count = runs
    chunks = first // CHUNK_PAGES
    pieces = (first + count - 1) // CHUNK_PAGES - chunks + 1
    run = np.repeat(np.arange(first.size), pieces)
    start = expand((chunks, pieces)) * CHUNK_PAGES
    piece_first = np.maximum(start, first[run])
    return piece_first, np.minimum(start + CHUNK_PAGES, (first + count)[run]) - piece_first
