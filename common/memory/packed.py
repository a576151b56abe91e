"""Bitmaps of pages on their way between processes: what is set, and nothing else.

A log of 1 TiB has 32 MiB, nearly all of it zeros. It is packed by whoever took it; every later look at it costs as much
as is set in it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.memory import bitmap, runs
from common.memory.bitmap import Words
from common.memory.runs import Runs

__all__ = ["PackedBitmap", "union"]

_HEADER = struct.Struct("<QQ")  # words of the bitmap, words that follow
# One word in so many: from there on it takes less time to go over the whole bitmap than to sort and to look up.
_FEW = 64


@dataclass(frozen=True, slots=True, eq=False)
class PackedBitmap:
    """A bitmap of `pages` pages as the `words` that are not zero, at these `positions`, ascending.

    `positions` None: `words` is all of them, where positions would save nothing.
    """

    pages: int
    words: Words
    positions: npt.NDArray[np.uint32] | None

    @classmethod
    def of(cls, words: Words, pages: int) -> PackedBitmap:
        """Pack the bitmap; it may share the words."""
        bitmap.check_size(words, pages)
        used = bitmap.used_words(words)
        if 3 * used.size >= 2 * words.size:
            return cls(pages, words, None)
        return cls(pages, words[used], used.astype(np.uint32))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, pages: int) -> PackedBitmap:
        """Read what `to_bytes` has made, without a copy; `ValueError` unless it is a bitmap of `pages` pages."""
        view = memoryview(data)
        if view.nbytes < _HEADER.size:
            raise ValueError(f"a packed bitmap of {view.nbytes} bytes")
        total, given = _HEADER.unpack_from(view)
        if total != bitmap.words_for(pages):
            raise ValueError(f"a bitmap of {pages} pages has {bitmap.words_for(pages)} words, not {total}")
        whole = given == total
        if given > total or view.nbytes != _HEADER.size + (8 if whole else 12) * given:
            raise ValueError(f"{given} words of a packed bitmap in {view.nbytes} bytes")
        words = np.frombuffer(view, "<u8", given, _HEADER.size)
        positions = None if whole else np.frombuffer(view, "<u4", given, _HEADER.size + 8 * given)
        if positions is not None and not _is_ascending(positions, total):
            raise ValueError("the words of a packed bitmap are not in order")
        packed = cls(pages, words, positions)
        if pages % 64 and packed._word(total - 1) >> pages % 64:
            raise ValueError(f"a bitmap of {pages} pages has a bit set past the last one")
        return packed

    def to_bytes(self) -> bytes:
        """Return the number of words of the bitmap and of those that follow as `<QQ`, these as `<u8`, the positions.

        Positions are `<u4`, and left out if all words follow.
        """
        positions = b"" if self.positions is None else self.positions.astype("<u4").tobytes()
        header = _HEADER.pack(bitmap.words_for(self.pages), self.words.size)
        return header + self.words.astype("<u8", copy=False).tobytes() + positions

    def count(self) -> int:
        """Return the number of set bits."""
        return int(np.bitwise_count(self.words).sum(dtype=np.int64))

    def has(self, page: int) -> bool:
        """Return whether the bit of a page is set."""
        return bool(self._word(page // 64) >> page % 64 & 1)

    def runs(self) -> Runs:
        """Return the runs of set bits."""
        if self.positions is None:
            return bitmap.runs_of(self.words)
        if self.words.size > bitmap.words_for(self.pages) // _FEW:
            words = bitmap.empty(self.pages)
            self.add_to(words)
            return bitmap.runs_of(words)
        bits = bitmap.pages_of(self.words)
        return runs.from_pages((self.positions.astype(np.int64)[bits >> 6] << 6) + (bits & 63))

    def add_to(self, words: Words) -> None:
        """Set its bits in a bitmap of as many pages."""
        if self.positions is None:
            words |= self.words
        else:
            words[self.positions] |= self.words

    def _word(self, number: int) -> int:
        if self.positions is None:
            return int(self.words[number])
        at = int(np.searchsorted(self.positions, number))
        return int(self.words[at]) if at < self.positions.size and self.positions[at] == number else 0


def _is_ascending(positions: npt.NDArray[np.uint32], total: int) -> bool:
    return not positions.size or bool(positions[-1] < total and (positions[1:] > positions[:-1]).all())


def union(bitmaps: Iterable[PackedBitmap], pages: int) -> PackedBitmap:
    """Return the pages of any of these bitmaps of `pages` pages."""
    parts = list(bitmaps)
    for packed in parts:
        if packed.pages != pages:
            raise ValueError(f"a bitmap of {packed.pages} pages among those of {pages}")
    sparse = [(packed.positions, packed.words) for packed in parts if packed.positions is not None]
    given = sum(words.size for _, words in sparse)
    if len(sparse) < len(parts) or given > bitmap.words_for(pages) // _FEW:
        merged = bitmap.empty(pages)
        for packed in parts:
            packed.add_to(merged)
        return PackedBitmap.of(merged, pages)
    found = np.concatenate([np.empty(0, np.uint32), *(positions for positions, _ in sparse)])
    positions, places = np.unique(found, return_inverse=True)
    words = np.zeros(positions.size, np.uint64)
    np.bitwise_or.at(words, places, np.concatenate([np.empty(0, np.uint64), *(words for _, words in sparse)]))
    return PackedBitmap(pages, words, positions)
