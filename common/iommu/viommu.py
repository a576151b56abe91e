"""The IOMMU that the guest sees: one address space per container, an address width, faults.

It holds no locks and does no I/O: a container drives its own address space under its own locks, and puts what the guest
maps here into the devices.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from common.iommu.iova_tree import IovaTree, Piece

__all__ = ["ADDRESS_WIDTHS", "Fault", "Viommu"]

# What intel-iommu offers as aw-bits.
ADDRESS_WIDTHS = (39, 48)
_KEPT_FAULTS = 256


class Fault(NamedTuple):
    """A DMA access that was refused; `time` is the clock's, in seconds."""

    container: str
    iova: int
    size: int
    write: bool
    time: float
    reason: str


class Viommu:
    """A virtual IOMMU of 39 or 48 address bits (ValueError for others)."""

    def __init__(self, address_width: int = 48, *, clock: Callable[[], float] = time.monotonic) -> None:
        if address_width not in ADDRESS_WIDTHS:
            raise ValueError(
                f"address width {address_width}: a vIOMMU has {' or '.join(map(str, ADDRESS_WIDTHS))} bits"
            )
        self.address_width = address_width
        self._clock = clock
        self._domains: dict[str, IovaTree] = {}
        # A guest or device that faults without end must not fill our memory: the last ones are kept, all are counted.
        self.faults: deque[Fault] = deque(maxlen=_KEPT_FAULTS)
        self.fault_count = 0

    @property
    def max_iova(self) -> int:
        """Last IOVA of every address space (QEMU series patches 13 and 14: IOMMU_ATTR_MAX_IOVA)."""
        return (1 << self.address_width) - 1

    def domain(self, container: str) -> IovaTree:
        """Return the mappings of a container, which refuse what lies beyond `max_iova`."""
        return self._domains.setdefault(container, IovaTree(self.max_iova))

    def translate(self, container: str, iova: int, size: int, *, write: bool) -> list[Piece]:
        """Return where an access goes; if it must not, record a fault and raise OSError EFAULT."""
        try:
            return self.domain(container).translate(iova, size, write=write)
        except OSError as error:
            self.faults.append(Fault(container, iova, size, write, self._clock(), error.strerror or ""))
            self.fault_count += 1
            raise
