"""The driver's side of a descriptor ring, and the buffers that its entries point to.

Request n of a driver uses entry n % entries of the ring and buffer n % buffers. There are more buffers than entries:
when a request is finished its buffer is kept, and looked at once more before request n + buffers takes it. So there is
always a window of pages that were written by a device and must come through a migration as they are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.datasheets.pci import RING_HEADER
from common.guest.device import GuestDevice
from common.guest.memory import GuestMemory
from common.guest.programs.iova import IovaAllocator
from common.guest.programs.program import Area
from common.memory.layout import PAGE_SIZE

__all__ = ["Buffers", "Ring"]


class Ring:
    """A ring of `entries` entries (a power of two) in guest RAM; counts are free-running."""

    __slots__ = ("_memory", "_view", "entries", "gpa", "size", "table")

    def __init__(self, area: Area, kind: np.dtype[np.void], entries: int) -> None:
        self.entries = entries
        self.size = -(-(RING_HEADER + entries * kind.itemsize) // PAGE_SIZE) * PAGE_SIZE
        self.gpa = area.take(self.size)
        self._memory = area.memory
        self._view = self._memory.view(self.gpa, self.size)
        self.table: npt.NDArray[np.void] = self._view[RING_HEADER : RING_HEADER + entries * kind.itemsize].view(kind)

    def slots(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the indexes of entries number `first` and following."""
        return (first % self.entries + np.arange(count)) % self.entries

    def finished(self, first: int, count: int, field: str) -> int:
        """Return how many of `count` entries from number `first` are finished, in order: their `field` is not 0."""
        # Copied first: the device writes to it.
        pending = np.flatnonzero(self.table[field][self.slots(first, count)] == 0)
        return int(pending[0]) if pending.size else count

    def clear(self) -> None:
        """Make it empty."""
        self._view[:] = 0
        self._memory.mark(self.gpa, self.size)

    def publish(self, tail: int) -> None:
        """Let the device see all entries before number `tail`, which have been written."""
        self._view[:4].view("<u4")[0] = tail & 0xFFFF_FFFF
        self._memory.mark(self.gpa, self.size)

    @property
    def tail(self) -> int:
        """What `publish` left, modulo 2^32."""
        return int(self._view[:4].view("<u4")[0])


class Buffers:
    """`count` buffers of `size` bytes, each in pages of its own, and the IOVA of each."""

    def __init__(self, area: Area, device: GuestDevice, iovas: IovaAllocator, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self._span = -(-size // PAGE_SIZE) * PAGE_SIZE
        self._device = device
        self._allocator = iovas
        self._memory: GuestMemory = area.memory
        self._table = area.array(count, "<u8")
        self._base = area.take(count * self._span)
        self._content = self._memory.view(self._base, count * self._span).data

    @property
    def iovas(self) -> npt.NDArray[np.uint64]:
        """The IOVA of each buffer; do not write to it."""
        return self._table.data

    def begin(self) -> None:
        """Begin with no buffer mapped."""
        self._table.data[:] = 0
        self._table.mark()

    def map(self, buffer: int) -> None:
        """Map a buffer for the first time."""
        iova = self.gpa(buffer)
        if self._device.viommu:
            iova = self._allocator.move(self._span, self._table.data[:buffer])
            self._device.map(iova, self.gpa(buffer), self._span)
        self._table.data[buffer] = iova
        self._table.mark()

    def remap(self, buffer: int, *, reuse: bool) -> None:
        """Unmap a buffer and map it at another address: one that another buffer had, if `reuse`, else a new one."""
        old = int(self._table.data[buffer])
        self._device.unmap(old, self._span)
        new = self._allocator.reuse() if reuse else None
        if new is None:
            new = self._allocator.move(self._span, self._table.data)
        self._device.map(new, self.gpa(buffer), self._span)
        self._table.data[buffer] = new
        self._table.mark()
        self._allocator.free(old)

    def gpa(self, buffer: int) -> int:
        """Return where a buffer is."""
        return self._base + buffer * self._span

    def read(self, buffer: int, size: int) -> bytes:
        """Return what a buffer begins with."""
        if size > self.size:
            raise ValueError(f"{size} bytes do not fit into a buffer of {self.size}")
        start = buffer * self._span
        return self._content[start : start + size].tobytes()

    def write(self, buffer: int, data: bytes) -> None:
        """Put `data` at the start of a buffer."""
        if len(data) > self.size:
            raise ValueError(f"{len(data)} bytes do not fit into a buffer of {self.size}")
        self._memory.write(self.gpa(buffer), data)
