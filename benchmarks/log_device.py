"""python -m benchmarks.log_device SOCKET: a vfio-user device without DMA, which logs what it is told to have written.

Region 0 takes IOVAs of pages as 64-bit numbers. So a benchmark decides what is written where, and requests still cross
a socket to another process, as those to any device do.
"""

# ruff: noqa: D102, ARG002 - what the methods are is said by common.vfio_user.device.Device
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.memory.allocator import tune_allocator
from common.memory.layout import PAGE_SIZE
from common.vfio.dirty_log import DirtyLog
from common.vfio.feature import Buffer, PrecopyInfo, Range
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.capabilities import Extension
from common.vfio_user.description import IoEventFd, IrqFlags, IrqInfo, RegionFlags, RegionInfo
from common.vfio_user.device import MessageDma
from common.vfio_user.server import VfioUserServer, listen

__all__ = ["LogDevice"]

_WINDOW = 1 << 20


class LogDevice:
    """The device; it remembers nothing but its log."""

    name = "log"
    migration_flags = MigrationFlags.STOP_COPY
    dma_logging = True

    def __init__(self) -> None:
        self.regions: Sequence[RegionInfo] = [RegionInfo(0, RegionFlags.WRITE, _WINDOW)]
        self.irqs: Sequence[IrqInfo] = []
        self.extension = Extension()
        self._log = DirtyLog()

    def connected(self, dma: MessageDma) -> None:
        pass

    def disconnected(self) -> None:
        pass

    def reset(self) -> None:
        self._log.stop()

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        return bytes(count)

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        for iova in np.frombuffer(data, "<u8").tolist():
            self._log.mark(iova, PAGE_SIZE)

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        return []

    def set_irqs(self, index: int, flags: IrqFlags, start: int, count: int, data: Buffer, fds: Sequence[int]) -> None:
        pass

    def dma_map(self, iova: int, size: int, flags: int, offset: int, fd: int | None) -> None:
        pass

    def dma_unmap(self, iova: int, size: int, page_size: int | None) -> Buffer | None:
        return None if page_size is None else self._log.report(iova, size, page_size)

    def dma_unmap_all(self) -> None:
        pass

    def get_state(self) -> DeviceState:
        return DeviceState.RUNNING

    def set_state(self, state: DeviceState) -> None:
        pass

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        return self._log.start(page_size, ranges)

    def logging_stop(self) -> None:
        self._log.stop()

    def logging_report(self, iova: int, length: int, page_size: int) -> Buffer:
        return self._log.report(iova, length, page_size)

    def write_journal(self, iova: int, length: int, limit: int) -> Buffer:
        raise NotImplementedError

    def iommu_dirty_start(self, page_size: int) -> int:
        raise NotImplementedError

    def iommu_dirty_stop(self) -> None:
        raise NotImplementedError

    def iommu_dirty_report(self, iova: int, length: int, page_size: int) -> Buffer:
        raise NotImplementedError

    def stop_copy_length(self) -> int:
        return 0

    def precopy_info(self) -> PrecopyInfo:
        return PrecopyInfo(0, 0)

    def mig_data_read(self, size: int) -> Buffer:
        return b""

    def mig_data_write(self, data: Buffer) -> None:
        pass


if __name__ == "__main__":
    tune_allocator()  # as device processes do
    with listen(Path(sys.argv[1])) as listener:
        connection, _ = listener.accept()
        VfioUserServer(LogDevice(), connection).serve()
