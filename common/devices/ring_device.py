"""Devices that a driver gives work to by a ring of entries, at registers that they have in common (datasheets, pci)."""

from __future__ import annotations

import struct
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from common import hooks
from common.datasheets import pci
from common.devices.base import EmulatedDevice
from common.devices.dma import DmaFault, DmaStalled
from common.devices.knobs import Knobs
from common.devices.pci import Bar, ConfigSpace
from common.devices.registers import RegisterBlock
from common.devices.ring import Ring
from common.devices.stream import DeviceMemory, RecordFormat
from common.vfio.feature import Buffer
from common.vfio.migration import MigrationFlags
from common.vfio_user.description import IoEventFd

__all__ = ["Entry", "RingDevice"]

Entry = tuple[Any, ...]

_VECTORS = 1
_REGISTER_BYTES = 0x100  # of BAR 0 that hold registers
_IDENTITY = struct.Struct("<IIQ")  # the device's magic, version of its state's layout, geometry
_BATCH = 64  # entries that are fetched in one step
_STEP_SECONDS = 0.001
_MASK_ALL = (1 << 64) - 1


class RingDevice(EmulatedDevice):
    """A device with a ring; a kind says what its other registers are and what it does with entries."""

    ENTRY: ClassVar[np.dtype[np.void]]
    COMPLETION: ClassVar[str] = "status"
    CONTROL_MASK: ClassVar[int] = pci.CONTROL_ENABLE
    STATE_VERSION: ClassVar[int] = 1

    def __init__(
        self, name: str, knobs: Knobs, *, magic: int, device_id: int, class_code: int, geometry: int, memory: int = 0
    ) -> None:
        """Build a device in RUNNING that has not begun to work.

        `geometry` says what else must be equal in a device that takes its state; `memory` in bytes, a power of two.
        """
        if not hooks.guarded("device-precopy"):
            # A device of the same kind that can do less than the one at the other host.
            knobs = replace(knobs, migration_flags=int(knobs.flags & ~MigrationFlags.PRE_COPY))
        self.memory = DeviceMemory(memory) if memory else None
        self.registers = RegisterBlock(_REGISTER_BYTES)
        self.registers.define_constant(pci.ID, 4, magic)
        self.registers.define(pci.STATUS, 4)
        self.registers.define(pci.CONTROL, 4, mask=self.CONTROL_MASK)
        self.registers.define(pci.RING_BASE, 8, mask=_MASK_ALL)
        self.registers.define(pci.RING_ENTRIES, 4, mask=0xFFFF_FFFF)
        self.registers.define(pci.HEAD, 4)
        self.registers.define(pci.FAULTS, 4)
        self.registers.define(pci.INTERRUPT, 4)
        bars = {pci.REGISTERS_BAR: Bar(pci.REGISTERS_SIZE), pci.MSIX_BAR: Bar(pci.MSIX_BAR_SIZE)}
        if memory:
            bars[pci.MEMORY_BAR] = Bar(memory, wide=True)
        super().__init__(
            name,
            knobs,
            ConfigSpace(device_id, class_code, bars, _VECTORS),
            {index: bar.size for index, bar in bars.items()},
            RecordFormat(_IDENTITY.pack(magic, self.STATE_VERSION, geometry), self.memory),
        )
        self._ring = Ring(self.registers, self.dma, self.ENTRY, self.COMPLETION)
        self._doorbell_is_shared = False

    # What a kind adds.

    @abstractmethod
    def allowance(self, posted: int, now: float) -> tuple[int, float]:
        """Return how many of the posted entries may be executed now, and if none, in how many seconds to ask again."""

    @abstractmethod
    def execute(self, entry: Entry) -> Entry:
        """Do what an entry says and return it finished; raise `DmaStalled`, having done nothing, if not now."""

    def background(self, now: float) -> float | None:  # noqa: ARG002 - for the kinds that have something to do
        """Do what the device does without being told; return in how many seconds again, or None."""
        return None

    def save_kind(self) -> bytes:
        """Return what there is to the state beside registers, ring, table and memory."""
        return b""

    def check_kind(self, registers: Buffer, state: Buffer) -> None:  # noqa: ARG002 - as above
        """Raise ValueError if registers and the rest of a state are none of this kind."""
        if len(state):
            raise ValueError(f"{len(state)} bytes too many")

    def load_kind(self, state: Buffer) -> None:
        """Become what a checked state says."""

    def reset_work(self) -> None:
        """Return to what the device is after reset, beside registers, ring and table."""

    def memory_written(self, offset: int, data: Buffer) -> None:
        """Take a write to device memory from outside."""
        if self.memory is not None:
            self.memory.write(offset, data)

    def fault(self) -> None:
        """Count an access that was refused."""
        self.registers.put(pci.FAULTS, 4, self.registers.get(pci.FAULTS, 4) + 1)
        self.registers.change(pci.STATUS, 4, put=pci.STATUS_FAULT)

    # What all of them are.

    def bar_read(self, index: int, offset: int, count: int) -> bytes:
        """Read registers, the interrupt table, or device memory."""
        if index == pci.MSIX_BAR:
            return self._msix.read(offset, count)
        if index == pci.MEMORY_BAR and self.memory is not None:
            return bytes(self.memory.view[offset : offset + count])
        return self.registers.read(offset, count)

    def bar_write(self, index: int, offset: int, data: Buffer) -> None:
        """Write registers, the doorbell among them, the interrupt table, or device memory."""
        if index == pci.MSIX_BAR:
            self._msix.write(offset, data)
        elif index == pci.MEMORY_BAR:
            self.memory_written(offset, data)
        elif offset <= pci.DOORBELL < offset + len(data):
            self._engine.ring()
        else:
            self._register_written(offset, data)

    def io_fds(self, index: int) -> list[IoEventFd]:
        """Return the eventfds that stand for writes to a region: the doorbell in BAR 0, of any size."""
        if index != pci.REGISTERS_BAR:
            return []
        self._doorbell_is_shared = True
        return [IoEventFd(pci.DOORBELL, 0, self._engine.doorbell)]

    def interrupt_pending(self) -> bool:
        """Tell whether entries were finished that the driver has not acknowledged."""
        return self.registers.get(pci.INTERRUPT, 4) != 0

    def reset_kind(self) -> None:
        """Reset registers and ring, and what the kind adds."""
        self.registers.reset()
        self._ring.reset()
        self.reset_work()

    def save_state(self) -> bytes:
        """Return the state beside device memory. The caller holds the engine's lock."""
        # Rings that nobody has taken are the VMM's to move if it has the eventfd; else they become part of the state.
        if not self._doorbell_is_shared:
            self._ring.attention |= self._engine.take_ring()
        return b"".join([self.registers.save(), self._ring.save(), self._msix.save(), self.save_kind()])

    def load_state(self, state: bytes) -> None:
        """Take over a state that another device of this kind has saved; raise ValueError, with nothing changed."""
        view = memoryview(state)
        parts = []
        for size in (self.registers.size, Ring.STATE_SIZE, self._msix.size):
            parts.append(view[:size])
            view = view[size:]
        registers, ring, table = parts
        self.registers.check(registers)
        Ring.check(ring)
        if len(table) != self._msix.size:
            raise ValueError("the interrupt table is incomplete")
        self.check_kind(registers, view)
        self.registers.load(registers)
        self._ring.load(ring)
        self._msix.load(table)
        self.load_kind(view)

    # The engine.

    def step(self, now: float) -> float | None:
        """Work on the ring, and do what the kind does by itself."""
        if self._engine.take_ring():
            self._ring.attention = True
        delays = [delay for delay in (self.background(now), self._work(now)) if delay is not None]
        return min(delays, default=None)

    def _work(self, now: float) -> float | None:
        """Execute entries of the ring; return in how many seconds there is more to do, None: not before a wake."""
        try:
            self._ring.obey()
            if not (self._ring.enabled and self._ring.attention):
                return None
            posted = self._ring.posted()
            if not posted:
                # Posting comes before ringing, so whoever posts after this look rings after it too.
                self._ring.attention = False
                return None
            allowed, delay = self.allowance(posted, now)
            if not allowed:
                return delay
            entries = self._ring.fetch(min(allowed, posted, _BATCH))
            finished, stalled = self._execute(entries, now)
            if finished:
                self._ring.complete(finished)
                self._interrupt()
        except DmaStalled:
            return None
        except DmaFault:
            self.fault()
            self._ring.halt()
            return None
        return None if stalled else 0.0

    def _execute(self, entries: Sequence[Entry], now: float) -> tuple[list[Entry], bool]:
        """Execute entries for as long as a step may take; return those finished, and whether the next must wait."""
        finished: list[Entry] = []
        for entry in entries:
            try:
                finished.append(self.execute(entry))
            except DmaStalled:
                return finished, True
            if time.monotonic() - now > _STEP_SECONDS:
                break
        return finished, False

    def _interrupt(self) -> None:
        """Say that entries are finished: by the vector, or where none is set up, by the pin until that is seen."""
        if not self._msix.signal(pci.VECTOR):
            self.registers.change(pci.INTERRUPT, 4, put=pci.INTERRUPT_RING)
            self._intx.update()

    def _register_written(self, offset: int, data: Buffer) -> None:
        before = self.registers.get(pci.CONTROL, 4)
        self.registers.write(offset, data)
        now = self.registers.get(pci.CONTROL, 4)
        if now != before:
            self._ring.control_written(before=bool(before & pci.CONTROL_ENABLE), now=bool(now & pci.CONTROL_ENABLE))
            self._engine.wake()
        if offset <= pci.INTERRUPT < offset + len(data):
            seen = int.from_bytes(data[pci.INTERRUPT - offset :][:4], "little")
            self.registers.change(pci.INTERRUPT, 4, clear=seen)
            self._intx.update()
