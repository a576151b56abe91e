"""From the bits of a DMA log to pages of guest RAM.

A device reports IOVAs. What they lead to is said by the mappings in force when the report was made, never by identity
(QEMU series patches 12 and 16): the caller makes sure that `arrays` and `words` belong together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common import hooks
from common.iommu.iova_tree import MappingArrays
from common.memory import runs
from common.memory.bitmap import DirtyBitmap, page_blocks
from common.memory.layout import PAGE_SIZE

__all__ = ["DirtyPages", "dirty_ram_pages", "mark_runs"]

# Pages translated at a time: bounds the temporary arrays to some 50 MB however large and dirty the bitmap is.
_SLICE_PAGES = 1 << 20
# Runs from here on are set one by one, as whole words; shorter ones all together, page by page.
_LONG_RUN = 2048


class DirtyPages(NamedTuple):
    """What a bitmap says: RAM page numbers (int64, not unique), pages that lead to BARs, and pages that lead nowhere.

    Bits on BARs are only counted: a BAR moves with its device. Bits on unmapped IOVAs belong to mappings that are gone,
    whose pages were collected when they went.
    """

    pages: NDArray[np.int64]
    bar_hits: int
    unmapped: int


def dirty_ram_pages(words: NDArray[np.uint64], base_iova: int, page_size: int, arrays: MappingArrays) -> DirtyPages:
    """Translate a bitmap in which bit n stands for [base_iova + n * page_size, … + page_size).

    `base_iova` and `page_size` are multiples of 4 KiB; a bit of a larger page size is as many RAM pages, each looked up
    by itself, for they may belong to different mappings.
    """
    if base_iova % PAGE_SIZE or page_size % PAGE_SIZE or page_size <= 0:
        raise ValueError(f"bitmap at IOVA {base_iova:#x} with pages of {page_size:#x} is not made of 4 KiB pages")
    factor = page_size // PAGE_SIZE
    step = max(1, _SLICE_PAGES // factor)
    found: list[NDArray[np.int64]] = []
    bar_hits = unmapped = 0
    first_pages = arrays.starts // PAGE_SIZE
    end_pages = arrays.ends // PAGE_SIZE - (not hooks.guarded("last-page-of-slot"))
    slices = (block[at : at + step] for block in page_blocks(words) for at in range(0, len(block), step))
    for bits in slices:
        iova_pages = bits * factor + base_iova // PAGE_SIZE
        if factor > 1:
            iova_pages = (iova_pages[:, None] + np.arange(factor)).ravel()
        if not len(arrays):
            unmapped += len(iova_pages)
            continue
        index = np.searchsorted(first_pages, iova_pages, side="right") - 1
        # Index -1 (before the first mapping) wraps to the last one, whose end says nothing: hence the second condition.
        hit = (iova_pages < end_pages[index]) & (index >= 0)
        unmapped += len(hit) - int(np.count_nonzero(hit))
        index = index[hit]
        targets = arrays.pages[index]
        ram = targets >= 0
        bar_hits += len(ram) - int(np.count_nonzero(ram))
        pages = targets + (iova_pages[hit] - first_pages[index])
        found.append(pages[ram])
    return DirtyPages(np.concatenate(found) if found else np.empty(0, np.int64), bar_hits, unmapped)


def mark_runs(dirty: DirtyBitmap, first: NDArray[np.int64], count: NDArray[np.int64]) -> int:
    """Mark runs of RAM pages, in any order, overlapping or not; return how many distinct pages they are.

    Made for both ends: a few runs of gigabytes, and a hundred thousand of one page.
    """
    merged = runs.union((first, count))
    long = merged[1] >= _LONG_RUN
    for run_first, run_count in zip(merged[0][long].tolist(), merged[1][long].tolist(), strict=True):
        dirty.mark_range(run_first, run_count)
    dirty.mark_pages(runs.expand((merged[0][~long], merged[1][~long])))
    return runs.total(merged)
