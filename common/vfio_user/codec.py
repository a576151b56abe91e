"""Messages of the vfio-user protocol as bytes, without any I/O.

Every message is a 16-byte header and a body; all numbers are little-endian, without padding. Each class here is one
body, or the fixed part of one: `pack` makes it, `unpack` reads it and raises ValueError if it cannot be one. What a
request and its reply have in common is one class. Sizes on the wire called argsz count the body, never the header.

Where implementations disagree, the layouts are those that libvfio-user and QEMU 11 exchange.
"""

from __future__ import annotations

import errno
import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from common.vfio.feature import Buffer, unpack_fixed
from common.vfio_user.capabilities import MAX_TRANSFER, Capabilities

__all__ = [
    "DMA_ACCESS_SIZE",
    "DMA_FLAGS_KNOWN",
    "DMA_READABLE",
    "DMA_WRITABLE",
    "FEATURE_SIZE",
    "FLAG_ERROR",
    "FLAG_NO_REPLY",
    "FLAG_REPLY",
    "FLAG_TYPE_MASK",
    "HEADER",
    "HEADER_SIZE",
    "IOMMU_DIRTY_REPORT",
    "IOMMU_DIRTY_START",
    "IOMMU_DIRTY_STOP",
    "MAX_BITMAP",
    "MAX_COMMAND_SIZE",
    "MAX_REPLY_SIZE",
    "MIG_DATA_SIZE",
    "PRECOPY_INFO",
    "REGION_ACCESS_SIZE",
    "UNMAP_ALL",
    "UNMAP_GET_DIRTY_BITMAP",
    "WRITE_JOURNAL",
    "Command",
    "DmaAccess",
    "DmaMap",
    "DmaUnmap",
    "Feature",
    "Header",
    "MigData",
    "RegionAccess",
    "Version",
    "check_argsz",
]

HEADER_SIZE: Final = 16
HEADER: Final = struct.Struct("<HHIII")
"""Members of `Header`, for who makes many."""

FLAG_TYPE_MASK: Final = 0xF
FLAG_REPLY: Final = 0x1
FLAG_NO_REPLY: Final = 0x10
FLAG_ERROR: Final = 0x20

MAX_BITMAP: Final = 16 << 20
"""Bytes of a dirty bitmap in one message: 512 GiB of 4 KiB pages."""

MAX_COMMAND_SIZE: Final = MAX_TRANSFER + 32
"""Bytes of a command, header included, that a server takes (as libvfio-user's)."""

MAX_REPLY_SIZE: Final = MAX_BITMAP + 4096
"""Bytes of a message that a client takes: bitmaps may be larger than data."""

PRECOPY_INFO: Final = 0x8001
"""Feature number of our extension for VFIO_MIG_GET_PRECOPY_INFO; GET only, the payload is `PrecopyInfo`."""

WRITE_JOURNAL: Final = 0x8002
"""Feature number of our extension: what the device wrote; GET, IOVA and bytes as 64-bit words are answered with rows of
`common.memory.write_journal`, oldest first."""

IOMMU_DIRTY_START: Final = 0x8010
"""Feature number of our extension: keep an IOMMU's dirty bits of all that is mapped; SET, `LoggingStart`, no ranges."""

IOMMU_DIRTY_STOP: Final = 0x8011
"""Stop to keep them, and lose them; SET, as DMA_LOGGING_STOP."""

IOMMU_DIRTY_REPORT: Final = 0x8012
"""Return and clear them; GET, as DMA_LOGGING_REPORT."""

DMA_READABLE: Final = 1 << 0
DMA_WRITABLE: Final = 1 << 1
DMA_FLAGS_KNOWN: Final = 0xF  # the other two, of libvfio-user, say how the device has to use the descriptor

UNMAP_GET_DIRTY_BITMAP: Final = 1 << 0
UNMAP_ALL: Final = 1 << 1


class Command(IntEnum):
    """Commands (vfio-user: enum vfio_user_command); 14 was DIRTY_PAGES once."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


_VERSION = struct.Struct("<HH")
_TWO = struct.Struct("<II")
_DMA_MAP = struct.Struct("<IIQQQ")
_DMA_UNMAP = struct.Struct("<IIQQ")
_QQ = struct.Struct("<QQ")
_REGION_ACCESS = struct.Struct("<QII")

# Bytes of the fixed parts that data may follow.
DMA_ACCESS_SIZE: Final = _QQ.size
FEATURE_SIZE: Final = _TWO.size
MIG_DATA_SIZE: Final = _TWO.size
REGION_ACCESS_SIZE: Final = _REGION_ACCESS.size


class Header(NamedTuple):
    """Header of a message (vfio-user: struct vfio_user_header); `size` is that of the whole message, in bytes."""

    message_id: int
    command: int
    size: int
    flags: int = 0
    error: int = 0

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        return HEADER.pack(*self)

    @classmethod
    def unpack(cls, data: Buffer, limit: int) -> Header:
        """Read 16 bytes; ValueError if the size is not 16 … `limit`, or if it is neither command nor reply."""
        header = cls._make(HEADER.unpack_from(data))
        if not HEADER_SIZE <= header.size <= limit:
            raise ValueError(f"a message of {header.size} bytes, {HEADER_SIZE} to {limit} are possible")
        if header.flags & FLAG_TYPE_MASK > FLAG_REPLY:
            raise ValueError(f"a message of type {header.flags & FLAG_TYPE_MASK}")
        return header

    @property
    def is_reply(self) -> bool:
        """Whether it answers a command."""
        return self.flags & FLAG_TYPE_MASK == FLAG_REPLY

    @property
    def refusal(self) -> int:
        """The errno of a reply that refuses, or 0; a refusal without a plausible errno counts as EINVAL."""
        if not self.flags & FLAG_ERROR:
            return 0
        return self.error if 0 < self.error < 4096 else errno.EINVAL


def check_argsz(argsz: int, needed: int, name: str) -> None:
    """Raise ValueError if a body named `name` says that it has less room than it needs, in bytes."""
    if argsz < needed:
        raise ValueError(f"{name} with argsz {argsz}, at least {needed} is needed")


@dataclass(frozen=True, slots=True)
class Version:
    """Body of VERSION, command and reply."""

    major: int
    minor: int
    capabilities: Capabilities

    def pack(self) -> bytes:
        """Return the body: numbers, JSON, NUL."""
        document = json.dumps(self.capabilities.to_json(), separators=(",", ":")).encode()
        return _VERSION.pack(self.major, self.minor) + document + b"\0"

    @classmethod
    def unpack(cls, body: Buffer) -> Version:
        """Read the body; the capabilities may be missing."""
        major, minor = unpack_fixed(_VERSION, body, "VERSION")
        text = bytes(body[_VERSION.size :])
        if not text:
            return cls(major, minor, Capabilities())
        if text[-1] or text.count(0) > 1:
            raise ValueError("the capabilities do not end with the only NUL")
        try:
            document = json.loads(text[:-1])
        except RecursionError as error:
            raise ValueError("the capabilities are nested too deep") from error
        return cls(major, minor, Capabilities.from_json(document))


@dataclass(frozen=True, slots=True)
class DmaMap:
    """Body of the command DMA_MAP; the memory's descriptor comes with it, or none for memory by message only.

    `flags` DMA_*, `offset` in the descriptor's file, `iova` and `size` in bytes.
    """

    flags: int
    offset: int
    iova: int
    size: int

    def pack(self) -> bytes:
        """Return the body."""
        return _DMA_MAP.pack(_DMA_MAP.size, self.flags, self.offset, self.iova, self.size)

    @classmethod
    def unpack(cls, body: Buffer) -> DmaMap:
        """Read the body."""
        argsz, flags, offset, iova, size = unpack_fixed(_DMA_MAP, body, "DMA_MAP")
        check_argsz(argsz, _DMA_MAP.size, "DMA_MAP")
        return cls(flags, offset, iova, size)


@dataclass(frozen=True, slots=True)
class DmaUnmap:
    """Body of DMA_UNMAP. With UNMAP_GET_DIRTY_BITMAP it goes on with page size and size of a bitmap, in bytes.

    The reply repeats the command and adds the bitmap itself: `unpack_bitmap`.
    """

    flags: int
    iova: int
    size: int
    page_size: int = 0
    bitmap_size: int = 0

    def pack(self) -> bytes:
        """Return the body."""
        if not self.flags & UNMAP_GET_DIRTY_BITMAP:
            return _DMA_UNMAP.pack(_DMA_UNMAP.size, self.flags, self.iova, self.size)
        argsz = _DMA_UNMAP.size + _QQ.size + self.bitmap_size
        return _DMA_UNMAP.pack(argsz, self.flags, self.iova, self.size) + _QQ.pack(self.page_size, self.bitmap_size)

    @classmethod
    def unpack(cls, body: Buffer) -> DmaUnmap:
        """Read the body; ValueError also for flags that exclude each other, and for a bitmap larger than argsz says."""
        argsz, flags, iova, size = unpack_fixed(_DMA_UNMAP, body, "DMA_UNMAP")
        check_argsz(argsz, _DMA_UNMAP.size, "DMA_UNMAP")
        if flags == UNMAP_GET_DIRTY_BITMAP:
            page_size, bitmap_size = unpack_fixed(_QQ, memoryview(body)[_DMA_UNMAP.size :], "DMA_UNMAP's bitmap")
            check_argsz(argsz, _DMA_UNMAP.size + _QQ.size + bitmap_size, "DMA_UNMAP")
            return cls(flags, iova, size, page_size, bitmap_size)
        if flags not in (0, UNMAP_ALL):
            raise ValueError(f"DMA_UNMAP with flags 0x{flags:x}")
        if flags == UNMAP_ALL and (iova or size):
            raise ValueError("DMA_UNMAP of everything with a range")
        return cls(flags, iova, size)

    def unpack_bitmap(self, reply: Buffer) -> memoryview:
        """Return the bitmap in the body of the reply to this command."""
        start = _DMA_UNMAP.size + _QQ.size
        if len(reply) < start + self.bitmap_size:
            raise ValueError(f"DMA_UNMAP's reply of {len(reply)} bytes is too short for its bitmap")
        return memoryview(reply)[start : start + self.bitmap_size]


class DmaAccess(NamedTuple):
    """Fixed part of DMA_READ and DMA_WRITE, which go from server to client: bytes at an IOVA. Data may follow it."""

    iova: int
    size: int

    def pack(self) -> bytes:
        """Return the fixed part."""
        return _QQ.pack(self.iova, self.size)

    @classmethod
    def unpack(cls, body: Buffer) -> DmaAccess:
        """Read the fixed part."""
        return cls._make(unpack_fixed(_QQ, body, "DMA access"))


class RegionAccess(NamedTuple):
    """Fixed part of REGION_READ and REGION_WRITE: bytes at an offset in a region. Data may follow it."""

    offset: int
    region: int
    size: int

    def pack(self) -> bytes:
        """Return the fixed part."""
        return _REGION_ACCESS.pack(*self)

    @classmethod
    def unpack(cls, body: Buffer) -> RegionAccess:
        """Read the fixed part."""
        return cls._make(unpack_fixed(_REGION_ACCESS, body, "region access"))


class Feature(NamedTuple):
    """Fixed part of DEVICE_FEATURE (kernel: struct vfio_device_feature); the feature's payload follows it.

    `flags` are the feature's number and FEATURE_*; `argsz` is for the larger of request and reply, in bytes.
    """

    argsz: int
    flags: int

    def pack(self) -> bytes:
        """Return the fixed part."""
        return _TWO.pack(self.argsz, self.flags)

    @classmethod
    def unpack(cls, body: Buffer) -> Feature:
        """Read the fixed part."""
        return cls._make(unpack_fixed(_TWO, body, "DEVICE_FEATURE"))


class MigData(NamedTuple):
    """Fixed part of MIG_DATA_READ and MIG_DATA_WRITE: `size` bytes of data, which may follow it.

    The reply to a read may be padded: `size` tells what counts.
    """

    size: int

    def pack(self) -> bytes:
        """Return the fixed part."""
        return _TWO.pack(_TWO.size + self.size, self.size)

    @classmethod
    def unpack(cls, body: Buffer) -> MigData:
        """Read the fixed part."""
        argsz, size = unpack_fixed(_TWO, body, "migration data")
        check_argsz(argsz, _TWO.size + size, "migration data")
        return cls(size)

    def data(self, body: Buffer) -> memoryview:
        """Return the data in a body that has this fixed part; ValueError if they are not all there."""
        if len(body) < MIG_DATA_SIZE + self.size:
            raise ValueError(f"migration data of {len(body)} bytes is too short for {self.size}")
        return memoryview(body)[MIG_DATA_SIZE : MIG_DATA_SIZE + self.size]
