"""MSI-X: the table that a driver fills, and the eventfds by which a user of VFIO gets the interrupts.

As with kernel VFIO the table's addresses and masks are an affair of the VMM, which traps them; what the device owes is
one signal of the vector's eventfd. The table is kept because a driver reads it back, and it moves with the device.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

from common.devices.pci import MSIX_PBA
from common.vfio.feature import Buffer
from common.vfio_user.description import IrqFlags

__all__ = ["MSIX_INDEX", "Msix"]

MSIX_INDEX = 2  # kernel: VFIO_PCI_MSIX_IRQ_INDEX
_ENTRY = 16
_MASKED = (1).to_bytes(4, "little")  # vector control after reset


class Msix:
    """The vectors of a device."""

    def __init__(self, vectors: int) -> None:
        if vectors * _ENTRY > MSIX_PBA:
            raise ValueError(f"{vectors} vectors do not fit")
        self.vectors = vectors
        self._eventfds: list[int | None] = [None] * vectors
        self._table = bytearray()
        self.reset()

    def read(self, offset: int, count: int) -> bytes:
        """Return part of the BAR: the table, then zeros, for no interrupt is ever pending in the device."""
        return bytes(self._table[offset : offset + count]).ljust(count, b"\0")

    def write(self, offset: int, data: Buffer) -> None:
        """Write into the table; the rest of the BAR ignores writes."""
        count = max(min(len(data), len(self._table) - offset), 0)
        self._table[offset : offset + count] = data[:count]

    def reset(self) -> None:
        """Give the table the state that it has after reset; eventfds stay, as they do in the kernel."""
        self._table[:] = (bytes(_ENTRY - len(_MASKED)) + _MASKED) * self.vectors

    @property
    def size(self) -> int:
        """Bytes of the table."""
        return len(self._table)

    def save(self) -> bytes:
        """Return the table."""
        return bytes(self._table)

    def load(self, table: Buffer) -> None:
        """Put back a table of the right size."""
        self._table[:] = table

    def signal(self, vector: int) -> None:
        """Send an interrupt; without an eventfd it is lost, as where interrupts are not enabled."""
        eventfd = self._eventfds[vector]
        if eventfd is not None:
            os.eventfd_write(eventfd, 1)

    def set_irqs(self, flags: IrqFlags, start: int, count: int, data: Buffer, fds: Sequence[int]) -> None:
        """Assign eventfds, take them away, or trigger by hand (kernel: VFIO_DEVICE_SET_IRQS); `fds` stay the caller's.

        What the arguments say fits together. OSError: EINVAL (a descriptor that is no eventfd), ENOTTY (mask and
        unmask, which the kernel does not have for MSI-X either).
        """
        if not flags & IrqFlags.ACTION_TRIGGER:
            raise OSError(errno.ENOTTY, f"SET_IRQS flags 0x{flags:x}: MSI-X has nothing but TRIGGER")
        if flags & IrqFlags.DATA_EVENTFD:
            self._assign(start, count, fds)
        elif flags & IrqFlags.DATA_BOOL:
            for vector in range(start, start + count):
                if data[vector - start]:
                    self.signal(vector)
        elif count:
            for vector in range(start, start + count):
                self.signal(vector)
        else:
            self._assign(0, self.vectors, ())

    def close(self) -> None:
        """Close the eventfds."""
        self._assign(0, self.vectors, ())

    def _assign(self, start: int, count: int, fds: Sequence[int]) -> None:
        for fd in fds:
            # A write to anything else could block the device for ever.
            if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
                raise OSError(errno.EINVAL, "an interrupt's descriptor is not an eventfd")
        with contextlib.ExitStack() as undo:
            copies: list[int | None] = []
            for fd in fds:
                copy = os.dup(fd)
                undo.callback(os.close, copy)
                copies.append(copy)
            undo.pop_all()
        old = self._eventfds[start : start + count]
        self._eventfds[start : start + count] = copies or [None] * count
        for eventfd in old:
            if eventfd is not None:
                os.close(eventfd)
