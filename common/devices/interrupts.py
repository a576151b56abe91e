"""Interrupts of a device, and the eventfds by which a user of VFIO gets them: the pin (INTx), and MSI-X.

Of MSI-X, as with kernel VFIO, the table's addresses and masks are an affair of the VMM, which traps them; what the
device owes is one signal of the vector's eventfd. The table is kept because a driver reads it back, and it moves with
the device. INTx is a level: the eventfd is signalled once when it is asserted, and the pin is then masked until the VMM
unmasks it, which signals again if it is asserted still (kernel: VFIO_IRQ_INFO_AUTOMASKED).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence

from common.devices.engine import Engine
from common.devices.pci import MSIX_PBA
from common.vfio.feature import Buffer
from common.vfio_user.description import IrqFlags, IrqInfo

__all__ = ["INTX_INDEX", "MSIX_INDEX", "Intx", "Msix"]

INTX_INDEX = 0  # kernel: VFIO_PCI_INTX_IRQ_INDEX
MSIX_INDEX = 2  # kernel: VFIO_PCI_MSIX_IRQ_INDEX
_EVENTFD, _MASKABLE, _AUTOMASKED = 1, 2, 4  # kernel: VFIO_IRQ_INFO_*
_ENTRY = 16
_MASKED = (1).to_bytes(4, "little")  # vector control after reset


class Intx:
    """The pin of a device; `asserted` tells whether the device has a reason to assert it, and is allowed to.

    Any thread may call `update`, when the answer may have changed. The VMM unmasks by request, or by an eventfd.
    """

    info = IrqInfo(INTX_INDEX, _EVENTFD | _MASKABLE | _AUTOMASKED, 1)

    def __init__(self, asserted: Callable[[], bool], engine: Engine) -> None:
        self._asserted = asserted
        self._engine = engine
        self._lock = threading.Lock()
        self._eventfd: int | None = None
        self._unmask_eventfd: int | None = None
        self._masked = False

    def update(self) -> None:
        """Signal the eventfd if the pin is asserted and not masked, and mask it then."""
        with self._lock:
            if self._eventfd is not None and not self._masked and self._asserted():
                self._masked = True
                os.eventfd_write(self._eventfd, 1)

    def unmask(self) -> None:
        """Unmask the pin."""
        self._set_masked(masked=False)
        self.update()

    def _set_masked(self, *, masked: bool) -> None:
        with self._lock:  # nothing is signalled once MASK is answered
            self._masked = masked

    def set_irqs(self, flags: IrqFlags, count: int, data: Buffer, fds: Sequence[int]) -> None:
        """Assign eventfds, take them away, trigger by hand, mask or unmask (kernel: VFIO_DEVICE_SET_IRQS).

        The caller holds the engine's `watching`. OSError: EINVAL (a descriptor that is no eventfd), ENOTTY (an eventfd
        that masks, which the kernel does not have either).
        """
        if flags & IrqFlags.DATA_EVENTFD:
            if flags & IrqFlags.ACTION_MASK:
                raise OSError(errno.ENOTTY, "no eventfd masks INTx")
            if flags & IrqFlags.ACTION_UNMASK:
                self._assign_unmask(fds)
            else:
                self._assign(fds)
        elif not count:
            self._assign(())
            self._assign_unmask(())
        elif flags & IrqFlags.DATA_NONE or data[0]:
            if flags & IrqFlags.ACTION_MASK:
                self._set_masked(masked=True)
            elif flags & IrqFlags.ACTION_UNMASK:
                self.unmask()
            elif self._eventfd is not None:
                os.eventfd_write(self._eventfd, 1)

    def close(self) -> None:
        """Close the eventfds."""
        self._assign(())
        self._assign_unmask(())

    def _assign(self, fds: Sequence[int]) -> None:
        copies = _duplicates(fds)
        with self._lock:
            old, self._eventfd = self._eventfd, copies[0] if copies else None
        if old is not None:
            os.close(old)
        self.unmask()

    def _assign_unmask(self, fds: Sequence[int]) -> None:
        copies = _duplicates(fds)
        if self._unmask_eventfd is not None:
            self._engine.unwatch(self._unmask_eventfd)
            os.close(self._unmask_eventfd)
        self._unmask_eventfd = copies[0] if copies else None
        if self._unmask_eventfd is not None:
            self._engine.watch(self._unmask_eventfd, self.unmask)


class Msix:
    """The vectors of a device."""

    def __init__(self, vectors: int) -> None:
        if vectors * _ENTRY > MSIX_PBA:
            raise ValueError(f"{vectors} vectors do not fit")
        self.vectors = vectors
        self._lock = threading.Lock()  # an eventfd is not closed while it is written to
        self._eventfds: list[int | None] = [None] * vectors
        self._table = bytearray()
        self.reset()

    @property
    def info(self) -> IrqInfo:
        """What VFIO says about it."""
        return IrqInfo(MSIX_INDEX, _EVENTFD, self.vectors)

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

    def signal(self, vector: int) -> bool:
        """Send an interrupt; return whether the VMM has set up any vector: a device has MSI-X or INTx, never both.

        One without an eventfd is lost. All in one go: if the vectors are taken away just then, it is for the pin.
        """
        with self._lock:
            eventfd = self._eventfds[vector]
            if eventfd is not None:
                os.eventfd_write(eventfd, 1)
            return any(each is not None for each in self._eventfds)

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
        copies: list[int | None] = [*_duplicates(fds)]
        with self._lock:
            old = self._eventfds[start : start + count]
            self._eventfds[start : start + count] = copies or [None] * count
        for eventfd in old:
            if eventfd is not None:
                os.close(eventfd)


def _duplicates(fds: Sequence[int]) -> list[int]:
    """Return duplicates of eventfds; raise OSError (EINVAL) if one is none."""
    for fd in fds:
        # A write to anything else could block the device for ever.
        if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
            raise OSError(errno.EINVAL, "an interrupt's descriptor is not an eventfd")
    with contextlib.ExitStack() as undo:
        copies = []
        for fd in fds:
            copies.append(os.dup(fd))
            undo.callback(os.close, copies[-1])
        undo.pop_all()
    return copies
