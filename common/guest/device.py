"""A device as guest software sees it: registers, doorbell, DMA mappings, interrupts.

Everything but the doorbell is a trap: a request to the machine process, which the vCPU waits for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from common.datasheets.pci import DOORBELL, REGISTERS_BAR
from common.ipc.channel import Client

__all__ = ["GuestDevice"]


@dataclass(frozen=True, slots=True)
class GuestDevice:
    """One device. A trap that the machine refuses raises `common.ipc.channel.RequestError`.

    `bars` maps an index to a guest physical address; `doorbell` and `interrupts` are eventfds. Without `viommu` the
    device's IOVAs are guest physical addresses, and nothing is mapped.
    """

    name: str
    kind: str
    container: str
    viommu: bool
    bars: Mapping[int, int]
    doorbell: int | None
    interrupts: tuple[int, ...]
    traps: Client

    def enable(self) -> None:
        """Turn on memory decoding, bus mastering and MSI-X; enabling again changes nothing."""
        self.traps.call("irq_enable", device=self.name)

    def reset(self) -> None:
        """Reset the device: it is as it was before anybody set it up, but what was mapped for it stays mapped."""
        self.traps.call("device_reset", device=self.name)

    def read(self, register: int, size: int = 4) -> int:
        """Return a register of 4 or 8 bytes."""
        return int(self.traps.call("mmio_read", gpa=self.bars[REGISTERS_BAR] + register, size=size)["value"])

    def write(self, register: int, value: int, size: int = 4) -> None:
        """Write a register of 4 or 8 bytes."""
        self.traps.call("mmio_write", gpa=self.bars[REGISTERS_BAR] + register, size=size, value=value)

    def read_bar(self, bar: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of a BAR; `ValueError` if another number of bytes comes."""
        data = bytes(self.traps.call("mmio_block_read", gpa=self.bars[bar] + offset, size=size).payload)
        if len(data) != size:
            raise ValueError(f"{self.name}: {size} bytes of BAR {bar} were asked for, {len(data)} came")
        return data

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        """Write to a BAR, any number of bytes."""
        self.traps.call("mmio_block_write", payload=data, gpa=self.bars[bar] + offset)

    def unmask(self) -> None:
        """Say that a level-triggered interrupt was handled; for others it changes nothing."""
        self.traps.call("irq_unmask", device=self.name)

    def ring_doorbell(self) -> None:
        """Tell the device that there is something in its ring."""
        if self.doorbell is None:
            self.write(DOORBELL, 1)
        else:
            os.eventfd_write(self.doorbell, 1)

    def map(self, iova: int, gpa: int, size: int) -> None:
        """Let the container's devices read and write [gpa, gpa + size) at `iova`: whole pages, RAM or a BAR."""
        self.traps.call(
            "iommu_map", container=self.container, iova=iova, gpa=gpa, size=size, readable=True, writable=True
        )

    def unmap(self, iova: int, size: int) -> None:
        """End a mapping. When this returns, no device writes through it any more and what it wrote is known."""
        self.traps.call("iommu_unmap", container=self.container, iova=iova, size=size)
