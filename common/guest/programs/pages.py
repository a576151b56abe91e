"""What the writer writes: pages whose content follows from their number and how often they were written.

A page of 512 words is: head (page number and key, sequence), 7 parts of 72 words, padding, and a tail that repeats the
sequence. A write replaces head, tail and one part, in turn, by text or numbers; so a page changes a little at a time,
compresses as real memory does, and tells at once whether it, or a part of it, is older than it must be.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from common.memory.layout import PAGE_SIZE

__all__ = ["Cursor", "PageContent"]

Pages = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

WORDS = PAGE_SIZE // 8
PARTS = 7
PART = 72
FIRST_PART = 4
TAIL = WORDS - 1
ROWS = 1024
_KEY = 0x5752_4954_0000_0000
_VOCABULARY = (
    b"page memory device queue bitmap switch host guest copy dirty round stream block vector ring table bridge "
    b"lane clock mapping window region record state transfer buffer the of and to in that is for it with as on by"
)


def _pool() -> Words:
    """Return rows of one part each: text in even rows, numbers of a few digits in odd ones."""
    random = np.random.Generator(np.random.Philox(0x5752))
    words = [word + b" " for word in _VOCABULARY.split()]
    size = ROWS // 2 * PART * 8
    text = b"".join(words[index] for index in random.integers(0, len(words), size // 3).tolist())[:size]
    pool = np.empty((ROWS, PART), np.uint64)
    pool[0::2] = np.frombuffer(text, "<u8").reshape(-1, PART)
    pool[1::2] = random.integers(0, 1_000_000, (ROWS // 2, PART), np.uint64)
    return pool


class Cursor:
    """An endless order in which `count` pages from `first` are written: lap after lap, each page once a lap.

    Write number n goes to one page; after n writes the sequence of a page is the number of laps that have passed it.
    """

    __slots__ = ("_inverse", "_stride", "count", "first")

    def __init__(self, first: int, count: int, *, scattered: bool) -> None:
        self.first = first
        self.count = count
        # Scattered: steps of about the golden ratio, which visit all pages if the step has no divisor in common.
        self._stride = 1
        if scattered:
            self._stride = max(1, int(count * 0.618))
            while math.gcd(self._stride, count) != 1:
                self._stride -= 1
        self._inverse = pow(self._stride, -1, count) if count > 1 else 0

    def batch(self, written: int, limit: int) -> tuple[Pages, int]:
        """Return the pages of up to `limit` writes after the first `written`, none twice, and their sequence."""
        lap, start = divmod(written, self.count)
        order = np.arange(start, min(start + limit, self.count), dtype=np.int64)
        pages: Pages = self.first + order * self._stride % self.count
        return pages, lap + 1

    def sequences(self, pages: Pages, written: int) -> Words:
        """Return the sequences that pages must have after `written` writes; 0 if never written."""
        lap, start = divmod(written, self.count)
        order = (pages - self.first) * self._inverse % self.count
        return np.where(order < start, lap + 1, lap).astype(np.uint64)


class PageContent:
    """Writes and checks pages of a region, an array of 512 words for each page."""

    __slots__ = ("_pool", "_region")

    def __init__(self, region: Words) -> None:
        self._region = region
        self._pool = _pool()

    def write(self, pages: Pages, sequence: int) -> None:
        """Bring pages to a sequence, provided that they are at the one before."""
        start = FIRST_PART + sequence % PARTS * PART
        self._region[pages, start : start + PART] = self._rows(pages, sequence)
        self._region[pages, 0] = pages.astype(np.uint64) | np.uint64(_KEY)
        self._region[pages, 1] = sequence
        self._region[pages, TAIL] = sequence

    def wrong(self, pages: Pages, sequence: int) -> Pages:
        """Return those pages that are not what they must be at a sequence from 1."""
        start = FIRST_PART + sequence % PARTS * PART
        region = self._region
        good = region[pages, 0] == pages.astype(np.uint64) | np.uint64(_KEY)
        good &= (region[pages, 1] == sequence) & (region[pages, TAIL] == sequence)
        good &= (region[pages, start : start + PART] == self._rows(pages, sequence)).all(axis=1)
        wrong: Pages = pages[~good]
        return wrong

    def describe(self, page: int) -> str:
        """Return what a page shows, for people."""
        head, sequence, tail = (int(self._region[page, word]) for word in (0, 1, TAIL))
        if not (head or sequence or tail):
            return "is empty"
        if head != page | _KEY:
            return "holds something else"
        return f"is at sequence {sequence}" + (f", its tail at {tail}" if tail != sequence else "")

    def _rows(self, pages: Pages, sequence: int) -> Words:
        rows: Words = np.take(self._pool, (pages * 37 + sequence * 101) % ROWS, axis=0)
        return rows
