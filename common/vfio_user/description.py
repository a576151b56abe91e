"""Messages by which a device describes itself: regions, their ioeventfds, interrupts.

Each class is one body, or the fixed part of one, as in `codec`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

from common.vfio.feature import Buffer, unpack_fixed
from common.vfio_user.codec import check_argsz

__all__ = [
    "Area",
    "DeviceInfo",
    "IoEventFd",
    "IrqFlags",
    "IrqInfo",
    "IrqSet",
    "RegionFlags",
    "RegionInfo",
    "RegionQuery",
    "pack_io_fds",
    "unpack_io_fds",
]

_TWO = struct.Struct("<II")
_FOUR = struct.Struct("<IIII")
_FIVE = struct.Struct("<IIIII")
_QQ = struct.Struct("<QQ")
_REGION_INFO = struct.Struct("<IIIIQQ")
_CAP_HEADER = struct.Struct("<HHI")
_CAP_SPARSE_MMAP = 1
_MAX_CAPS = 16
# An io fd is 48 bytes in libvfio-user (it added a shadow offset), 40 in the published specification.
_IO_FD = struct.Struct("<QQIIII8xQ")
_IO_FD_SHORT = struct.Struct("<QQIIIIQ")
_IO_FD_IOEVENTFD = 0


class RegionFlags(IntFlag):
    """Flags of a region (kernel: VFIO_REGION_INFO_FLAG_*)."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class IrqFlags(IntFlag):
    """What to do with interrupts, and what data say so (kernel: VFIO_IRQ_SET_*)."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Body of DEVICE_GET_INFO, command and reply (kernel: struct vfio_device_info); `flags` 1 RESET, 2 PCI."""

    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0

    def pack(self) -> bytes:
        """Return the body."""
        return _FOUR.pack(_FOUR.size, self.flags, self.num_regions, self.num_irqs)

    @classmethod
    def unpack(cls, body: Buffer) -> DeviceInfo:
        """Read the body."""
        argsz, flags, regions, irqs = unpack_fixed(_FOUR, body, "DEVICE_GET_INFO")
        check_argsz(argsz, _FOUR.size, "DEVICE_GET_INFO")
        return cls(flags, regions, irqs)


class Area(NamedTuple):
    """A part of a region that can be mapped, in bytes from the region's begin."""

    offset: int
    size: int


_NO_FLAGS = RegionFlags(0)


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """A region (kernel: struct vfio_region_info), and body of the reply to DEVICE_GET_REGION_INFO.

    `size` in bytes; `offset` where the region begins in its descriptor's file; `areas` the only parts that can be
    mapped (none: all of a region that has MMAP). `fd` is not in the body: it comes, or goes, with the message.
    """

    index: int
    flags: RegionFlags = _NO_FLAGS
    size: int = 0
    offset: int = 0
    areas: tuple[Area, ...] = ()
    fd: int | None = None

    @property
    def argsz(self) -> int:
        """Bytes of the whole reply, capabilities included."""
        return _REGION_INFO.size + (_CAP_HEADER.size + _TWO.size + len(self.areas) * _QQ.size if self.areas else 0)

    def pack(self, argsz: int) -> bytes:
        """Return the body for a client that has room for `argsz` bytes: without capabilities where it has not."""
        flags = self.flags & ~RegionFlags.CAPS
        if not self.areas or argsz < self.argsz:
            return _REGION_INFO.pack(self.argsz, flags, self.index, 0, self.size, self.offset)
        parts = [
            _REGION_INFO.pack(
                self.argsz, flags | RegionFlags.CAPS, self.index, _REGION_INFO.size, self.size, self.offset
            ),
            _CAP_HEADER.pack(_CAP_SPARSE_MMAP, 1, 0),
            _TWO.pack(len(self.areas), 0),
            *(_QQ.pack(*area) for area in self.areas),
        ]
        return b"".join(parts)

    @classmethod
    def unpack(cls, body: Buffer) -> tuple[RegionInfo, int]:
        """Read the body; return it with its argsz, which is larger than the body if capabilities were left out."""
        argsz, flags, index, cap_offset, size, offset = unpack_fixed(_REGION_INFO, body, "DEVICE_GET_REGION_INFO")
        areas: tuple[Area, ...] = ()
        if flags & RegionFlags.CAPS:
            areas = _sparse_areas(memoryview(body), cap_offset)
        for area in areas:
            if area.offset + area.size > size:
                raise ValueError(f"area 0x{area.offset:x} + 0x{area.size:x} is outside its region of 0x{size:x} bytes")
        return cls(index, RegionFlags(flags & 0xF), size, offset, areas), argsz


def _sparse_areas(body: memoryview, position: int) -> tuple[Area, ...]:
    for _ in range(_MAX_CAPS):
        if position < _REGION_INFO.size:
            return ()
        cap, _version, following = unpack_fixed(_CAP_HEADER, body[position:], "capability of a region")
        if cap == _CAP_SPARSE_MMAP:
            data = body[position + _CAP_HEADER.size :]
            count, _reserved = unpack_fixed(_TWO, data, "sparse mmap capability")
            end = _TWO.size + count * _QQ.size
            if len(data) < end:
                raise ValueError(f"sparse mmap capability is too short for {count} areas")
            return tuple(Area(offset, size) for offset, size in _QQ.iter_unpack(data[_TWO.size : end]))
        position = following
    raise ValueError(f"a region with more than {_MAX_CAPS} capabilities")


@dataclass(frozen=True, slots=True)
class RegionQuery:
    """Body of the commands DEVICE_GET_REGION_INFO (`pack_info`) and DEVICE_GET_REGION_IO_FDS (`pack_io_fds`).

    `argsz` is the size of the reply that the client has room for, in bytes.
    """

    index: int
    argsz: int

    def pack_info(self) -> bytes:
        """Return the body of DEVICE_GET_REGION_INFO, which is as long as the reply may be."""
        argsz = max(self.argsz, _REGION_INFO.size)
        return _REGION_INFO.pack(argsz, 0, self.index, 0, 0, 0) + bytes(argsz - _REGION_INFO.size)

    def pack_io_fds(self) -> bytes:
        """Return the body of DEVICE_GET_REGION_IO_FDS."""
        return _FOUR.pack(max(self.argsz, _FOUR.size), 0, self.index, 0)

    @classmethod
    def unpack_info(cls, body: Buffer) -> RegionQuery:
        """Read the body of DEVICE_GET_REGION_INFO."""
        argsz, _flags, index, *_ = unpack_fixed(_REGION_INFO, body, "DEVICE_GET_REGION_INFO")
        check_argsz(argsz, _REGION_INFO.size, "DEVICE_GET_REGION_INFO")
        return cls(index, argsz)

    @classmethod
    def unpack_io_fds(cls, body: Buffer) -> RegionQuery:
        """Read the body of DEVICE_GET_REGION_IO_FDS; ValueError also if it has flags or a count."""
        argsz, flags, index, count = unpack_fixed(_FOUR, body, "DEVICE_GET_REGION_IO_FDS")
        check_argsz(argsz, _FOUR.size, "DEVICE_GET_REGION_IO_FDS")
        if flags or count:
            raise ValueError("DEVICE_GET_REGION_IO_FDS with flags or a count")
        return cls(index, argsz)


@dataclass(frozen=True, slots=True)
class IoEventFd:
    """An eventfd that stands for writes of `size` bytes at `offset` in a region (0: of any size).

    `flags` and `datamatch` as for KVM_IOEVENTFD: with flag 1 only a write of the value `datamatch` counts.
    """

    offset: int
    size: int
    fd: int
    flags: int = 0
    datamatch: int = 0


def pack_io_fds(index: int, argsz: int, items: Sequence[IoEventFd]) -> tuple[bytes, list[int]]:
    """Return the body of the reply to DEVICE_GET_REGION_IO_FDS, and the descriptors to go with it.

    Without the items and the descriptors if the client has less room (`argsz`, in bytes) than they need.
    """
    needed = _FOUR.size + len(items) * _IO_FD.size
    head = _FOUR.pack(needed, 0, index, len(items))
    if argsz < needed:
        return head, []
    fds = sorted({item.fd for item in items})
    parts = [
        _IO_FD.pack(item.offset, item.size, fds.index(item.fd), _IO_FD_IOEVENTFD, item.flags, 0, item.datamatch)
        for item in items
    ]
    return b"".join([head, *parts]), fds


def unpack_io_fds(body: Buffer, fds: Sequence[int]) -> tuple[list[IoEventFd], int]:
    """Read the body of the reply to DEVICE_GET_REGION_IO_FDS; return the eventfds in it, and its argsz.

    An argsz larger than the body says that items were left out. Items of another kind than eventfds are passed over.
    """
    argsz, _flags, _index, count = unpack_fixed(_FOUR, body, "DEVICE_GET_REGION_IO_FDS")
    data = memoryview(body)[_FOUR.size :]
    if not count or not len(data):
        return [], argsz
    layout = _IO_FD if len(data) == count * _IO_FD.size else _IO_FD_SHORT
    if len(data) != count * layout.size:
        raise ValueError(f"DEVICE_GET_REGION_IO_FDS of {len(data)} bytes for {count} items")
    items = []
    for offset, size, fd_index, kind, flags, _shadow, datamatch in layout.iter_unpack(data):
        if kind != _IO_FD_IOEVENTFD:
            continue
        if fd_index >= len(fds):
            raise ValueError(f"descriptor {fd_index} of {len(fds)}")
        items.append(IoEventFd(offset, size, fds[fd_index], flags, datamatch))
    return items, argsz


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """Body of DEVICE_GET_IRQ_INFO, command and reply (kernel: struct vfio_irq_info).

    `index` 0 INTx, 1 MSI, 2 MSI-X, 3 error, 4 request; `flags` 1 EVENTFD; `count` vectors.
    """

    index: int
    flags: int = 0
    count: int = 0

    def pack(self) -> bytes:
        """Return the body."""
        return _FOUR.pack(_FOUR.size, self.flags, self.index, self.count)

    @classmethod
    def unpack(cls, body: Buffer) -> IrqInfo:
        """Read the body."""
        argsz, flags, index, count = unpack_fixed(_FOUR, body, "DEVICE_GET_IRQ_INFO")
        check_argsz(argsz, _FOUR.size, "DEVICE_GET_IRQ_INFO")
        return cls(index, flags, count)


@dataclass(frozen=True, slots=True)
class IrqSet:
    """Fixed part of the command DEVICE_SET_IRQS (kernel: struct vfio_irq_set).

    Bools follow it, eventfds come with it.
    """

    index: int
    flags: IrqFlags
    start: int
    count: int

    SIZE = _FIVE.size

    def pack(self, data: Buffer = b"") -> bytes:
        """Return the body."""
        return _FIVE.pack(_FIVE.size + len(data), self.flags, self.index, self.start, self.count) + bytes(data)

    @classmethod
    def unpack(cls, body: Buffer) -> IrqSet:
        """Read the fixed part; ValueError also for flags that are not one kind of data and one action."""
        argsz, flags, index, start, count = unpack_fixed(_FIVE, body, "DEVICE_SET_IRQS")
        check_argsz(argsz, len(body), "DEVICE_SET_IRQS")
        if (flags & 0x07).bit_count() != 1 or (flags & 0x38).bit_count() != 1 or flags > 0x3F:
            raise ValueError(f"DEVICE_SET_IRQS with flags 0x{flags:x}")
        return cls(index, IrqFlags(flags), start, count)
