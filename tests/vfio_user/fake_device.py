"""A device for tests: plain memory as regions, a real log, a state that is a byte string."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.vfio.dirty_log import DirtyLog
from common.vfio.feature import PrecopyInfo, Range
from common.vfio.migration import DeviceState, MigrationFlags, path
from common.vfio_user.capabilities import Extension
from common.vfio_user.client import VfioUserClient
from common.vfio_user.description import IoEventFd, IrqFlags, IrqInfo, RegionFlags, RegionInfo
from common.vfio_user.device import MessageDma
from common.vfio_user.server import VfioUserServer

READ_WRITE = RegionFlags.READ | RegionFlags.WRITE


class FakeDevice:
    name = "fake"

    def __init__(self) -> None:
        self.regions: list[RegionInfo] = [RegionInfo(index) for index in range(9)]
        self.regions[0] = RegionInfo(0, READ_WRITE, 0x1000)
        self.regions[1] = RegionInfo(1, READ_WRITE, 3 << 20)
        self.regions[7] = RegionInfo(7, READ_WRITE, 0x100)
        self.irqs = [IrqInfo(0, 1, 1), IrqInfo(1), IrqInfo(2, 1, 40), IrqInfo(3), IrqInfo(4)]
        self.migration_flags = MigrationFlags(7)
        self.dma_logging = True
        self.extension = Extension()
        self.memory = {region.index: bytearray(region.size) for region in self.regions}
        self.state = DeviceState.RUNNING
        self.log = DirtyLog()
        self.iommu = DirtyLog()
        self.mappings: dict[int, tuple[int, int, int, bytes | None]] = {}
        self.stream = b""
        self.written = bytearray()
        self.eventfds: list[IoEventFd] = []
        self.irq_calls: list[tuple[int, int, int, int, bytes, int]] = []
        self.resets = 0
        self.dma: MessageDma | None = None
        self.gone = threading.Event()
        self.refuse: int | None = None

    def connected(self, dma: MessageDma) -> None:
        self.dma = dma

    def disconnected(self) -> None:
        self.gone.set()

    def reset(self) -> None:
        self.resets += 1
        self.state = DeviceState.RUNNING
        self.log.stop()

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        if self.refuse:
            raise OSError(self.refuse, "told to")
        return bytes(self.memory[index][offset : offset + count])

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        self.memory[index][offset : offset + len(data)] = data

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        return self.eventfds if index == 0 else []

    def set_irqs(self, index: int, flags: IrqFlags, start: int, count: int, data: bytes, fds: Sequence[int]) -> None:
        for fd in fds:
            os.eventfd_write(fd, start + 1)
        self.irq_calls.append((index, int(flags), start, count, bytes(data), len(fds)))

    def dma_map(self, iova: int, size: int, flags: int, offset: int, fd: int | None) -> None:
        self.mappings[iova] = (size, flags, offset, None if fd is None else os.pread(fd, 4, offset))

    def dma_unmap(self, iova: int, size: int, page_size: int | None) -> bytes | None:
        if iova not in self.mappings or self.mappings[iova][0] != size:
            raise OSError(errno.ENOENT, "not mapped")
        bitmap = None if page_size is None else self.log.report(iova, size, page_size)
        del self.mappings[iova]
        return bitmap

    def dma_unmap_all(self) -> None:
        self.mappings.clear()

    def get_state(self) -> DeviceState:
        return self.state

    def set_state(self, state: DeviceState) -> None:
        for step in path(self.state, state, self.migration_flags):
            self.state = step

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        return self.log.start(page_size, ranges)

    def logging_stop(self) -> None:
        self.log.stop()

    def logging_report(self, iova: int, length: int, page_size: int) -> bytes:
        return self.log.report(iova, length, page_size)

    def iommu_dirty_start(self, page_size: int) -> int:
        return self.iommu.start(page_size, [Range(0, 1 << 62)])

    def iommu_dirty_stop(self) -> None:
        self.iommu.stop()

    def iommu_dirty_report(self, iova: int, length: int, page_size: int) -> bytes:
        return self.iommu.report(iova, length, page_size)

    def stop_copy_length(self) -> int:
        return len(self.stream)

    def precopy_info(self) -> PrecopyInfo:
        return PrecopyInfo(len(self.stream), 7)

    def mig_data_read(self, size: int) -> bytes:
        data, self.stream = self.stream[:size], self.stream[size:]
        return data

    def mig_data_write(self, data: bytes) -> None:
        self.written += data


@contextmanager
def serving(device: FakeDevice, *, strict: bool = True) -> Iterator[socket.socket]:
    """Serve `device` on a thread, and give the client's end of the connection."""
    ours, theirs = socket.socketpair()
    server = VfioUserServer(device, theirs, strict=strict)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def connected(device: FakeDevice, **options: object) -> Iterator[VfioUserClient]:
    """Serve `device` on a thread, and connect to it."""
    with serving(device) as sock, VfioUserClient(sock, "fake0", **options) as client:  # type: ignore[arg-type]
        yield client
