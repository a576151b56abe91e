"""IOVAs as an operating system gives them out: from the top of 32 bits downwards (kernel: alloc_iova).

Freed addresses come back before the new ones run out, as they do from a kernel's magazines: then an IOVA that meant
one page means another one a moment later, which is what tells a log that is translated too late.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.guest.programs.program import Area
from common.memory.layout import PAGE_SIZE

__all__ = ["TOP", "WINDOW", "IovaAllocator"]

TOP = 0xFFF0_0000
WINDOW = 128 << 20  # for each driver of a container
MSI_START, MSI_END = 0xFEE0_0000, 0xFEF0_0000  # a write here is an interrupt, so x86 IOMMUs reserve it
KEPT = 32


class IovaAllocator:
    """Addresses of [top - WINDOW, top), all state in guest RAM; the window must hold far more than is in use."""

    def __init__(self, area: Area, top: int) -> None:
        self._top = top
        self._table = area.array(3 + KEPT, "<u8")  # where the next one ends, where to begin again, how many are free
        self._free = self._table.data[3:]

    def begin(self) -> None:
        """Begin with the whole window."""
        self._table.data[:] = 0
        self._table.data[:2] = self._top
        self._table.mark()

    def allocate(self, size: int) -> int:
        """Return address space of `size` bytes that stays in use for good; call this before any `move`."""
        iova = self._below(int(self._table.data[0]), size)
        self._table.data[:2] = iova
        self._table.mark()
        return iova

    def move(self, size: int, busy: npt.NDArray[np.uint64]) -> int:
        """Return new address space; `busy` are the addresses in use, each of `size` bytes, whole pages, like this."""
        free = self._free[: int(self._table.data[2])]
        taken = np.concatenate((busy, free)).astype(np.int64)
        end = int(self._table.data[0])
        for _ in range(taken.size + 2):
            if end - size < self._top - WINDOW:
                end = int(self._table.data[1])
            iova = self._below(end, size)
            overlapping = (taken < iova + size) & (taken + size > iova)
            if not overlapping.any():
                self._table.data[0] = iova
                self._table.mark()
                return iova
            end = int(taken[overlapping].min())
        raise ValueError("no IOVA is free")

    def reuse(self) -> int | None:
        """Return the address that has been free for longest; None if there is none."""
        free = int(self._table.data[2])
        if not free:
            return None
        iova = int(self._free[0])
        self._free[:-1] = self._free[1:].copy()
        self._table.data[2] = free - 1
        self._table.mark()
        return iova

    def free(self, iova: int) -> None:
        """Give an address back; if there are enough to be used again, it is forgotten."""
        free = int(self._table.data[2])
        if free < KEPT:
            self._free[free] = iova
            self._table.data[2] = free + 1
            self._table.mark()

    def _below(self, end: int, size: int) -> int:
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        return (MSI_START if end > MSI_START and end - size < MSI_END else end) - size
