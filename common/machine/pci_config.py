"""PCI configuration space as a VMM sees it: where capabilities are, what a guest has written and must find again.

Pure functions of the bytes, of which there are as many as a PCI device must have. A VMM keeps this for a device, as it
is no part of the device's own state (contract M7).
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = [
    "COMMAND",
    "MAX_SIZE",
    "MIN_SIZE",
    "MSI",
    "MSIX",
    "MSIX_ENABLE",
    "MSI_ENABLE",
    "Register",
    "capability",
    "guest_registers",
]

MIN_SIZE: Final = 64  # kernel: PCI_STD_HEADER_SIZEOF
MAX_SIZE: Final = 4096  # kernel: PCI_CFG_SPACE_EXP_SIZE
COMMAND: Final = 0x04
COMMAND_MEMORY: Final = 1 << 1
COMMAND_BUS_MASTER: Final = 1 << 2
MSI: Final = 0x05
MSI_ENABLE: Final = 1 << 0
MSIX: Final = 0x11
MSIX_ENABLE: Final = 1 << 15
PCI_EXPRESS: Final = 0x10

_STATUS = 0x06
_STATUS_CAPABILITIES = 1 << 4
_CAPABILITIES = 0x34
_MAX_CAPABILITIES = 48  # as many as fit; a chain that loops ends here
_MSI_64 = 1 << 7
_MSI_MASKABLE = 1 << 8
_PLAIN = ((0x0C, 1), (0x0D, 1), (0x3C, 1), (0x30, 4))  # cache line size, latency, interrupt line, ROM
_BARS = tuple((0x10 + 4 * index, 4) for index in range(6))


class Register(NamedTuple):
    """A register: its offset and its size in bytes."""

    offset: int
    size: int


def capability(config: bytes, wanted: int) -> int | None:
    """Return the offset of a capability, None if there is none."""
    if not config[_STATUS] & _STATUS_CAPABILITIES:
        return None
    offset = config[_CAPABILITIES] & 0xFC
    for _ in range(_MAX_CAPABILITIES):
        if not 0x40 <= offset <= len(config) - 2:
            return None
        if config[offset] == wanted:
            return offset
        offset = config[offset + 1] & 0xFC
    return None


def guest_registers(config: bytes) -> list[Register]:
    """Return what a guest can have written, in the order in which it is to be restored: the command register last.

    What it permits, DMA above all, begins when everything else is there.
    """
    registers = [Register(*register) for register in (*_BARS, *_PLAIN)]
    msi = capability(config, MSI)
    if msi is not None:
        control = int.from_bytes(config[msi + 2 : msi + 4], "little")
        data = msi + (12 if control & _MSI_64 else 8)
        registers.append(Register(msi + 4, 4))
        registers += [Register(msi + 8, 4)] if control & _MSI_64 else []
        registers.append(Register(data, 2))
        registers += [Register(data + 4, 4)] if control & _MSI_MASKABLE else []
        registers.append(Register(msi + 2, 2))
    for number, at in ((MSIX, 2), (PCI_EXPRESS, 8)):  # message control, device control
        found = capability(config, number)
        if found is not None:
            registers.append(Register(found + at, 2))
    registers.append(Register(COMMAND, 2))
    return [register for register in registers if register.offset + register.size <= len(config)]
