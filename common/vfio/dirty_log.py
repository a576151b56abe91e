"""A device's own log of the pages that it has written (kernel: DMA logging).

The log is as strict as a card's: it records only what lies in the ranges that it was started with, it can be started
once at a time, it is lost when it stops, and it has limits.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.vfio.feature import (
    LOG_MAX_RANGES,
    MIN_PAGE_SIZE,
    LoggingReport,
    Range,
    bitmap_bytes,
    check_logging_report,
    check_logging_start,
)

__all__ = ["MAX_BITMAP_BYTES", "DirtyLog", "LogLimits"]

MAX_BITMAP_BYTES = 256 << 20
"""Largest bitmap of one report: 8 TiB of 4 KiB pages, as for the kernel's type1 IOMMU."""

# Bits stand for 4 KiB whatever page size the log was started with: marks are widened to that size, and a report of a
# part of a big page then clears that part and nothing beside it.
_SHIFT = 12
_WINDOW_SHIFT = 26
_WINDOW_SIZE = 1 << _WINDOW_SHIFT
_WINDOW_BYTES = _WINDOW_SIZE >> _SHIFT >> 3


@dataclass(frozen=True, slots=True)
class LogLimits:
    """What a device's log can do.

    `max_ranges` in one start; all ranges together at most 2**`max_bits` bytes (None: no limit); `page_sizes` in bytes,
    powers of two from 4096.
    """

    max_ranges: int = LOG_MAX_RANGES
    max_bits: int | None = None
    page_sizes: tuple[int, ...] = (MIN_PAGE_SIZE,)

    def __post_init__(self) -> None:
        if self.max_ranges < 1 or not self.page_sizes:
            raise ValueError("a log has at least one range and one page size")
        for size in self.page_sizes:
            if size < MIN_PAGE_SIZE or size & (size - 1):
                raise ValueError(f"page size {size} is no power of two from {MIN_PAGE_SIZE}")


class DirtyLog:
    """Pages written since the last report, sparse over the whole 64-bit IOVA space.

    Not thread-safe: whoever owns it marks and reports under one lock, for a page must be marked after it was written
    and before anybody is told that it was not.
    """

    def __init__(self, limits: LogLimits = LogLimits()) -> None:
        self._limits = limits
        self._windows: dict[int, bytearray] = {}
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._page_size = 0

    @property
    def active(self) -> bool:
        """Whether the log is started."""
        return self._page_size != 0

    def start(self, page_size: int, ranges: Sequence[Range]) -> int:
        """Start logging `ranges` with an empty log; return the page size that is used, in bytes.

        That is `page_size` if the log has it, else the next smaller one, else its smallest. OSError: as
        `check_logging_start`, and EINVAL (started already), E2BIG (more ranges than the device has), EOPNOTSUPP (ranges
        larger than the device can log).
        """
        if self.active:
            raise OSError(errno.EINVAL, "DMA logging is started already")
        check_logging_start(page_size, ranges)
        if len(ranges) > self._limits.max_ranges:
            raise OSError(errno.E2BIG, f"{len(ranges)} ranges to log, the device has {self._limits.max_ranges}")
        total = sum(item.length for item in ranges)
        if self._limits.max_bits is not None and total > 1 << self._limits.max_bits:
            raise OSError(errno.EOPNOTSUPP, f"0x{total:x} bytes to log, the device can do 2^{self._limits.max_bits}")
        ordered = sorted(ranges)
        self._starts = [item.iova for item in ordered]
        self._ends = [item.iova + item.length for item in ordered]
        sizes = sorted(self._limits.page_sizes)
        self._page_size = max((size for size in sizes if size <= page_size), default=sizes[0])
        return self._page_size

    def stop(self) -> None:
        """Stop logging and lose what was logged; nothing happens if it is not started."""
        self._windows.clear()
        self._starts.clear()
        self._ends.clear()
        self._page_size = 0

    def mark(self, iova: int, length: int) -> None:
        """Record that `length` bytes at `iova` have been written; what no range covers is not recorded."""
        if not self._page_size or length <= 0:
            return
        end = iova + length
        index = max(bisect_right(self._starts, iova) - 1, 0)
        while index < len(self._starts) and self._starts[index] < end:
            low, high = max(iova, self._starts[index]), min(end, self._ends[index])
            if low < high:
                low = max(low & -self._page_size, self._starts[index])
                high = min(-(-high & -self._page_size), self._ends[index])
                self._set(low >> _SHIFT, -(-high >> _SHIFT))
            index += 1

    def report(self, iova: int, length: int, page_size: int) -> memoryview:
        """Return and clear what was logged of `length` bytes at `iova`, any part of the ranges or none of them.

        The bitmap is in whole little-endian 64-bit words; bit n stands for the page of `page_size` bytes (any power of
        two from 4096) at `iova + n * page_size`, and is set if any part of it was written. OSError: as
        `check_logging_report`, and EINVAL (not started, or no whole 4 KiB pages), E2BIG (more than `MAX_BITMAP_BYTES`).
        """
        check_logging_report(LoggingReport(iova, length, page_size))
        if not self.active:
            raise OSError(errno.EINVAL, "DMA logging is not started")
        if (iova | length) % MIN_PAGE_SIZE:
            raise OSError(errno.EINVAL, f"0x{iova:x} + 0x{length:x} is no run of {MIN_PAGE_SIZE}-byte pages")
        size = bitmap_bytes(length, page_size)
        if size > MAX_BITMAP_BYTES:
            raise OSError(errno.E2BIG, f"a bitmap of {size} bytes, at most {MAX_BITMAP_BYTES} are possible")
        bitmap = np.zeros(size, dtype=np.uint8)
        first, last = iova >> _SHIFT, (iova + length) >> _SHIFT
        ratio = page_size >> _SHIFT
        for window in self._windows_in(iova, iova + length):
            base = window << (_WINDOW_SHIFT - _SHIFT)
            low, high = max(first, base), min(last, base + _WINDOW_BYTES * 8)
            if ratio == 1 and high - low == _WINDOW_BYTES * 8 and (base - first) % 8 == 0:
                # All of it, bit for bit: most windows of a large report.
                at = (base - first) >> 3
                bitmap[at : at + _WINDOW_BYTES] = np.frombuffer(self._windows.pop(window), dtype=np.uint8)
                continue
            pages = self._take(window, low - base, high - base)
            if pages.size:
                numbers = (pages + (base - first)) // ratio
                start = int(numbers[0]) & ~7
                dirty = np.zeros(int(numbers[-1]) + 1 - start, dtype=np.bool_)
                dirty[numbers - start] = True
                packed = np.packbits(dirty, bitorder="little")
                bitmap[start >> 3 : (start >> 3) + packed.size] |= packed
        return bitmap.data

    def discard(self, iova: int, length: int) -> None:
        """Forget what was logged of `length` bytes at `iova`, whole 4 KiB pages; nothing happens if not started."""
        first, last = iova >> _SHIFT, (iova + length) >> _SHIFT
        for window in self._windows_in(iova, iova + length):
            base = window << (_WINDOW_SHIFT - _SHIFT)
            self._take(window, max(first, base) - base, min(last, base + _WINDOW_BYTES * 8) - base)

    def _take(self, window: int, low: int, high: int) -> npt.NDArray[np.int64]:
        """Clear the bits from `low` up to `high` of a window, and return the numbers of those that were set."""
        bits = np.unpackbits(np.frombuffer(self._windows[window], dtype=np.uint8), bitorder="little")
        pages = np.flatnonzero(bits[low:high]) + low
        bits[low:high] = 0
        if bits.any():
            self._windows[window] = bytearray(np.packbits(bits, bitorder="little"))
        else:
            del self._windows[window]
        return pages

    def _windows_in(self, iova: int, end: int) -> list[int]:
        first, last = iova >> _WINDOW_SHIFT, (end - 1) >> _WINDOW_SHIFT
        if last - first < len(self._windows):
            return [window for window in range(first, last + 1) if window in self._windows]
        return [window for window in self._windows if first <= window <= last]

    def _set(self, first: int, last: int) -> None:
        """Set the bits of the 4 KiB pages from `first` up to `last`, which is not one of them."""
        while first < last:
            window = first >> (_WINDOW_SHIFT - _SHIFT)
            base = window << (_WINDOW_SHIFT - _SHIFT)
            low, high = first - base, min(last - base, _WINDOW_BYTES * 8)
            words = self._windows.get(window)
            if words is None:
                words = self._windows[window] = bytearray(_WINDOW_BYTES)
            start, stop = low >> 3, (high - 1) >> 3
            head, tail = 0xFF << (low & 7) & 0xFF, 0xFF >> (7 - (high - 1 & 7))
            if start == stop:
                words[start] |= head & tail
            else:
                words[start] |= head
                words[stop] |= tail
                words[start + 1 : stop] = b"\xff" * (stop - start - 1)
            first = base + high
