"""writer: dirties a region of RAM at a rate, and checks every page before it writes it again.

Half of finding a lost page is looking soon: after each pause the whole region is read, a bit at a time, beside the
writing. Pages that were never written are not read: reading a hole would allocate it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.guest.programs.pages import Cursor, PageContent
from common.guest.programs.program import NEVER, Area, Moment, Program, in_ram
from common.memory.layout import PAGE_SIZE

__all__ = ["Writer", "WriterKnobs"]

BATCH = 160  # pages for a step: with first touches at up to 13 µs each that is 2 ms
SWEEP = 256  # pages checked for a step
MAX_WAIT_NS = 20_000_000
PAGE_COST = PAGE_SIZE * 1_000_000_000  # in bytes per second times nanoseconds
HOT_SHARE = 10  # hotspot: one page in 10 gets 9 writes in 10
PATTERNS = ("sequential", "random", "hotspot")


@dataclass(frozen=True, slots=True)
class WriterKnobs:
    """`rate` in bytes of dirtied pages per second, 0 for none; the region in bytes, whole pages."""

    region_gpa: int
    region_size: int
    pattern: str = "sequential"
    rate: int = 50_000_000

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, not {self.pattern!r:.40}")
        if not 0 <= self.rate <= 100 * 10**9:
            raise ValueError(f"rate must be 0 to 100 GB/s, not {self.rate}")
        if self.region_gpa % PAGE_SIZE or self.region_size % PAGE_SIZE or self.region_size < HOT_SHARE * PAGE_SIZE:
            raise ValueError(f"the region must be whole pages, {HOT_SHARE} at least")


@in_ram
class WriterState(ctypes.LittleEndianStructure):
    """How far each cursor is; writes are counted in pages."""

    written: int  # by the first cursor
    hot_written: int  # by the second: the hot pages
    credit: int  # what may be written, in PAGE_COST for a page
    run_ns: int  # of the last step
    run: int
    sweep: int  # the next page to look at after a pause
    pages: int
    checked: int


class Writer(Program[WriterState]):
    """`wrong pages` among its errors are lost ones: what a page showed, and what it must be."""

    COUNTERS = ("pages", "checked")

    def __init__(self, name: str, area: Area, knobs: WriterKnobs) -> None:
        super().__init__(name, area, WriterState)
        region = self.memory.view(knobs.region_gpa, knobs.region_size)
        self._first_page = self.memory.page_of(knobs.region_gpa)
        self._content = PageContent(region.view("<u8").reshape(-1, PAGE_SIZE // 8))
        self._pages = knobs.region_size // PAGE_SIZE
        self._rate = knobs.rate
        hot = self._pages // HOT_SHARE if knobs.pattern == "hotspot" else 0
        self._cursor = Cursor(hot, self._pages - hot, scattered=knobs.pattern != "sequential")
        self._hot = Cursor(0, hot, scattered=True) if hot else None

    def begin(self, moment: Moment) -> None:
        """Begin with no credit, and nothing to sweep."""
        self.state.run_ns = moment.run_ns
        self.state.run = moment.run
        self.state.sweep = self._pages

    def step(self, moment: Moment) -> int:
        """Write what the rate allows by now, after checking it; look at a few more pages after a pause."""
        state = self.state
        if state.run != moment.run:
            state.run, state.sweep = moment.run, 0
        if state.sweep < self._pages:
            self._sweep()
        # Credit grows with the time that the vCPU has run, so a throttled guest dirties less, and a pause is no debt.
        elapsed = max(0, moment.run_ns - state.run_ns)
        state.credit = min(state.credit + elapsed * self._rate, 4 * BATCH * PAGE_COST)
        state.run_ns = moment.run_ns
        due = min(state.credit // PAGE_COST, BATCH)
        if due:
            state.credit -= self._write(due) * PAGE_COST
        if state.sweep < self._pages:
            return moment.now_ns
        if not self._rate:
            return NEVER
        until_batch = (BATCH * PAGE_COST - state.credit) // self._rate
        return moment.now_ns + max(0, min(until_batch, MAX_WAIT_NS))

    def _write(self, pages: int) -> int:
        state = self.state
        hot = 0
        if self._hot is not None and pages > 1:
            cold_share = -(-pages // HOT_SHARE)
            hot = self._write_at(self._hot, state.hot_written, pages - cold_share)
            state.hot_written += hot
            pages = cold_share
        cold = self._write_at(self._cursor, state.written, pages)
        state.written += cold
        state.pages += hot + cold
        return hot + cold

    def _write_at(self, cursor: Cursor, written: int, limit: int) -> int:
        pages, sequence = cursor.batch(written, limit)
        if sequence > 1:
            self._check(pages, sequence - 1)
        self._content.write(pages, sequence)
        self.memory.mark_pages(self._first_page + pages)
        return int(pages.size)

    def _sweep(self) -> None:
        state = self.state
        end = min(state.sweep + SWEEP, self._pages)
        parts = [(self._cursor, state.written)]
        if self._hot is not None:
            parts.append((self._hot, state.hot_written))
        for cursor, written in parts:
            low, high = max(state.sweep, cursor.first), min(end, cursor.first + cursor.count)
            if low >= high:
                continue
            pages = np.arange(low, high, dtype=np.int64)
            sequences = cursor.sequences(pages, written)
            for sequence in np.unique(sequences).tolist():
                if sequence:
                    self._check(pages[sequences == sequence], sequence)
        state.sweep = end

    def _check(self, pages: npt.NDArray[np.int64], sequence: int) -> None:
        self.state.checked += int(pages.size)
        for page in self._content.wrong(pages, sequence).tolist():
            shown = self._content.describe(page)
            self.error(f"wrong page {self._first_page + page} of RAM: it {shown}, not at sequence {sequence}")
