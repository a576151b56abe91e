"""What our devices have in common: regions, interrupts, DMA, an engine, migration.

Locks, in this order:

* the engine's is held for one step, and by every request after which the device must be known to be between two steps:
  change of state, map, unmap, report, reset, bus mastering off. Such a request may wait for a DMA message under way, so
  whoever carries messages must not wait for such a request (vfio-user: the replies are routed apart). QEMU does wait:
  it carries no message while one of its CPUs waits for us. So configuration and interrupts, which a running guest sets
  up all the time, wait for no step, but for bus mastering that is switched off: a guest that does so, resets a device,
  or has it unmap, while a message is under way, waits under QEMU until that times out.
* the lock of the eventfds that the engine watches comes next, and then that of interrupts.
* the registers' is held for one access to registers. A peer's write to a BAR takes no other lock, so two devices that
  write to each other cannot block each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np

from common import hooks
from common.devices.dma import DmaPort
from common.devices.engine import Engine
from common.devices.interrupts import INTX_INDEX, MSIX_INDEX, Intx, Msix
from common.devices.knobs import Knobs, OneTimeFaults
from common.devices.mappings import PAGE_SIZE, Mappings
from common.devices.migration import P2P_STATES, Migration
from common.devices.pci import CONFIG_SIZE, ConfigSpace
from common.devices.stream import StateFormat
from common.memory.write_journal import WriteJournal
from common.vfio.dirty_log import DirtyLog
from common.vfio.feature import Buffer, PrecopyInfo, Range
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.capabilities import Extension
from common.vfio_user.codec import DMA_READABLE, DMA_WRITABLE
from common.vfio_user.description import IoEventFd, IrqFlags, IrqInfo, RegionFlags, RegionInfo
from common.vfio_user.server import MessageDma

__all__ = ["ALL_IOVAS", "EmulatedDevice"]

ALL_IOVAS = Range(0, (1 << 64) - PAGE_SIZE)  # the last page would not fit into 64 bits

_CONFIG_REGION = 7  # kernel: VFIO_PCI_CONFIG_REGION_INDEX
_REGIONS = 9
_IRQS = 5


class EmulatedDevice(ABC):
    """A device behind a vfio-user server; a kind says what its BARs are, what it does, and what its state is."""

    def __init__(
        self, name: str, knobs: Knobs, config: ConfigSpace, bars: Mapping[int, int], state_format: StateFormat
    ) -> None:
        """Build a device in RUNNING that has not begun to work; `bars`: their sizes in bytes."""
        self.name = name
        sizes = {**bars, _CONFIG_REGION: CONFIG_SIZE}
        both, nothing = RegionFlags.READ | RegionFlags.WRITE, RegionFlags(0)
        self.regions: Sequence[RegionInfo] = [
            RegionInfo(index, both if index in sizes else nothing, sizes.get(index, 0)) for index in range(_REGIONS)
        ]
        self._config = config
        self._engine = Engine(name, self._step)
        self._intx = Intx(lambda: self.interrupt_pending() and not config.intx_disabled, self._engine)
        self._msix = Msix(config.vectors)
        infos = {INTX_INDEX: self._intx.info} | ({MSIX_INDEX: self._msix.info} if config.vectors else {})
        self.irqs: Sequence[IrqInfo] = [infos.get(index, IrqInfo(index)) for index in range(_IRQS)]
        self._mappings = Mappings()
        self._log = DirtyLog(knobs.log_limits)
        self._iommu = DirtyLog()
        self.dma = DmaPort(self._mappings, self._log, self._iommu, f"{name}-dma-written")
        self.dma.logging = "unlogged" not in knobs.faults
        self.dma.journal = WriteJournal() if knobs.trace else None
        self._faults = OneTimeFaults(name, knobs.faults)
        self._migration = Migration(self, state_format, knobs, self._faults)
        self.migration_flags: MigrationFlags = knobs.flags
        self.dma_logging: bool = knobs.dma_logging
        self.extension = Extension(p2p=bool(knobs.flags & MigrationFlags.P2P), iommu_dirty=True, trace=knobs.trace)

    # What a kind adds.

    @abstractmethod
    def step(self, now: float) -> float | None:
        """Work for about a millisecond while the device runs; return in how many seconds again, None: when woken."""

    @abstractmethod
    def bar_read(self, index: int, offset: int, count: int) -> bytes:
        """Read from a BAR, within it."""

    @abstractmethod
    def bar_write(self, index: int, offset: int, data: Buffer) -> None:
        """Write to a BAR, within it; raise OSError (EINVAL) if registers are not accessed as registers."""

    @abstractmethod
    def interrupt_pending(self) -> bool:
        """Tell whether there is a reason for INTx that the driver has not acknowledged."""

    @abstractmethod
    def reset_kind(self) -> None:
        """Return to what the device is after reset. The caller holds the engine's lock."""

    @abstractmethod
    def save_state(self) -> bytes:
        """Return the state beside device memory. The caller holds the engine's lock."""

    @abstractmethod
    def load_state(self, state: bytes) -> None:
        """Take over a state that another device of this kind has saved; raise ValueError, with nothing changed."""

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
        self._intx.close()
        self._msix.close()
        self._mappings.clear()

    def reset(self) -> None:
        """Reset the device (kernel: VFIO_DEVICE_RESET): it is in RUNNING, from wherever it was, and its log is lost.

        Mappings, eventfds and configuration stay, which are the VMM's, and the dirty bits of the IOMMU.
        """
        self._faults.reach("fail_reset")
        with self._engine.lock:
            self._log.stop()
            self._msix.reset()
            self._engine.take_ring()
            self.reset_kind()
            self._migration.reset()
            self._state_changed()

    # Regions and interrupts.

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read from a region, within it."""
        if index != _CONFIG_REGION:
            return self.bar_read(index, offset, count)
        self._config.show_interrupt(pending=self.interrupt_pending())
        return self._config.read(offset, count)

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """Write to a region, within it; raise OSError (EINVAL) if registers are not accessed as registers."""
        if index != _CONFIG_REGION:
            self.bar_write(index, offset, data)
            return
        master = self._config.bus_master
        self._config.write(offset, data)
        if master and not self._config.bus_master:
            # A device whose bus mastering is switched off does no DMA once that is answered. Nothing else may wait for
            # a step: QEMU carries no DMA message while one of its CPUs waits for an answer.
            with self._engine.lock:
                pass
        self._intx.update()
        self._engine.wake()

    def set_irqs(self, index: int, flags: IrqFlags, start: int, count: int, data: Buffer, fds: Sequence[int]) -> None:
        """Set up INTx (see `Intx.set_irqs`) or the vectors of MSI-X (see `Msix.set_irqs`)."""
        with self._engine.watching:  # not the engine's: see region_write
            if index == INTX_INDEX:
                self._intx.set_irqs(flags, count, data, fds)
            elif index == MSIX_INDEX:
                self._msix.set_irqs(flags, start, count, data, fds)
        # To turn off what is not there changes nothing.

    def io_fds(self, index: int) -> list[IoEventFd]:  # noqa: ARG002 - for the kinds that have a doorbell
        """Return the eventfds that stand for writes to a region."""
        return []

    # DMA.

    def dma_map(self, iova: int, size: int, flags: int, offset: int, fd: int | None) -> None:
        """Map memory for DMA (see `Mappings.add`); `flags`: DMA_READABLE, DMA_WRITABLE."""
        self._faults.reach("fail_map")
        readable, writable = bool(flags & DMA_READABLE), bool(flags & DMA_WRITABLE)
        with self._engine.lock:
            self._mappings.add(iova, size, readable=readable, writable=writable, fd=fd, offset=offset)

    def dma_unmap(self, iova: int, size: int, page_size: int | None) -> bytes | None:
        """Unmap memory; DMA to it has ended when this returns.

        With `page_size` return what the logs that run have of the range, and clear it; OSError as `Mappings.remove` and
        `DirtyLog.report`, with nothing unmapped. An IOMMU keeps its bits in the page table: they go with the mapping.
        """
        self._faults.reach("fail_unmap")
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
            self._iommu.discard(ALL_IOVAS.iova, ALL_IOVAS.length)
            self._mappings.clear()

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        """Start the log of DMA writes; return the page size in bytes (see `DirtyLog.start`)."""
        self._faults.reach("fail_logging_start")
        with self._engine.lock:
            return self._log.start(page_size, ranges)

    def logging_stop(self) -> None:
        """Stop the log and lose what it has."""
        self._faults.reach("fail_logging_stop")
        with self._engine.lock:
            self._log.stop()

    def logging_report(self, iova: int, length: int, page_size: int) -> memoryview:
        """Return and clear what the log has of a range (see `DirtyLog.report`)."""
        self._faults.reach("fail_logging_report")
        with self._engine.lock:
            return self._log.report(iova, length, page_size)

    def iommu_dirty_start(self, page_size: int) -> int:
        """Start the dirty bits of the IOMMU, for all that is mapped; return their page size in bytes."""
        with self._engine.lock:
            return self._iommu.start(page_size, (ALL_IOVAS,))

    def iommu_dirty_stop(self) -> None:
        """Stop them and lose what they have."""
        with self._engine.lock:
            self._iommu.stop()

    def iommu_dirty_report(self, iova: int, length: int, page_size: int) -> memoryview:
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

    # The engine.

    def _state_changed(self) -> None:
        self.dma.peers = self._migration.state not in P2P_STATES
        self._engine.listening = self._migration.running
        self._engine.wake()

    def _step(self, now: float) -> float | None:
        if not self._migration.running and hooks.guarded("late-dma"):
            return None
        self.dma.bus_master = self._config.bus_master
        self._intx.update()
        return self.step(now)
