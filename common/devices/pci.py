"""A PCI function's configuration space: type 0 header, BARs, interrupt pin, MSI-X capability.

It is what a VMM keeps and carries for a device, not part of the device's own state stream, as with kernel VFIO: who
moves a device and forgets it finds the device without bus mastering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.datasheets import pci
from common.devices.registers import RegisterBlock
from common.vfio.feature import Buffer

__all__ = ["COMMAND_BUS_MASTER", "COMMAND_MEMORY", "CONFIG_SIZE", "MSIX_PBA", "Bar", "ConfigSpace"]

CONFIG_SIZE = 256
MSIX_PBA = 0x800  # offset of the pending bits in the MSI-X BAR

_COMMAND = 0x04
COMMAND_MEMORY = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
_COMMAND_INTX_DISABLE = 1 << 10
_STATUS = 0x06
_STATUS_INTERRUPT = 1 << 3
_STATUS_CAPABILITIES = 1 << 4
_BAR_64 = 0x4
_BAR_PREFETCHABLE = 0x8
_CAPABILITIES = 0x34
_INTERRUPT_PIN = 0x3D
_INTA = 1
_MSIX = 0x40
_MSIX_ID = 0x11
_MSIX_ENABLE = 1 << 15
_MSIX_FUNCTION_MASK = 1 << 14


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory BAR: `size` in bytes is a power of two; a 64-bit one takes the next BAR's place too."""

    size: int
    wide: bool = False


class ConfigSpace:
    """The 256 bytes of configuration space of one of our devices."""

    def __init__(
        self,
        device_id: int,
        class_code: int,
        bars: Mapping[int, Bar],
        vectors: int,
        *,
        vendor_id: int = pci.VENDOR_ID,
        subsystem: tuple[int, int] | None = None,
        command: int = 0,
    ) -> None:
        """Lay it out for `vectors` of MSI-X, without that capability for none.

        `subsystem`: its vendor and ID, if they are not the device's own; `command`: that register after power-on.
        """
        self.vectors = vectors
        subsystem_vendor, subsystem_id = subsystem or (vendor_id, device_id)
        block = RegisterBlock(CONFIG_SIZE)
        block.define(0x00, 2, vendor_id)
        block.define(0x02, 2, device_id)
        block.define(_COMMAND, 2, command, mask=COMMAND_MEMORY | COMMAND_BUS_MASTER | _COMMAND_INTX_DISABLE)
        block.define(_STATUS, 2, _STATUS_CAPABILITIES if vectors else 0)
        block.define(0x08, 4, class_code << 8 | 1)  # revision 1
        block.define(0x0C, 1, mask=0xFF)  # cache line size: no effect in PCI Express, but writable
        block.define(0x2C, 2, subsystem_vendor)
        block.define(0x2E, 2, subsystem_id)
        block.define(0x3C, 1, mask=0xFF)  # interrupt line: the firmware's notebook
        block.define(_INTERRUPT_PIN, 1, _INTA)
        for index, bar in bars.items():
            # The low bits of an address are wired to zero: that is how software finds out a BAR's size.
            width = 8 if bar.wide else 4
            flags = _BAR_64 | _BAR_PREFETCHABLE if bar.wide else 0
            block.define(0x10 + 4 * index, width, flags, mask=(1 << 8 * width) - bar.size)
        if vectors:
            block.define(_CAPABILITIES, 1, _MSIX)
            block.define(_MSIX, 2, _MSIX_ID)
            block.define(_MSIX + 2, 2, vectors - 1, mask=_MSIX_ENABLE | _MSIX_FUNCTION_MASK)
            block.define(_MSIX + 4, 4, pci.MSIX_BAR)
            block.define(_MSIX + 8, 4, MSIX_PBA | pci.MSIX_BAR)
        self._block = block

    @property
    def bus_master(self) -> bool:
        """Whether the function may start DMA (PCI: Bus Master Enable)."""
        return bool(self._block.get(_COMMAND, 2) & COMMAND_BUS_MASTER)

    @property
    def intx_disabled(self) -> bool:
        """Whether the function must not assert its pin (PCI: Interrupt Disable)."""
        return bool(self._block.get(_COMMAND, 2) & _COMMAND_INTX_DISABLE)

    def show_interrupt(self, *, pending: bool) -> None:
        """Set or clear Interrupt Status, which says what the pin would say if it is not disabled."""
        self._block.change(_STATUS, 2, clear=_STATUS_INTERRUPT, put=_STATUS_INTERRUPT * pending)

    def read(self, offset: int, count: int) -> bytes:
        """Return part of it."""
        return self._block.read(offset, count)

    def write(self, offset: int, data: Buffer) -> None:
        """Write where it can be written, in any width, as a VMM does that restores all of it."""
        self._block.write_masked(offset, data)
