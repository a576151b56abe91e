"""What a device may reach by DMA: mappings by IOVA, over files that are mapped, or opened, once each.

A file that could shrink would kill the device at its next access to memory that is gone, so one that is not sealed
against that is not mapped: it is read and written, which fails then and does not kill.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.vfio.feature import Buffer

__all__ = ["MAX_MAPPINGS", "PAGE_SIZE", "Mapping", "Mappings"]

MAX_MAPPINGS = 65535
PAGE_SIZE = 4096
_ADDRESS_SPACE = 1 << 64


@dataclass(slots=True)
class _File:
    """A whole file in the process, shared by all DMA mappings of it: in memory (`view`), or open (`fd`)."""

    view: memoryview | None = None
    fd: int | None = None
    users: int = 0

    def close(self) -> None:
        """Let go of it."""
        if self.view is not None:
            self.view.release()
        if self.fd is not None:
            os.close(self.fd)


@dataclass(slots=True)
class Mapping:
    """One DMA mapping; `end` is one past the last byte.

    `view` is its memory; or `fd` is its file, where it begins at `offset`; with neither it is reached by message only.
    """

    iova: int
    end: int
    readable: bool
    writable: bool
    view: memoryview | None = None
    fd: int | None = None
    offset: int = 0
    key: tuple[int, int, int, bool] | None = field(default=None, repr=False)

    @property
    def local(self) -> bool:
        """Whether it is reached without a message."""
        return self.view is not None or self.fd is not None

    def read(self, iova: int, count: int) -> bytes:
        """Return bytes of a local one, within it; raise OSError if its file has not so many."""
        start = iova - self.iova
        if self.view is not None:
            return bytes(self.view[start : start + count])
        data = b"" if self.fd is None else os.pread(self.fd, count, self.offset + start)
        if len(data) != count:
            raise OSError(errno.EIO, f"{len(data)} of {count} bytes: the memory's file ends there")
        return data

    def write(self, iova: int, data: Buffer) -> None:
        """Write bytes of a local one, within it; raise OSError as its file does."""
        start = iova - self.iova
        if self.view is not None:
            self.view[start : start + len(data)] = data
        elif self.fd is not None and os.pwrite(self.fd, data, self.offset + start) != len(data):
            raise OSError(errno.EIO, "the memory's file took a part only")


class Mappings:
    """A device's DMA mappings; none overlap.

    Not thread-safe: mapping, unmapping and DMA happen under one lock, so that an unmap is answered only when the DMA to
    its range has ended.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._mappings: list[Mapping] = []
        self._files: dict[tuple[int, int, int, bool], _File] = {}

    def __len__(self) -> int:
        """Return the number of mappings."""
        return len(self._starts)

    def add(self, iova: int, size: int, *, readable: bool, writable: bool, fd: int | None, offset: int) -> None:
        """Map `size` bytes at `iova`: at `offset` of a file, or without `fd` to be reached by message.

        The caller keeps `fd`. OSError: EINVAL (not whole pages, no permission at all, beyond the file, or what is no
        file), EOVERFLOW, EEXIST (overlap), EACCES (writable, the file is not), ENOSPC.
        """
        if size <= 0 or (iova | size | offset) % PAGE_SIZE:
            raise OSError(errno.EINVAL, f"iova 0x{iova:x} size 0x{size:x} offset 0x{offset:x} are not whole pages")
        if iova + size > _ADDRESS_SPACE:
            raise OSError(errno.EOVERFLOW, f"iova 0x{iova:x} size 0x{size:x} end beyond 64 bits")
        if not readable and not writable:
            raise OSError(errno.EINVAL, "a mapping that is neither readable nor writable")
        index = bisect_left(self._starts, iova)
        if index and self._mappings[index - 1].end > iova:
            raise OSError(errno.EEXIST, f"iova 0x{iova:x} is mapped already")
        if index < len(self._starts) and self._starts[index] < iova + size:
            raise OSError(errno.EEXIST, f"iova 0x{self._starts[index]:x} is mapped already")
        if len(self._starts) >= MAX_MAPPINGS:
            raise OSError(errno.ENOSPC, f"{MAX_MAPPINGS} mappings are in use")
        mapping = Mapping(iova, iova + size, readable, writable)
        if fd is not None:
            mapping.key = self._open(fd, offset + size, writable=writable)
            file = self._files[mapping.key]
            file.users += 1
            mapping.fd, mapping.offset = file.fd, offset
            if file.view is not None:
                mapping.view = file.view[offset : offset + size]
        self._starts.insert(index, iova)
        self._mappings.insert(index, mapping)

    def check(self, iova: int, size: int) -> int:
        """Return the place of exactly this mapping; raise OSError (ENOENT) if there is none."""
        index = bisect_left(self._starts, iova)
        if index == len(self._starts) or self._starts[index] != iova or self._mappings[index].end != iova + size:
            raise OSError(errno.ENOENT, f"no mapping of iova 0x{iova:x} size 0x{size:x}")
        return index

    def remove(self, iova: int, size: int) -> None:
        """Take away exactly this mapping; OSError: as `check`."""
        index = self.check(iova, size)
        del self._starts[index]
        self._release(self._mappings.pop(index))

    def clear(self) -> None:
        """Take away all mappings."""
        self._starts.clear()
        while self._mappings:
            self._release(self._mappings.pop())

    def find(self, iova: int) -> Mapping | None:
        """Return the mapping that covers an address."""
        index = bisect_right(self._starts, iova) - 1
        if index < 0:
            return None
        mapping = self._mappings[index]
        return mapping if iova < mapping.end else None

    def ordered(self) -> Sequence[Mapping]:
        """Return the mappings in order of their addresses."""
        return self._mappings

    def next_start(self, iova: int) -> int:
        """Return where the first mapping above an address starts; 2^64 if there is none."""
        index = bisect_right(self._starts, iova)
        return self._starts[index] if index < len(self._starts) else _ADDRESS_SPACE

    def _open(self, fd: int, end: int, *, writable: bool) -> tuple[int, int, int, bool]:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "the memory's descriptor is no file")
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if access == os.O_WRONLY or (writable and access != os.O_RDWR):
            raise OSError(errno.EACCES, "the memory's file is not open for such access")
        if end > status.st_size:
            raise OSError(errno.EINVAL, f"the memory's file ends at 0x{status.st_size:x}, before 0x{end:x}")
        # A file that grew is mapped anew; the older mapping goes with its last user.
        key = (status.st_dev, status.st_ino, status.st_size, access == os.O_RDWR)
        if key not in self._files:
            if _can_shrink(fd):
                self._files[key] = _File(fd=os.dup(fd))
            else:
                protection = mmap.PROT_READ | (mmap.PROT_WRITE if access == os.O_RDWR else 0)
                # The view keeps the mapping alive, and the last slice of it that is released unmaps the file.
                self._files[key] = _File(memoryview(mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, protection)))
        return key

    def _release(self, mapping: Mapping) -> None:
        if mapping.key is None:
            return
        if mapping.view is not None:
            mapping.view.release()
        file = self._files[mapping.key]
        file.users -= 1
        if not file.users:
            self._files.pop(mapping.key).close()


def _can_shrink(fd: int) -> bool:
    try:
        return not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        return True
