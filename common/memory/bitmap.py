"""Bitmaps of pages: little-endian uint64 words, bit n of the array is page n, bits past the last page are zero.

On dirty bits and who may write them. No bitmap of ours is written by two parties. Python and numpy have no atomic
read-and-clear, and a bitmap in shared memory that one process sets and another copies and then clears loses every bit
set between the copy and the clear; the page it stood for is never sent again. So a log is private to whoever marks
it, and is handed over by a request that its marking loop answers (as KVM_GET_DIRTY_LOG does). What comes out is
merged here, into the RAM bitmap of the migration, which has many writers in one process, a thread for each log, and
one lock for all of them: it is held for an OR of a few MiB at most. A reader takes the bitmap as a whole and leaves a
fresh one, so there is no moment at which a bit is copied but not cleared. The order is fixed on both sides: a writer
marks after it has written, a reader takes the bits first and reads the pages then. A page that changes in between is
sent twice; the other way round it would be lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from common.memory.runs import Runs

__all__ = [
    "DirtyBitmap",
    "Words",
    "check_size",
    "count",
    "empty",
    "page_blocks",
    "pages_of",
    "runs_of",
    "set_pages",
    "set_range",
    "used_words",
    "words_for",
]

Words = npt.NDArray[np.uint64]
_ONES = 0xFFFF_FFFF_FFFF_FFFF
# Words that are looked at together: 256 KiB, so that every pass but the first finds them in the cache.
_BLOCK = 1 << 15
# Words of which it is asked together whether any bit is set: most bitmaps of large machines are nearly empty, and then
# a pass over one costs no more than to read it.
_GROUP = 256


def words_for(pages: int) -> int:
    """Return the number of words of a bitmap of `pages` pages."""
    return (pages + 63) // 64


def empty(pages: int) -> Words:
    """Return a bitmap with no bit set."""
    return np.zeros(words_for(pages), np.uint64)


def _groups(words: Words) -> Words:
    """Return the words in rows of `_GROUP`; only if they are no whole number of rows it is a copy."""
    if short := -words.size % _GROUP:
        words = np.concatenate((words, np.zeros(short, np.uint64)))
    return words.reshape(-1, _GROUP)


def _used_groups(groups: Words) -> Iterator[tuple[npt.NDArray[np.int64], Words]]:
    """Yield the numbers of groups that have a bit, ascending, and these groups, a block of them at a time."""
    used = np.flatnonzero(np.bitwise_or.reduce(groups, axis=1))
    for at in range(0, used.size, _BLOCK // _GROUP):
        numbers = used[at : at + _BLOCK // _GROUP]
        first, last = int(numbers[0]), int(numbers[-1])
        yield numbers, groups[first : last + 1] if last - first + 1 == numbers.size else groups[numbers]


def used_words(words: Words) -> npt.NDArray[np.int64]:
    """Return the positions of the words that are not zero."""
    found = [np.empty(0, np.int64)]
    for numbers, used in _used_groups(_groups(words)):
        found.append(_positions(np.flatnonzero(used.reshape(-1) != 0), numbers))
    return np.concatenate(found)


def _positions(at: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where words stand in the bitmap that are at these places of the groups of these numbers."""
    return numbers[at // _GROUP] * _GROUP + at % _GROUP


def check_size(words: Words, pages: int) -> None:
    """Raise `ValueError` unless it is a bitmap of `pages` pages."""
    if words.shape != (words_for(pages),):
        raise ValueError(f"a bitmap of {pages} pages has {words_for(pages)} words, not {words.size}")


def count(words: Words) -> int:
    """Return the number of set bits."""
    return sum(int(np.bitwise_count(used).sum(dtype=np.int64)) for _, used in _used_groups(_groups(words)))


def pages_of(words: Words) -> npt.NDArray[np.int64]:
    """Return the page numbers of the set bits, ascending."""
    pages = np.empty(count(words), np.int64)
    filled = 0
    for found in page_blocks(words):
        pages[filled : filled + found.size] = found
        filled += found.size
    return pages


def page_blocks(words: Words) -> Iterator[npt.NDArray[np.int64]]:
    """Yield what `pages_of` returns in parts of at most two million pages; a bitmap without bits yields none."""
    for numbers, used in _used_groups(_groups(words)):
        yield _bits_of(used, numbers)


def _bits_of(groups: Words, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the numbers of the bits that are set in the groups of these numbers."""
    words = groups.reshape(-1)
    # As booleans, for which numpy has a search of its own: five times as fast as with the same bytes as numbers.
    used = np.flatnonzero(words != 0)
    bits = np.flatnonzero(np.unpackbits(words[used].view(np.uint8), bitorder="little").view(np.bool_))
    return (_positions(used[bits >> 6], numbers) << 6) + (bits & 63)


def runs_of(words: Words) -> Runs:
    """Return the runs of set bits as (first, count).

    The cost is that of reading the bitmap once, and then of its runs, however long they are.
    """
    firsts: list[npt.NDArray[np.int64]] = []
    lasts: list[npt.NDArray[np.int64]] = []
    groups = _groups(words)
    # A bit starts a run if its lower neighbour is clear, and ends one if its upper neighbour is; the neighbours of a
    # word's outermost bits are in the words beside it.
    for numbers, used in _used_groups(groups):
        below, above = np.empty_like(used), np.empty_like(used)
        below[:, 1:], below[:, 0] = used[:, :-1], groups[numbers - 1, -1]
        above[:, :-1], above[:, -1] = used[:, 1:], groups[(numbers + 1) % len(groups), 0]
        if not numbers[0]:
            below[0, 0] = 0
        if numbers[-1] == len(groups) - 1:
            above[-1, -1] = 0
        firsts.append(_bits_of(used & ~(used << np.uint64(1) | below >> np.uint64(63)), numbers))
        lasts.append(_bits_of(used & ~(used >> np.uint64(1) | above << np.uint64(63)), numbers))
    if not firsts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    first = np.concatenate(firsts)
    return first, np.concatenate(lasts) - first + 1


def set_pages(words: Words, pages: npt.NDArray[np.int64]) -> None:
    """Set the bits of page numbers, in any order, duplicates allowed; `IndexError` if one is outside the bitmap."""
    if not pages.size:
        return
    low, high = int(pages.min()) >> 6, (int(pages.max()) >> 6) + 1
    if low < 0 or high > words.size:
        raise IndexError(f"a page is outside the bitmap of {words.size * 64} pages")
    if pages.size < high - low:
        np.bitwise_or.at(words, pages >> 6, np.uint64(1) << (pages & 63).astype(np.uint64))
        return
    # Where there are many, a byte for each page of the span costs less than a read-modify-write for each bit.
    flags = np.zeros((high - low) * 64, np.bool_)
    flags[pages - (low << 6)] = True
    words[low:high] |= np.packbits(flags, bitorder="little").view(np.uint64)


def set_range(words: Words, first: int, pages: int) -> None:
    """Set the bits of `pages` pages from `first`; `IndexError` if one is outside the bitmap."""
    end = first + pages
    if first < 0 or pages < 0 or end > words.size * 64:
        raise IndexError(f"pages {first} to {end} are not all in the bitmap of {words.size * 64} pages")
    if not pages:
        return
    low, high = first >> 6, (end - 1) >> 6
    head, tail = _ONES << (first & 63) & _ONES, _ONES >> (63 - (end - 1 & 63))
    if low == high:
        words[low] |= np.uint64(head & tail)
        return
    words[low] |= np.uint64(head)
    words[low + 1 : high] = _ONES
    words[high] |= np.uint64(tail)


class DirtyBitmap:
    """The RAM bitmap of a migration: every log is merged into it, and it is taken as a whole.

    Any thread may call any method. Page numbers outside RAM are refused (`IndexError`): a bit that cannot be placed
    must not get lost.
    """

    __slots__ = ("_lock", "_words", "pages")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._lock = threading.Lock()
        self._words = empty(pages)

    def mark_range(self, first: int, pages: int) -> None:
        """Mark `pages` pages from `first`."""
        if first < 0 or pages < 0 or first + pages > self.pages:
            raise IndexError(f"pages {first} to {first + pages} are not all among {self.pages} pages")
        with self._lock:
            set_range(self._words, first, pages)

    def mark_pages(self, pages: npt.NDArray[np.int64]) -> None:
        """Mark page numbers, in any order, duplicates allowed."""
        if pages.size and (int(pages.min()) < 0 or int(pages.max()) >= self.pages):
            raise IndexError(f"a page is not among {self.pages} pages")
        with self._lock:
            set_pages(self._words, pages)

    def take(self) -> Words:
        """Return what was marked since the last call; it belongs to the caller."""
        fresh = empty(self.pages)
        with self._lock:
            taken, self._words = self._words, fresh
        return taken
