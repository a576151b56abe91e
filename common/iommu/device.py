"""What a container asks of devices, of guest RAM and of its machine.

`DmaDevice` is the part of a VFIO device that concerns DMA; a vfio-user connection has it. Every request fails with an
OSError that carries an errno.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from common.iommu.iova_tree import BarTarget
from common.memory.bitmap import Words
from common.memory.layout import Layout
from common.vfio.feature import Range

__all__ = ["DMA_READ", "DMA_WRITE", "DmaDevice", "IommuDirtyDevice", "Memory", "PeerBars"]

DMA_READ: Final = 1 << 0
"""The device may read (kernel: VFIO_DMA_MAP_FLAG_READ)."""

DMA_WRITE: Final = 1 << 1
"""The device may write (kernel: VFIO_DMA_MAP_FLAG_WRITE)."""


class DmaDevice(Protocol):
    """A device that does DMA; addresses and sizes are in bytes."""

    @property
    def name(self) -> str:
        """Its name in the machine."""

    def dma_map(self, iova: int, size: int, flags: int, fd: int | None, offset: int) -> None:
        """Let it access [iova, iova + size): memory of `fd` at `offset`, or without one by messages."""

    def dma_unmap(self, iova: int, size: int, *, bitmap: bool) -> Words | None:
        """Take that back; the answer comes after its last access there is done and logged.

        With `bitmap`, return what it wrote there since it was last asked (one bit for 4 KiB), and forget it; None if it
        does not take requests for that, in which case it has unmapped all the same.
        """

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        """Start its log; return the page size that it uses."""

    def logging_stop(self) -> None:
        """Stop its log and lose what was logged."""

    def logging_report(self, iova: int, length: int, page_size: int) -> Words:
        """Return and clear what was logged: bit n for the page at iova + n * page_size."""


@runtime_checkable
class IommuDirtyDevice(Protocol):
    """A device behind an IOMMU that keeps dirty bits of all that is mapped, apart from the device's own log."""

    def iommu_dirty_start(self, page_size: int) -> int:
        """Start to keep bits; return the page size in bytes that is used."""

    def iommu_dirty_stop(self) -> None:
        """Stop and lose them."""

    def iommu_dirty_report(self, iova: int, length: int, page_size: int) -> Words:
        """Return and clear the bits of mappings in [iova, iova + length)."""


class Memory(Protocol):
    """Guest RAM (common.memory.ram.GuestRam)."""

    fd: int
    layout: Layout
    bytes: NDArray[np.uint8]


class PeerBars(Protocol):
    """BARs of the machine's devices, as targets of the DMA of others."""

    def find(self, gpa: int, size: int) -> BarTarget | None:
        """Return the BAR that all of [gpa, gpa + size) lies in, if any."""

    def region_read(self, device: str, bar: int, offset: int, size: int) -> bytes:
        """Read from a BAR."""

    def region_write(self, device: str, bar: int, offset: int, data: memoryview) -> None:
        """Write to a BAR."""
