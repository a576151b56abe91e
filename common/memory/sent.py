"""What the other end has of each page, so that a page that is sent again costs less.

Of every page that goes through here a digest is kept, and of those that were sent more than once the contents too, as
far as there is room. A page that is dirty but has not changed then costs a bit; one that equals another page is named
by it; one of which little has changed is sent as the difference. All of that is said of the *copy* that is sent, never
of RAM, which changes meanwhile; and it holds because the other end applies a lane's batches in their order, so what is
referred to is there.

Digests are xxh3_128: 16 bytes for a page, 0.4 % of RAM. Two pages that differ and have the same digest would be a page
that is lost. xxh3 is no cryptographic hash, so a guest that wants this for its own memory may be able to bring it
about; verification would find it.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from common.memory.compression import MAX_UNIT_PAGES
from common.memory.layout import PAGE_SIZE
from common.memory.pages import PageBatch, flags, to_bits

__all__ = ["SentPages"]

# How many of the newest pages others may be equal to: 16 MiB of page numbers.
_MAX_NAMED = 1 << 22
# A page of which more words than this have changed goes whole.
_FEW_WORDS = PAGE_SIZE // 8 // 2

Numbers = npt.NDArray[np.int64]
Block = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


class SentPages:
    """The pages that one lane has sent in a session; its batches come here in the order in which they are sent."""

    def __init__(self, pages: int, cache_bytes: int) -> None:
        """Of `pages` pages keep digests, and contents up to `cache_bytes`; memory is taken as it is needed."""
        self._digests: npt.NDArray[np.uint64] = _zeros((pages, 2), np.uint64)
        self._named: npt.NDArray[np.uint32] = _zeros((min(1 << (pages - 1).bit_length(), _MAX_NAMED),), np.uint32)
        # Contents are a ring; what was sent longest ago makes room.
        self._contents: Block = _zeros((max(cache_bytes // PAGE_SIZE, MAX_UNIT_PAGES), PAGE_SIZE), np.uint8)
        self._owner = np.full(len(self._contents), -1, np.int64)
        # Of a page's contents, counted from 1; 0: they are not kept.
        self._place: npt.NDArray[np.uint32] = _zeros((pages,), np.uint32)
        self._next = 0
        self._empty = True

    def forget(self, batch: PageBatch) -> None:
        """Note that a batch is sent whose payload was not copied, so that nobody knows what is in it."""
        if not self._empty:
            self._forget(batch.numbers())

    def _forget(self, numbers: Numbers) -> None:
        # Only what is known is written to: of a sparse RAM most is not.
        known = numbers[self._digests[numbers].any(axis=1)]
        self._digests[known] = 0
        self._place[known] = 0

    def reduce(self, batch: PageBatch) -> None:
        """Take out of a batch that was copied, and not packed yet, what the other end has; remember the rest."""
        numbers = batch.numbers()
        zero = flags(batch.zero, numbers.size)
        if not self._empty:
            self._forget(numbers[zero])
        if not batch.payload:
            return
        self._empty = False
        held = numbers[~zero]
        block = np.frombuffer(batch.payload[0], np.uint8).reshape(-1, PAGE_SIZE)
        digests = _digests(block)
        unchanged: Flags = (self._digests[held] == digests).all(axis=1)
        name = (digests[:, 0] & np.uint64(self._named.size - 1)).astype(np.int64)
        namesake = self._named[name]
        equal: Flags = ~unchanged & (self._digests[namesake] == digests).all(axis=1)
        self._named[name[~equal]] = held[~equal]
        self._digests[held] = digests
        changed = ~unchanged
        delta = changed & ~equal & (self._place[held] > 0)
        if delta.any():
            difference = block[delta] ^ self._contents[self._place[held[delta]] - 1]
            few = np.count_nonzero(difference.view(np.uint64), axis=1) <= _FEW_WORDS
            delta[delta] = few
            difference = difference[few]
        if batch.round:
            self._keep(held[changed], block[changed])
        if unchanged.any() or equal.any() or delta.any():
            whole = changed & ~equal
            rest = block[whole]
            if delta.any():
                rest[delta[whole]] = difference
            batch.payload = (rest.reshape(-1).data,) if rest.size else ()
            batch.unchanged, batch.equal, batch.delta = (
                to_bits(_spread(found, zero)) if found.any() else b"" for found in (unchanged, equal, delta)
            )
            batch.equal_to = namesake[equal].astype(np.uint64)

    def _keep(self, numbers: Numbers, block: Block) -> None:
        """Keep the contents of pages."""
        places = (self._next + np.arange(numbers.size)) % len(self._contents)
        self._next = (self._next + numbers.size) % len(self._contents)
        before = self._owner[places]
        # Those that were here, unless their contents have been sent again since, and are elsewhere.
        self._place[before[(before >= 0) & (self._place[before] == places + 1)]] = 0
        self._contents[places] = block
        self._owner[places] = numbers
        self._place[numbers] = places + 1


def _zeros(shape: tuple[int, ...], kind: type[np.generic]) -> npt.NDArray[Any]:
    """Return zeros that take no memory until they are written to; what malloc has had before it would clear."""
    memory = mmap.mmap(-1, math.prod(shape) * kind(0).nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, kind).reshape(shape)


def _digests(block: Block) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, block)), np.uint64).reshape(-1, 2)


def _spread(found: Flags, zero: Flags) -> Flags:
    """Return what was found of the pages that are not zero as flags of all pages."""
    all_pages = np.zeros(zero.size, np.bool_)
    all_pages[~zero] = found
    return all_pages
