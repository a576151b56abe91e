"""Devices without processes, and a destination that tells whether a page was lost."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import numpy as np

from common.iommu.container import Container
from common.iommu.tracking import DeviceTraits
from common.memory.bitmap import DirtyBitmap, Words, pages_of
from common.memory.layout import PAGE_SIZE, Layout
from common.vfio.dirty_log import DirtyLog, LogLimits
from common.vfio.feature import Range

RAM_SIZE = 4 << 20
PAGES = RAM_SIZE // PAGE_SIZE
NO_LIMITS = LogLimits()
WAIT = 20  # seconds after which a thread that should go on is taken for dead


class Ram:
    """RAM in which each page is its version: how often it was written."""

    def __init__(self, size: int = RAM_SIZE) -> None:
        self.fd = -1
        self.layout = Layout(size)
        self.bytes = np.zeros(size, np.uint8)
        self._versions = self.bytes.reshape(-1, PAGE_SIZE)[:, :8].view("<u8")

    @property
    def versions(self) -> np.ndarray:
        return self._versions[:, 0]

    def write(self, page: int) -> None:
        self._versions[page, 0] += 1


class Destination:
    """What a migration does with the bitmap: take it, then read the pages."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.dirty = DirtyBitmap(ram.layout.pages)
        self.copy = ram.versions.copy()

    def round(self) -> set[int]:
        pages = pages_of(self.dirty.take())
        self.copy[pages] = self.ram.versions[pages]
        return set(pages.tolist())

    def lost(self) -> list[int]:
        return np.flatnonzero(self.copy != self.ram.versions).tolist()


class Device:
    """Strict as hardware: logs only armed ranges, one START at a time, loses its log at STOP.

    `unmap_bitmap`: takes DMA_UNMAP with a bitmap; `outlives`: its log keeps the bits of a mapping that is gone;
    `exact`: REPORT only takes a mapping; `clears_granule`: a report of a part of a large page clears all of it;
    `errors`: errno by name of a request; `on`: called inside a request, by name, before it does anything.
    """

    def __init__(
        self,
        name: str,
        ram: Ram,
        *,
        unmap_bitmap: bool = True,
        outlives: bool = False,
        exact: bool = False,
        clears_granule: bool = False,
        logging: bool = True,
        iommu: bool = False,
        limits: LogLimits = NO_LIMITS,
    ) -> None:
        self.name = name
        self.ram = ram
        self.unmap_bitmap = unmap_bitmap
        self.outlives = outlives
        self.exact = exact
        self.clears_granule = clears_granule
        self.log = DirtyLog(limits)
        self.traits = DeviceTraits(name, logging, iommu, report_ranges=not exact, log_outlives_mapping=outlives)
        self.granule = PAGE_SIZE
        self.maps: dict[int, tuple[int, int, int]] = {}
        self.errors: dict[str, int] = {}
        self.on: dict[str, Callable[[], None]] = {}
        self.calls: list[str] = []
        self.reports: list[Range] = []
        self.armed: list[Range] = []

    def _enter(self, request: str) -> None:
        self.calls.append(request)
        if request in self.on:
            self.on[request]()
        if request in self.errors:
            raise OSError(self.errors[request], f"{self.name}: {request}: {os.strerror(self.errors[request])}")

    def dma_map(self, iova: int, size: int, flags: int, fd: int | None, offset: int) -> None:
        self._enter("map")
        if any(at < iova + size and iova < at + length for at, (length, _, _) in self.maps.items()):
            raise OSError(errno.EEXIST, "overlap")
        self.maps[iova] = (size, -1 if fd is None else offset, flags)

    def dma_unmap(self, iova: int, size: int, *, bitmap: bool) -> Words | None:
        self._enter("unmap")
        if self.maps[iova][0] != size:
            raise OSError(errno.EINVAL, "no such mapping")
        del self.maps[iova]
        words = None
        if bitmap and self.unmap_bitmap:
            words = self._take(iova, size) if self.log.active else np.zeros(-(-size // PAGE_SIZE // 64), np.uint64)
        elif self.log.active and not self.outlives:
            self._take(iova, size)
        return words

    def logging_start(self, page_size: int, ranges: list[Range]) -> int:
        self._enter("start")
        self.granule = self.log.start(max(page_size, self.granule), ranges)
        self.armed = list(ranges)
        return self.granule

    def logging_stop(self) -> None:
        self._enter("stop")
        self.log.stop()

    def logging_report(self, iova: int, length: int, page_size: int) -> Words:
        self._enter("report")
        self.reports.append(Range(iova, length))
        if self.exact and (iova not in self.maps or self.maps[iova][0] != length):
            raise OSError(errno.EINVAL, "not a mapping")
        assert page_size == PAGE_SIZE
        if not self.log.active:
            raise OSError(errno.EINVAL, "not active")
        return self._take(iova, length)

    # The IOMMU in front of it: the same log, without ranges.
    def iommu_dirty_start(self, page_size: int) -> int:
        self.log = DirtyLog()
        return self.logging_start(page_size, [Range(0, 1 << 62)])

    def iommu_dirty_stop(self) -> None:
        self.logging_stop()

    def iommu_dirty_report(self, iova: int, length: int, page_size: int) -> Words:
        return self.logging_report(iova, length, page_size)

    def _take(self, iova: int, length: int) -> Words:
        words = np.frombuffer(self.log.report(iova, length, PAGE_SIZE), np.uint64)
        if self.clears_granule:
            low, high = iova // self.granule * self.granule, -(-(iova + length) // self.granule) * self.granule
            self.log.report(low, high - low, PAGE_SIZE)
        return words

    def write(self, iova: int) -> None:
        """Write one page by DMA: first the memory, then the log."""
        for at, (size, offset, flags) in self.maps.items():
            if at <= iova < at + size and flags & 2 and offset >= 0:
                self.ram.write((offset + iova - at) // PAGE_SIZE)
                self.log.mark(iova, PAGE_SIZE)
                return
        raise OSError(errno.EFAULT, "fault")

    @property
    def writable(self) -> list[int]:
        """IOVAs of pages of RAM that it can write."""
        return [
            iova
            for at, (size, offset, flags) in sorted(self.maps.items())
            if flags & 2 and offset >= 0
            for iova in range(at, at + size, PAGE_SIZE)
        ]


class NoTurn:
    """A lock that does not lock: what happens without the guard."""

    waiting = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def container_of(ram: Ram, *devices: Device, cls: type[Container] = Container, **more: object) -> Container:
    return cls("dma0", ram, devices, [device.traits for device in devices], **more)


def beside(work: Callable[[], object]) -> threading.Thread:
    """Run something on another thread; `join_all` sees that it ends."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is sure to happen."""
    for _ in range(WAIT * 1000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("never happened")


def finish(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), "blocked"
