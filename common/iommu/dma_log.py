"""The dirty logs of all devices of a container, driven as one (QEMU series patches 9 and 11).

All of them are started or none is; a report is the union of all; what cannot be stopped is only said. A request waits
for the device's engine, so each is made in the machine's turn: where a method does not take the turn itself, the
caller has it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.iommu.device import DmaDevice, IommuDirtyDevice
from common.iommu.iova_tree import Mapping
from common.iommu.tracking import DeviceTraits, MethodKind
from common.iommu.turn import Turn
from common.memory.bitmap import Words, empty, words_for
from common.memory.layout import PAGE_SIZE
from common.vfio.feature import Range

__all__ = ["DmaLog", "device_error", "fits"]

_log = logging.getLogger(__name__)

_LARGEST_PAGE = 1 << 30


def device_error(error: OSError, text: str) -> OSError:
    """Return an error with the same errno that says `text` and the errno's meaning."""
    number = error.errno or errno.EIO
    return OSError(number, f"{text}: {os.strerror(number)}")


@dataclass(slots=True, eq=False)
class _DeviceLog:
    device: DmaDevice
    requests: str  # what the names of its requests begin with
    outlives_mapping: bool
    any_page_size: bool  # REPORT takes another page size than START's
    start: Callable[[Sequence[Range]], int]
    stop: Callable[[], None]
    report: Callable[[int, int, int], Words]
    page_size: int = PAGE_SIZE  # bytes; what START has answered

    def pages(self, iova: int, length: int) -> Words:
        """Return and clear the log of a range, one bit for 4 KiB; a bit of a larger page stands for all of it."""
        asked = PAGE_SIZE if self.any_page_size else self.page_size
        words = self.report(iova, length, asked)
        if asked == PAGE_SIZE or not fits(words, length // asked):
            return words
        bits = np.unpackbits(words.view(np.uint8), count=length // asked, bitorder="little")
        spread = empty(length // PAGE_SIZE)
        packed = np.packbits(np.repeat(bits, asked // PAGE_SIZE), bitorder="little")
        spread.view(np.uint8)[: packed.size] = packed
        return spread


class DmaLog:
    """The logs of the devices of a container, by their own logging or by their IOMMUs'."""

    def __init__(
        self,
        container: str,
        devices: Sequence[DmaDevice],
        traits: Sequence[DeviceTraits],
        kind: MethodKind,
        turn: Turn,
    ) -> None:
        """`kind` is "device" or "iommu"; TypeError if a device declares IOMMU dirty bits but has no way to ask."""
        self._container = container
        self._turn = turn
        open_log = _own_log if kind == "device" else _iommu_log
        self._logs = [open_log(device, its) for device, its in zip(devices, traits, strict=True)]
        self.arbitrary = all(its.report_ranges for its in traits)
        # Largest page size in bytes that a device logs with.
        self.granule = PAGE_SIZE
        self._running: list[_DeviceLog] = []

    def start(self, ranges: Sequence[Range]) -> None:
        """Start every log with `ranges`, or none: OSError names the device that refused.

        A log whose STOP failed in an earlier session is stopped first; it would refuse a second START.
        """
        self.stop()
        granule = PAGE_SIZE
        for log in self._logs:
            try:
                with self._turn:
                    used = log.start(ranges)
            except OSError as error:
                self.stop()
                text = (
                    f"{self._container}: {log.device.name}: cannot start DMA logging of {len(ranges)} ranges "
                    f"({log.requests}_START)"
                )
                raise device_error(error, text) from error
            if log not in self._running:
                self._running.append(log)
            if not PAGE_SIZE <= used <= _LARGEST_PAGE or used & (used - 1):
                self.stop()
                text = f"{self._container}: {log.device.name}: logs pages of {used} bytes, which cannot be reported"
                raise OSError(errno.EPROTO, text)
            log.page_size = used
            granule = max(granule, used)
        self.granule = granule

    def stop(self) -> None:
        """Stop every log that runs; failures are only logged (M11: by then the migration is decided)."""
        failed = []
        for log in self._running:
            try:
                with self._turn:
                    log.stop()
            except OSError as error:
                failed.append(log)
                text = f"{self._container}: {log.device.name}: cannot stop DMA logging ({log.requests}_STOP)"
                _log.warning("%s", device_error(error, text).strerror)
        self._running = failed

    def report(self, window: Range) -> Words:
        """Return and clear the union of all logs for a window, one bit for 4 KiB; the caller has the turn.

        OSError names the device; then all logs must be considered lost, for some have been cleared.
        """
        pages = window.length // PAGE_SIZE
        union: Words | None = None
        for log in self._logs:
            text = (
                f"{self._container}: {log.device.name}: cannot get the DMA log of IOVA {window.iova:#x} "
                f"size {window.length:#x} ({log.requests}_REPORT)"
            )
            try:
                words = log.pages(window.iova, window.length)
            except OSError as error:
                raise device_error(error, text) from error
            if not fits(words, pages):
                raise OSError(errno.EPROTO, f"{text}: the answer is no bitmap of {pages} pages")
            union = words if union is None else union | words
        return empty(pages) if union is None else union

    def page_size(self, index: int) -> int:
        """Return the bytes of the pages that the device at `index` logs."""
        return self._logs[index].page_size

    def report_unmapped(self, index: int, mapping: Mapping) -> Words | None:
        """Return what the device at `index` wrote to a mapping that it has given up; None if its log cannot tell.

        The caller has the turn. After the unmap is in time where the log keeps the bits; before it would miss what is
        written in between (QEMU series patch 11, as reviewed). OSError as `report`.
        """
        log = self._logs[index]
        if not log.outlives_mapping:
            return None
        try:
            return log.pages(mapping.iova, mapping.size)
        except OSError as error:
            text = (
                f"{self._container}: {log.device.name}: cannot get the DMA log after the unmap of IOVA "
                f"{mapping.iova:#x} size {mapping.size:#x} ({log.requests}_REPORT)"
            )
            raise device_error(error, text) from error


def _own_log(device: DmaDevice, traits: DeviceTraits) -> _DeviceLog:
    return _DeviceLog(
        device,
        "DMA_LOGGING",
        traits.log_outlives_mapping,
        traits.report_ranges,
        lambda ranges: device.logging_start(PAGE_SIZE, ranges),
        device.logging_stop,
        device.logging_report,
    )


def _iommu_log(device: DmaDevice, _traits: DeviceTraits) -> _DeviceLog:
    if not isinstance(device, IommuDirtyDevice):
        raise TypeError(f"{device.name} declares dirty bits of an IOMMU but has no requests for them")
    # An IOMMU keeps its bits in the page table: they go with the mapping.
    return _DeviceLog(
        device,
        "IOMMU_DIRTY",
        outlives_mapping=False,
        any_page_size=True,
        start=lambda _ranges: device.iommu_dirty_start(PAGE_SIZE),
        stop=device.iommu_dirty_stop,
        report=device.iommu_dirty_report,
    )


def fits(words: Words, pages: int) -> bool:
    """Whether an answer is a bitmap of so many pages; what a device says is checked before it is used."""
    return words.shape == (words_for(pages),) and not (pages % 64 and int(words[-1]) >> pages % 64)
