"""The mappings of one device address space, ordered by IOVA.

Two views of the same mappings: a sorted tree that answers one address in O(log n) while the guest maps and unmaps, and
arrays that translate a whole dirty bitmap at once. The arrays are gathered from slots that each change keeps up to
date, so a change costs the same with ten mappings as with a hundred thousand, and a snapshot after thousands of changes
is one sort in numpy.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedDict

from common.memory.layout import PAGE_SIZE

__all__ = ["MAX_MAPPINGS", "BarTarget", "IovaTree", "Mapping", "MappingArrays", "Piece", "RamTarget"]

# A guest chooses how much it maps; what it costs us is bounded. (kernel: vfio_iommu_type1 dma_entry_limit is 65535.)
MAX_MAPPINGS = 1 << 20
_FIRST_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class RamTarget:
    """Guest RAM: `offset` in bytes in the RAM memfd."""

    offset: int


@dataclass(frozen=True, slots=True)
class BarTarget:
    """A BAR of a device (peer-to-peer): `offset` in bytes in region `bar` of the device called `device`."""

    device: str
    bar: int
    offset: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """What devices find at [iova, iova + size), in bytes; `gpa` is where the guest sees the same."""

    iova: int
    size: int
    gpa: int
    target: RamTarget | BarTarget
    readable: bool = True
    writable: bool = True

    @property
    def end(self) -> int:
        """First IOVA after the mapping."""
        return self.iova + self.size

    @property
    def pages(self) -> int:
        """Length in pages of 4 KiB."""
        return self.size // PAGE_SIZE

    @property
    def ram_page(self) -> int:
        """First RAM page number, or -1 if it is no RAM."""
        return self.target.offset // PAGE_SIZE if isinstance(self.target, RamTarget) else -1


class Piece(NamedTuple):
    """A part of an access that lies in one mapping: `offset` and `size` in bytes from the mapping's start."""

    mapping: Mapping
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class MappingArrays:
    """All mappings at a moment, ascending by IOVA; never changed afterwards.

    `starts` and `sizes` are int64 bytes, `pages` is the first RAM page number as int64 (-1: a BAR), `writable` is bool;
    all have the same length.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    pages: NDArray[np.int64]
    writable: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def ends(self) -> NDArray[np.int64]:
        """First IOVA after each mapping."""
        ends: NDArray[np.int64] = self.starts + self.sizes
        return ends

    @property
    def ram_writable(self) -> NDArray[np.bool_]:
        """Which mappings let devices write to guest RAM."""
        return self.writable & (self.pages >= 0)


class IovaTree:
    """Non-overlapping mappings (QEMU series patches 6 to 8). Not locked: its owner says who may touch it when."""

    def __init__(self, max_iova: int = (1 << 63) - 1) -> None:
        """`max_iova` is the last IOVA that may be mapped; bit 63 is never (QEMU: vfio_listener_valid_section)."""
        self.max_iova = max_iova
        self._by_iova: Any = SortedDict()
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []
        # A slot with size 0 is free.
        self._starts = np.zeros(_FIRST_SLOTS, np.int64)
        self._sizes = np.zeros(_FIRST_SLOTS, np.int64)
        self._pages = np.zeros(_FIRST_SLOTS, np.int64)
        self._writable = np.zeros(_FIRST_SLOTS, np.bool_)
        self._arrays: MappingArrays | None = None

    def __len__(self) -> int:
        return len(self._by_iova)

    def __iter__(self) -> Iterator[Mapping]:
        """Iterate ascending by IOVA."""
        return iter(self._by_iova.values())

    def insert(self, mapping: Mapping) -> None:
        """Add a mapping.

        OSError: EINVAL if it is empty, not aligned to pages, beyond `max_iova` or without any permission; EEXIST if it
        overlaps another; ENOSPC if there are `MAX_MAPPINGS` already.
        """
        self._check(mapping.iova, mapping.size)
        if mapping.target.offset < 0 or mapping.target.offset % PAGE_SIZE:
            raise OSError(errno.EINVAL, f"mapping at IOVA {mapping.iova:#x} leads to offset {mapping.target.offset:#x}")
        if not (mapping.readable or mapping.writable):
            raise OSError(errno.EINVAL, f"mapping at IOVA {mapping.iova:#x} can neither be read nor written")
        if (other := next(self.overlapping(mapping.iova, mapping.size), None)) is not None:
            raise OSError(
                errno.EEXIST,
                f"IOVA {mapping.iova:#x} size {mapping.size:#x} overlaps the mapping at {other.iova:#x} "
                f"size {other.size:#x}",
            )
        if len(self) >= MAX_MAPPINGS:
            raise OSError(errno.ENOSPC, f"{MAX_MAPPINGS} mappings exist already")
        slot = self._free.pop() if self._free else len(self._slot_of)
        if slot == len(self._starts):
            self._grow()
        self._starts[slot] = mapping.iova
        self._sizes[slot] = mapping.size
        self._pages[slot] = mapping.ram_page
        self._writable[slot] = mapping.writable
        self._slot_of[mapping.iova] = slot
        self._by_iova[mapping.iova] = mapping
        self._arrays = None

    def remove(self, iova: int, size: int) -> list[Mapping]:
        """Remove every mapping inside [iova, iova + size) and return them; as `contained`, OSError EINVAL included."""
        gone = self.contained(iova, size)
        for mapping in gone:
            del self._by_iova[mapping.iova]
            slot = self._slot_of.pop(mapping.iova)
            self._sizes[slot] = 0
            self._free.append(slot)
        if gone:
            self._arrays = None
        return gone

    def contained(self, iova: int, size: int) -> list[Mapping]:
        """Return the mappings inside [iova, iova + size), ascending.

        OSError EINVAL if the range is none or would split a mapping (kernel: vfio_dma_do_unmap, type1 v2 rules).
        """
        self._check(iova, size)
        inside = list(self.overlapping(iova, size))
        for mapping in inside[:1] + inside[-1:]:
            if mapping.iova < iova or mapping.end > iova + size:
                raise OSError(
                    errno.EINVAL,
                    f"IOVA {iova:#x} size {size:#x} would split the mapping at {mapping.iova:#x} "
                    f"size {mapping.size:#x}",
                )
        return inside

    def find(self, iova: int) -> Mapping | None:
        """Return the mapping that contains an address."""
        start = next(self._by_iova.irange(maximum=iova, reverse=True), None)
        if start is None:
            return None
        mapping: Mapping = self._by_iova[start]
        return mapping if iova < mapping.end else None

    def overlapping(self, iova: int, size: int) -> Iterator[Mapping]:
        """Iterate over the mappings that share a byte with [iova, iova + size), ascending."""
        first = self.find(iova)
        if first is not None:
            yield first
        for start in self._by_iova.irange(minimum=iova + 1, maximum=iova + size - 1):
            yield self._by_iova[start]

    def foreach(self, visit: Callable[[Mapping], bool]) -> None:
        """Call `visit` for each mapping, ascending, until it returns true (QEMU series patch 7)."""
        for mapping in self:
            if visit(mapping):
                return

    def translate(self, iova: int, size: int, *, write: bool) -> list[Piece]:
        """Return where an access of `size` bytes goes, in order.

        OSError EFAULT if any byte is not mapped, or not for this direction.
        """
        pieces: list[Piece] = []
        position = iova
        while position < iova + size:
            mapping = self.find(position)
            if mapping is None:
                raise OSError(errno.EFAULT, f"IOVA {position:#x} is not mapped")
            if not (mapping.writable if write else mapping.readable):
                raise OSError(errno.EFAULT, f"IOVA {position:#x} must not be {'written' if write else 'read'}")
            offset = position - mapping.iova
            length = min(mapping.size - offset, iova + size - position)
            pieces.append(Piece(mapping, offset, length))
            position += length
        return pieces

    def arrays(self) -> MappingArrays:
        """Return all mappings as arrays; kept until the next change. 100 000 mappings take a few milliseconds."""
        if self._arrays is None:
            live = np.flatnonzero(self._sizes)
            order = live[np.argsort(self._starts[live])]
            self._arrays = MappingArrays(
                self._starts[order], self._sizes[order], self._pages[order], self._writable[order]
            )
            for array in (self._arrays.starts, self._arrays.sizes, self._arrays.pages, self._arrays.writable):
                array.flags.writeable = False
        return self._arrays

    def _check(self, iova: int, size: int) -> None:
        if size <= 0 or iova < 0 or (iova | size) % PAGE_SIZE or iova + size - 1 > self.max_iova:
            raise OSError(
                errno.EINVAL,
                f"IOVA {iova:#x} size {size:#x}: must be whole pages of {PAGE_SIZE} bytes up to {self.max_iova:#x}",
            )

    def _grow(self) -> None:
        more = len(self._starts)
        self._starts = np.concatenate([self._starts, np.zeros(more, np.int64)])
        self._sizes = np.concatenate([self._sizes, np.zeros(more, np.int64)])
        self._pages = np.concatenate([self._pages, np.zeros(more, np.int64)])
        self._writable = np.concatenate([self._writable, np.zeros(more, np.bool_)])
