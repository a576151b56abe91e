"""How known devices are made to write to memory by DMA, and to have a state that is worth moving.

What makes a device work is its own affair, so there is one class for each kind that is known, found by PCI vendor and
device id. Checks that need DMA are unknown for others.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from common.conformance.check import Failure, Unknown
from common.conformance.device import CONFIG_REGION, Device
from common.conformance.memory import AREA, FIRST, PAGE, SECOND, DmaMemory
from common.datasheets import accelerator, nic, nvme, pci
from common.vfio_user.codec import Command
from common.vfio_user.description import IrqFlags, IrqSet

__all__ = ["EXERCISERS", "Exerciser", "exerciser_of"]

_STRIDE = 421  # pages from one buffer to the next: early and late ones, and none twice
_PATIENCE = 5.0  # seconds that a device has for its DMA
_COMMAND_REGISTER = 0x04
_MEMORY_AND_BUS_MASTER = 0x6


class Exerciser(ABC):
    """A device and its memory; `begins_running`: it can be told to write in RUNNING only, and does so later."""

    begins_running: ClassVar[bool] = False

    def __init__(self, device: Device, memory: DmaMemory) -> None:
        self.device = device
        self.memory = memory

    def attach(self) -> None:
        """Give the device its memory and let it do DMA."""
        self.device.map_both(self.memory)
        self.device.write(CONFIG_REGION, _COMMAND_REGISTER, _MEMORY_AND_BUS_MASTER.to_bytes(2, "little"))

    def work(self) -> set[int]:
        """Make the device write to the second area; return the IOVAs of the pages that it has written there itself."""
        self.begin()
        self.finish()
        return self.written()

    def written(self) -> set[int]:
        """Return the pages of both areas that the device has changed, except by message."""
        return self.memory.changed() - self.memory.by_message

    @abstractmethod
    def begin(self) -> None:
        """Tell the device to write."""

    @abstractmethod
    def done(self) -> bool:
        """Tell whether it has."""

    def finish(self) -> None:
        """Wait until it has; `Failure` if it has not in time."""
        end = time.monotonic() + _PATIENCE
        while not self.done():
            if time.monotonic() > end:
                raise Failure("the device did not do the DMA that it was told to do")
            self.device.pump(0.005)

    @abstractmethod
    def scribble(self) -> None:
        """Change, from RUNNING, what can be read of the device, so that a fresh one differs."""

    def close(self) -> None:  # noqa: B027 - most have nothing
        """Give back what it holds."""


class _Ring(Exerciser):
    """Our own devices: a ring in the first area whose entries make the device write to the second one."""

    ENTRIES: ClassVar[int] = 64
    RING: ClassVar[int] = FIRST + PAGE
    DTYPE: ClassVar[np.dtype[np.void]]

    def __init__(self, device: Device, memory: DmaMemory) -> None:
        super().__init__(device, memory)
        self._posted = 0

    @abstractmethod
    def entry(self, number: int) -> tuple[Any, ...]:
        """Return a ring entry for a write to `buffer(number)`."""

    def buffer(self, number: int) -> int:
        """Return the IOVA of a page of the second area."""
        return SECOND + number * _STRIDE % (AREA // PAGE) * PAGE

    def attach(self) -> None:
        super().attach()
        self.start()

    def start(self) -> None:
        """Start the ring, empty."""
        self._posted = 0
        self.memory.write(self.RING, bytes(4))
        self.device.write(pci.REGISTERS_BAR, pci.CONTROL, bytes(4))
        self.device.write(pci.REGISTERS_BAR, pci.RING_BASE, self.RING.to_bytes(8, "little"))
        self.device.write(pci.REGISTERS_BAR, pci.RING_ENTRIES, self.ENTRIES.to_bytes(4, "little"))
        self.device.write(pci.REGISTERS_BAR, pci.CONTROL, pci.CONTROL_ENABLE.to_bytes(4, "little"))
        end = time.monotonic() + _PATIENCE
        while not self._register(pci.STATUS) & pci.STATUS_ENABLED:
            if time.monotonic() > end:
                raise Failure("the ring does not start")
            self.device.pump(0.005)

    def begin(self) -> None:
        for _ in range(4):
            at = self.RING + pci.RING_HEADER + self._posted % self.ENTRIES * self.DTYPE.itemsize
            self.memory.write(at, np.array([self.entry(self._posted)], self.DTYPE).tobytes())
            self._posted += 1
        self.memory.write(self.RING, self._posted.to_bytes(4, "little"))
        self.device.write(pci.REGISTERS_BAR, pci.DOORBELL, bytes(4))

    def done(self) -> bool:
        return self._register(pci.HEAD) == self._posted

    def scribble(self) -> None:
        self.device.write(pci.REGISTERS_BAR, pci.CONTROL, bytes(4))
        self.device.write(pci.REGISTERS_BAR, pci.RING_BASE, b"\x40\x33\x22\x11\x00\x00\x00\x00")

    def _register(self, offset: int) -> int:
        return int.from_bytes(self.device.read(pci.REGISTERS_BAR, offset, 4), "little")


class _Nic(_Ring):
    DTYPE = nic.ENTRY

    def entry(self, number: int) -> tuple[Any, ...]:
        return self.buffer(number), PAGE, 0, 0, 0, 0


class _Nvme(_Ring):
    DTYPE = nvme.ENTRY

    def entry(self, number: int) -> tuple[Any, ...]:
        return nvme.OP_READ, 1, number, self.buffer(number), number, 0


class _Accelerator(_Ring):
    DTYPE = accelerator.ENTRY

    def entry(self, number: int) -> tuple[Any, ...]:
        return accelerator.OP_STORE, PAGE, 0, self.buffer(number), 0, 0

    def scribble(self) -> None:
        super().scribble()
        self.device.write(pci.MEMORY_BAR, 0x100, bytes(range(256)) * 8)


class _LibvfioUserSample(Exerciser):
    """The sample server of libvfio-user: BAR 0 is the time at which a timer fires.

    It then signals INTx, writes the first page of the second region mapped, and of the first one by message, and reads
    both back.
    """

    begins_running = True
    _TIMER_BAR = 0
    _MEMORY_BAR = 1
    _MEMORY_SIZE = 0x3000
    _BURST = 4096

    def __init__(self, device: Device, memory: DmaMemory) -> None:
        super().__init__(device, memory)
        self._irq = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def attach(self) -> None:
        first = self.memory.shared
        self.device.map_area(self.memory, FIRST)
        # It dies if it cannot reach the second one directly.
        self.memory.shared = True
        self.device.map_area(self.memory, SECOND)
        self.memory.shared = first
        trigger = IrqSet(0, IrqFlags.DATA_EVENTFD | IrqFlags.ACTION_TRIGGER, 0, 1).pack()
        self.device.accepted(Command.DEVICE_SET_IRQS, trigger, fds=[self._irq])

    def begin(self) -> None:
        self.memory.read_by_message = 0
        # Whole seconds: one might be over before the server has taken the difference.
        self.device.write(self._TIMER_BAR, 0, (int(time.time()) + 2).to_bytes(8, "little"))

    def done(self) -> bool:
        return self.memory.read_by_message >= self._BURST

    def scribble(self) -> None:
        self.device.write(self._MEMORY_BAR, 0, bytes(number * 7 % 251 for number in range(self._MEMORY_SIZE)))
        # It does not run again with a time that is over.
        self.device.write(self._TIMER_BAR, 0, (int(time.time()) + 3600).to_bytes(8, "little"))

    def close(self) -> None:
        os.close(self._irq)


EXERCISERS: dict[tuple[int, int], type[Exerciser]] = {
    (pci.VENDOR_ID, nic.DEVICE_ID): _Nic,
    (pci.VENDOR_ID, nvme.DEVICE_ID): _Nvme,
    (pci.VENDOR_ID, accelerator.DEVICE_ID): _Accelerator,
    (0xDEAD, 0xBEEF): _LibvfioUserSample,
}
"""By PCI vendor and device id."""


def exerciser_of(device: Device, memory: DmaMemory) -> Exerciser:
    """Return what makes a device do DMA; `Unknown` if nothing is known of it."""
    identity = device.identity()
    if identity not in EXERCISERS:
        vendor, number = identity
        raise Unknown(
            f"it is not known how device {vendor:04x}:{number:04x} is made to do DMA (common/conformance/exercise.py)"
        )
    return EXERCISERS[identity](device, memory)
