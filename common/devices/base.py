"""What our devices have in common: regions, interrupts, DMA, a ring, an engine, migration.

Two locks, in this order:

* the engine's is held for one step, and by every request after which the device must be known to be between two steps:
  change of state, map, unmap, report, reset, configuration. Such a request may wait for a DMA message under way, so
  whoever carries messages must not wait for such a request (vfio-user: the replies are routed apart).
* the registers' is held for one access to registers. A peer's write to a BAR takes no other lock, so two devices that
  write to each other cannot block each other.
"""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from common import hooks
from common.datasheets import pci
from common.devices.dma import DmaFault, DmaPort, DmaStalled
from common.devices.engine import Engine
from common.devices.interrupts import MSIX_INDEX, Msix
from common.devices.knobs import Knobs, OneTimeFaults
from common.devices.mappings import PAGE_SIZE, Mappings
from common.devices.migration import P2P_STATES, Migration
from common.devices.pci import CONFIG_SIZE, Bar, ConfigSpace
from common.devices.registers import RegisterBlock
from common.devices.ring import Ring
from common.devices.stream import DeviceMemory
from common.memory.write_journal import WriteJournal
from common.vfio.dirty_log import DirtyLog
from common.vfio.feature import Buffer, PrecopyInfo, Range
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.capabilities import Extension
from common.vfio_user.codec import DMA_READABLE, DMA_WRITABLE
from common.vfio_user.description import IoEventFd, IrqFlags, IrqInfo, RegionFlags, RegionInfo
from common.vfio_user.server import MessageDma

__all__ = ["EmulatedDevice", "Entry"]

Entry = tuple[Any, ...]

_CONFIG_REGION = 7  # kernel: VFIO_PCI_CONFIG_REGION_INDEX
_REGIONS = 9
_IRQS = 5
_VECTORS = 1
_REGISTER_BYTES = 0x100  # of BAR 0 that hold registers
_IRQ_EVENTFD = 1
_IDENTITY = struct.Struct("<IIQ")  # the device's magic, version of its state's layout, geometry
_BATCH = 64  # entries that are fetched in one step
_STEP_SECONDS = 0.001
_MASK_ALL = (1 << 64) - 1
_ALL_IOVAS = Range(0, (1 << 64) - PAGE_SIZE)  # the last page would not fit into 64 bits


class EmulatedDevice(ABC):
    """A device behind a vfio-user server; a kind says what its registers are and what it does with ring entries."""

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
        self.name = name
        self.memory = DeviceMemory(memory) if memory else None
        self.registers = RegisterBlock(_REGISTER_BYTES)
        self.registers.define_constant(pci.ID, 4, magic)
        self.registers.define(pci.STATUS, 4)
        self.registers.define(pci.CONTROL, 4, mask=self.CONTROL_MASK)
        self.registers.define(pci.RING_BASE, 8, mask=_MASK_ALL)
        self.registers.define(pci.RING_ENTRIES, 4, mask=0xFFFF_FFFF)
        self.registers.define(pci.HEAD, 4)
        self.registers.define(pci.FAULTS, 4)
        bars = {pci.REGISTERS_BAR: Bar(pci.REGISTERS_SIZE), pci.MSIX_BAR: Bar(pci.MSIX_BAR_SIZE)}
        if memory:
            bars[pci.MEMORY_BAR] = Bar(memory, wide=True)
        sizes = {index: bar.size for index, bar in bars.items()} | {_CONFIG_REGION: CONFIG_SIZE}
        both, nothing = RegionFlags.READ | RegionFlags.WRITE, RegionFlags(0)
        self.regions: Sequence[RegionInfo] = [
            RegionInfo(index, both if index in sizes else nothing, sizes.get(index, 0)) for index in range(_REGIONS)
        ]
        self.irqs: Sequence[IrqInfo] = [
            IrqInfo(index, _IRQ_EVENTFD, _VECTORS) if index == MSIX_INDEX else IrqInfo(index) for index in range(_IRQS)
        ]
        self._config = ConfigSpace(device_id, class_code, bars, _VECTORS)
        self._msix = Msix(_VECTORS)
        self._mappings = Mappings()
        self._log = DirtyLog(knobs.log_limits)
        self._iommu = DirtyLog()
        self.dma = DmaPort(self._mappings, self._log, self._iommu, f"{name}-dma-written")
        self.dma.logging = "unlogged" not in knobs.faults
        self.dma.journal = WriteJournal() if knobs.trace else None
        self._ring = Ring(self.registers, self.dma, self.ENTRY, self.COMPLETION)
        self._engine = Engine(name, self._step)
        self._doorbell_is_shared = False
        self._faults = OneTimeFaults(name, knobs.faults)
        self._migration = Migration(
            self, _IDENTITY.pack(magic, self.STATE_VERSION, geometry), self.memory, knobs, self._faults
        )
        self.migration_flags: MigrationFlags = knobs.flags
        self.dma_logging: bool = knobs.dma_logging
        self.extension = Extension(p2p=bool(knobs.flags & MigrationFlags.P2P), iommu_dirty=True, trace=knobs.trace)

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

    def load_kind(self, state: Buffer) -> None:  # noqa: B027 - most kinds have nothing to add
        """Become what a checked state says."""

    def reset_kind(self) -> None:  # noqa: B027 - as above
        """Return to what the device is after reset, beside its registers."""

    def fault(self) -> None:
        """Count an access that was refused."""
        self.registers.put(pci.FAULTS, 4, self.registers.get(pci.FAULTS, 4) + 1)
        self.registers.change(pci.STATUS, 4, put=pci.STATUS_FAULT)

    # Life.

    def connected(self, dma: MessageDma) -> None:
        """Begin to work; `dma` carries DMA to what is not mapped."""
        self.dma.messages = dma
        with self._engine.lock:
            self._state_changed()
        self._engine.start()

    def disconnected(self) -> None:
        """Stop working and give everything back."""
        self._engine.close()
        self._msix.close()
        self._mappings.clear()

    def reset(self) -> None:
        """Reset the device (kernel: VFIO_DEVICE_RESET): it is in RUNNING, from wherever it was, and its log is lost.

        Mappings, eventfds and configuration stay, which are the VMM's, and the dirty bits of the IOMMU.
        """
        self._faults.reach("fail_reset")
        with self._engine.lock:
            self._log.stop()
            self.registers.reset()
            self._msix.reset()
            self._ring.reset()
            self._engine.take_ring()
            self.reset_kind()
            self._migration.reset()
            self._state_changed()

    # Regions and interrupts.

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read from a region, within it."""
        if index == _CONFIG_REGION:
            return self._config.read(offset, count)
        if index == pci.MSIX_BAR:
            return self._msix.read(offset, count)
        if index == pci.MEMORY_BAR and self.memory is not None:
            return bytes(self.memory.view[offset : offset + count])
        return self.registers.read(offset, count)

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """Write to a region, within it; raise OSError (EINVAL) if registers are not accessed as registers."""
        if index == _CONFIG_REGION:
            # Between two steps: a device whose bus mastering is switched off does no DMA once that is answered.
            with self._engine.lock:
                self._config.write(offset, data)
            self._engine.wake()
        elif index == pci.MSIX_BAR:
            self._msix.write(offset, data)
        elif index == pci.MEMORY_BAR:
            self.memory_written(offset, data)
        elif offset <= pci.DOORBELL < offset + len(data):
            self._engine.ring()
        else:
            self._register_written(offset, data)

    def memory_written(self, offset: int, data: Buffer) -> None:
        """Take a write to device memory from outside."""
        if self.memory is not None:
            self.memory.write(offset, data)

    def set_irqs(self, index: int, flags: IrqFlags, start: int, count: int, data: Buffer, fds: Sequence[int]) -> None:
        """Set up the vectors of MSI-X (see `Msix.set_irqs`), the only kind of interrupts that there is."""
        if index != MSIX_INDEX:
            return  # to turn off what is not there changes nothing
        with self._engine.lock:
            self._msix.set_irqs(flags, start, count, data, fds)

    def io_fds(self, index: int) -> list[IoEventFd]:
        """Return the eventfds that stand for writes to a region: the doorbell in BAR 0, of any size."""
        if index != pci.REGISTERS_BAR:
            return []
        self._doorbell_is_shared = True
        return [IoEventFd(pci.DOORBELL, 0, self._engine.doorbell)]

    # DMA.

    def dma_map(self, iova: int, size: int, flags: int, offset: int, fd: int | None) -> None:
        """Map memory for DMA (see `Mappings.add`); `flags`: DMA_READABLE, DMA_WRITABLE."""
        readable, writable = bool(flags & DMA_READABLE), bool(flags & DMA_WRITABLE)
        with self._engine.lock:
            self._mappings.add(iova, size, readable=readable, writable=writable, fd=fd, offset=offset)

    def dma_unmap(self, iova: int, size: int, page_size: int | None) -> bytes | None:
        """Unmap memory; DMA to it has ended when this returns.

        With `page_size` return what the logs that run have of the range, and clear it; OSError as `Mappings.remove` and
        `DirtyLog.report`, with nothing unmapped. An IOMMU keeps its bits in the page table: they go with the mapping.
        """
        with self._engine.lock if hooks.guarded("mark-after-unmap") else nullcontext():
            self._mappings.check(iova, size)
            bitmap = None
            if page_size is not None:
                running = [log for log in (self._log, self._iommu) if log.active] or [self._log]
                found = [np.frombuffer(log.report(iova, size, page_size), np.uint8) for log in running]
                bitmap = np.bitwise_or.reduce(found).tobytes()
            self._iommu.discard(iova, size)
            self._mappings.remove(iova, size)
        return bitmap

    def dma_unmap_all(self) -> None:
        """Unmap everything."""
        with self._engine.lock:
            self._iommu.discard(_ALL_IOVAS.iova, _ALL_IOVAS.length)
            self._mappings.clear()

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        """Start the log of DMA writes; return the page size in bytes (see `DirtyLog.start`)."""
        self._faults.reach("fail_logging_start")
        with self._engine.lock:
            return self._log.start(page_size, ranges)

    def logging_stop(self) -> None:
        """Stop the log and lose what it has."""
        with self._engine.lock:
            self._log.stop()

    def logging_report(self, iova: int, length: int, page_size: int) -> bytes:
        """Return and clear what the log has of a range (see `DirtyLog.report`)."""
        self._faults.reach("fail_logging_report")
        with self._engine.lock:
            return self._log.report(iova, length, page_size)

    def iommu_dirty_start(self, page_size: int) -> int:
        """Start the dirty bits of the IOMMU, for all that is mapped; return their page size in bytes."""
        with self._engine.lock:
            return self._iommu.start(page_size, (_ALL_IOVAS,))

    def iommu_dirty_stop(self) -> None:
        """Stop them and lose what they have."""
        with self._engine.lock:
            self._iommu.stop()

    def iommu_dirty_report(self, iova: int, length: int, page_size: int) -> bytes:
        """Return and clear the bits of a range (see `DirtyLog.report`)."""
        with self._engine.lock:
            return self._iommu.report(iova, length, page_size)

    def write_journal(self, iova: int, length: int, limit: int) -> bytes:
        """Return the newest `limit` rows of the journal of a range, oldest first."""
        if self.dma.journal is None:
            return b""
        first, end = iova // PAGE_SIZE, -(-(iova + length) // PAGE_SIZE)
        with self._engine.lock:
            return self.dma.journal.of(first, end - first, limit).tobytes()

    # Migration.

    def get_state(self) -> DeviceState:
        """Return the migration state."""
        return self._migration.state

    def set_state(self, target: DeviceState) -> None:
        """Change the migration state (see `Migration.set_state`)."""
        with self._engine.lock:
            try:
                self._migration.set_state(target)
            finally:
                self._state_changed()

    def mig_data_read(self, size: int) -> memoryview:
        """Return the next bytes of the state's stream (see `Migration.read`)."""
        return self._migration.read(size)

    def mig_data_write(self, data: Buffer) -> None:
        """Take the next bytes of a state's stream (see `Migration.write`)."""
        self._migration.write(data)

    def precopy_info(self) -> PrecopyInfo:
        """Return what there is to read in pre-copy (kernel: VFIO_MIG_GET_PRECOPY_INFO)."""
        with self._engine.lock:
            return self._migration.precopy_info()

    def stop_copy_length(self) -> int:
        """Return what STOP_COPY would bring, in bytes (kernel: VFIO_DEVICE_FEATURE_MIG_DATA_SIZE)."""
        with self._engine.lock:
            return self._migration.stop_copy_length()

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

    def _state_changed(self) -> None:
        self.dma.peers = self._migration.state not in P2P_STATES
        self._engine.listening = self._migration.running
        self._engine.wake()

    def _step(self, now: float) -> float | None:
        if not self._migration.running and hooks.guarded("late-dma"):
            return None
        if self._engine.take_ring():
            self._ring.attention = True
        self.dma.bus_master = self._config.bus_master
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
                self._msix.signal(pci.VECTOR)
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

    def _register_written(self, offset: int, data: Buffer) -> None:
        before = self.registers.get(pci.CONTROL, 4)
        self.registers.write(offset, data)
        now = self.registers.get(pci.CONTROL, 4)
        if now != before:
            self._ring.control_written(before=bool(before & pci.CONTROL_ENABLE), now=bool(now & pci.CONTROL_ENABLE))
            self._engine.wake()
