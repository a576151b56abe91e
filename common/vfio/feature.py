"""Device features: their numbers, their payloads, and the checks that a kernel makes before a driver sees them.

Payloads are little-endian. They are laid out as a byte stream carries them: what the kernel's structs point at
(the ranges of DMA_LOGGING_START, the bitmap of DMA_LOGGING_REPORT) follows the fixed part.
"""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from common.vfio.migration import DeviceState, MigrationFlags

__all__ = [
    "FEATURE_GET",
    "FEATURE_MASK",
    "FEATURE_PROBE",
    "FEATURE_SET",
    "LOG_MAX_RANGES",
    "MIN_PAGE_SIZE",
    "Buffer",
    "DeviceFeature",
    "LoggingReport",
    "LoggingStart",
    "PrecopyInfo",
    "Range",
    "bitmap_bytes",
    "check_logging_report",
    "check_logging_start",
    "pack_data_size",
    "pack_device_state",
    "pack_migration_flags",
    "unpack_data_size",
    "unpack_device_state",
    "unpack_fixed",
    "unpack_migration_flags",
]

Buffer = bytes | bytearray | memoryview

FEATURE_MASK: Final = 0xFFFF
FEATURE_GET: Final = 1 << 16
FEATURE_SET: Final = 1 << 17
FEATURE_PROBE: Final = 1 << 18

LOG_MAX_RANGES: Final = 256
"""Ranges in one DMA_LOGGING_START (kernel: LOG_MAX_RANGES, a 4 KiB page of them)."""

MIN_PAGE_SIZE: Final = 4096
"""Smallest page size of a DMA_LOGGING_REPORT, in bytes."""

_ADDRESS_SPACE: Final = 1 << 64


class DeviceFeature(IntEnum):
    """Features that a device may have (kernel: VFIO_DEVICE_FEATURE_*)."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """A range of device addresses, in bytes (kernel: struct vfio_device_feature_dma_logging_range)."""

    iova: int
    length: int


@dataclass(frozen=True, slots=True)
class PrecopyInfo:
    """What can be read from a device in PRE_COPY now, in bytes (kernel: struct vfio_precopy_info).

    `initial_bytes` only decreases, and a device is best stopped after it has reached 0; `dirty_bytes` comes and goes.
    Neither tells how much STOP_COPY will bring.
    """

    initial_bytes: int
    dirty_bytes: int

    _LAYOUT = struct.Struct("<QQ")

    def pack(self) -> bytes:
        """Return the payload."""
        return self._LAYOUT.pack(self.initial_bytes, self.dirty_bytes)

    @classmethod
    def unpack(cls, data: Buffer) -> PrecopyInfo:
        """Read the payload; raise ValueError if it is short."""
        return cls(*unpack_fixed(cls._LAYOUT, data, "PRECOPY_INFO"))


@dataclass(frozen=True, slots=True)
class LoggingStart:
    """Payload of DMA_LOGGING_START (kernel: struct vfio_device_feature_dma_logging_control).

    In the answer `page_size`, in bytes, is the one that the device uses.
    """

    page_size: int
    ranges: tuple[Range, ...]

    _LAYOUT = struct.Struct("<QII")
    _RANGE = struct.Struct("<QQ")

    def pack(self) -> bytes:
        """Return the payload."""
        parts = [self._LAYOUT.pack(self.page_size, len(self.ranges), 0)]
        parts += [self._RANGE.pack(item.iova, item.length) for item in self.ranges]
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: Buffer) -> LoggingStart:
        """Read the payload; raise ValueError if it is short, OSError (E2BIG) if it says more than `LOG_MAX_RANGES`."""
        page_size, count, _reserved = unpack_fixed(cls._LAYOUT, data, "DMA_LOGGING_START")
        if count > LOG_MAX_RANGES:
            raise OSError(errno.E2BIG, f"{count} ranges to log, at most {LOG_MAX_RANGES} are possible")
        end = cls._LAYOUT.size + count * cls._RANGE.size
        if len(data) < end:
            raise ValueError(f"DMA_LOGGING_START of {len(data)} bytes is too short for {count} ranges")
        pairs = cls._RANGE.iter_unpack(memoryview(data)[cls._LAYOUT.size : end])
        return cls(page_size, tuple(Range(iova, length) for iova, length in pairs))


@dataclass(frozen=True, slots=True)
class LoggingReport:
    """Fixed part of DMA_LOGGING_REPORT (kernel: struct vfio_device_feature_dma_logging_report), all in bytes.

    Bit n of the bitmap that answers it stands for the page at `iova + n * page_size`.
    """

    iova: int
    length: int
    page_size: int

    _LAYOUT = struct.Struct("<QQQ")
    SIZE = _LAYOUT.size

    def pack(self) -> bytes:
        """Return the fixed part of the payload."""
        return self._LAYOUT.pack(self.iova, self.length, self.page_size)

    @classmethod
    def unpack(cls, data: Buffer) -> LoggingReport:
        """Read the fixed part; raise ValueError if it is short."""
        return cls(*unpack_fixed(cls._LAYOUT, data, "DMA_LOGGING_REPORT"))


_STATE = struct.Struct("<Ii")
_U64 = struct.Struct("<Q")


def pack_device_state(state: int, data_fd: int = -1) -> bytes:
    """Return the payload of MIG_DEVICE_STATE (kernel: struct vfio_device_feature_mig_state)."""
    return _STATE.pack(state, data_fd)


def unpack_device_state(data: Buffer) -> DeviceState:
    """Read the payload of MIG_DEVICE_STATE; raise ValueError if it is short or the state unknown."""
    return DeviceState(unpack_fixed(_STATE, data, "MIG_DEVICE_STATE")[0])


def pack_migration_flags(flags: int) -> bytes:
    """Return the payload of MIGRATION (kernel: struct vfio_device_feature_migration)."""
    return _U64.pack(flags)


def unpack_migration_flags(data: Buffer) -> MigrationFlags:
    """Read the payload of MIGRATION, without the flags that are not known; raise ValueError if it is short."""
    known = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY
    return MigrationFlags(unpack_fixed(_U64, data, "MIGRATION")[0]) & known


def pack_data_size(stop_copy_length: int) -> bytes:
    """Return the payload of MIG_DATA_SIZE (kernel: struct vfio_device_feature_mig_data_size), in bytes."""
    return _U64.pack(stop_copy_length)


def unpack_data_size(data: Buffer) -> int:
    """Read the payload of MIG_DATA_SIZE, in bytes; raise ValueError if it is short."""
    return int(unpack_fixed(_U64, data, "MIG_DATA_SIZE")[0])


def bitmap_bytes(length: int, page_size: int) -> int:
    """Return the size in bytes of the bitmap for `length` bytes: whole little-endian 64-bit words."""
    pages = -(-length // page_size)
    return -(-pages // 64) * 8


def check_logging_start(page_size: int, ranges: Sequence[Range]) -> None:
    """Refuse what the kernel refuses before a driver sees a DMA_LOGGING_START.

    OSError: EINVAL (no range, page size not a power of two, an empty, misaligned or overlapping range), E2BIG (more
    than `LOG_MAX_RANGES`), EOVERFLOW (end beyond 2^64). Source: kernel: vfio_ioctl_device_feature_logging_start.
    """
    if not ranges:
        raise OSError(errno.EINVAL, "no range to log")
    if len(ranges) > LOG_MAX_RANGES:
        raise OSError(errno.E2BIG, f"{len(ranges)} ranges to log, at most {LOG_MAX_RANGES} are possible")
    if not _power_of_two(page_size):
        raise OSError(errno.EINVAL, f"page size {page_size} is not a power of two")
    for item in ranges:
        if item.iova % page_size or item.length % page_size or item.length <= 0:
            raise OSError(
                errno.EINVAL, f"range 0x{item.iova:x} + 0x{item.length:x} is no run of {page_size}-byte pages"
            )
        _check_end(item)
    ordered = sorted(ranges)
    for before, after in itertools.pairwise(ordered):
        if before.iova + before.length > after.iova:
            raise OSError(errno.EINVAL, f"ranges at 0x{before.iova:x} and 0x{after.iova:x} overlap")


def check_logging_report(report: LoggingReport) -> None:
    """Refuse what the kernel refuses before a driver sees a DMA_LOGGING_REPORT.

    OSError: EINVAL (page size below 4096 or not a power of two, no length), EOVERFLOW (end beyond 2^64). Source:
    kernel: vfio_ioctl_device_feature_logging_report.
    """
    if report.page_size < MIN_PAGE_SIZE or not _power_of_two(report.page_size):
        raise OSError(errno.EINVAL, f"page size {report.page_size} is no power of two from {MIN_PAGE_SIZE}")
    if report.length <= 0:
        raise OSError(errno.EINVAL, "a report of no length")
    _check_end(Range(report.iova, report.length))


def _check_end(item: Range) -> None:
    if item.iova + item.length > _ADDRESS_SPACE:
        raise OSError(errno.EOVERFLOW, f"range 0x{item.iova:x} + 0x{item.length:x} ends beyond 64 bits")


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def unpack_fixed(layout: struct.Struct, data: Buffer, name: str) -> tuple[int, ...]:
    """Read the fixed part at the begin of `data`; raise ValueError, which names it, if that is too short."""
    if len(data) < layout.size:
        raise ValueError(f"{name} of {len(data)} bytes, at least {layout.size} are needed")
    return layout.unpack_from(data)
