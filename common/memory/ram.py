"""Guest RAM: one sealed memfd, mapped by every process that works for the machine.

The memfd is sealed against shrinking and growing before anyone else gets it: a process that touches a page which a
peer has cut off dies of SIGBUS. RAM is sparse. A page that nobody wrote is a hole, reads as zeros, and **must not be
read**: a load from a hole of a memfd allocates the page, so a scan for zero pages would cost all the memory that the
guest never used. `data_runs` tells what may be read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from common.memory import runs
from common.memory.layout import PAGE_SIZE, Layout
from common.memory.runs import Runs

__all__ = ["GuestRam"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class GuestRam:
    """A mapping of guest RAM; closing it leaves the memory to those who map it still.

    `view`, `bytes` (uint8), `pages` (uint8, one row of 4096 for each page) and `words` (uint64, one row of 512 for each
    page) are the same bytes; they are read-only if the mapping is.
    """

    __slots__ = ("_data", "_lock", "_map", "bytes", "fd", "layout", "pages", "size", "view", "words")

    def __init__(self, fd: int, *, writable: bool = True) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.layout = Layout(self.size)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, self.size, mmap.MAP_SHARED, protection)
        self.view = memoryview(self._map)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.pages = self.bytes.reshape(-1, PAGE_SIZE)
        self.words: npt.NDArray[np.uint64] = self.bytes.view("<u8").reshape(-1, PAGE_SIZE // 8)
        self._lock = threading.Lock()
        self._data = runs.one(0, 0)

    @classmethod
    def create(cls, size: int) -> GuestRam:
        """Return new RAM of `size` bytes, all holes; `ValueError` unless a positive multiple of 2 MiB."""
        Layout(size)
        fd = os.memfd_create("switchover-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, *, writable: bool = True) -> GuestRam:
        """Return a mapping of RAM that somebody else made; the descriptor is taken over, whatever happens.

        `ValueError` if its size may change yet (a seal is missing) or is no size of RAM.
        """
        try:
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError as error:
                raise ValueError(f"RAM is not a memfd: {error.strerror}") from error
            if seals & _SEALS != _SEALS:
                raise ValueError("RAM is not sealed: it must have the seals SHRINK, GROW and SEAL")
            return cls(fd, writable=writable)
        except BaseException:
            os.close(fd)
            raise

    def data_runs(self, within: Runs | None = None) -> Runs:
        """Return the runs of pages that hold data, in all of RAM or in the runs `within`; nothing is read.

        A page that held data once is not asked for again: nobody takes memory out of RAM. So the cost is two system
        calls for each run that is new, and one for each hole between runs that are known.
        """
        if within is None:
            within = runs.one(0, self.layout.pages)
        with self._lock:
            found = self._find_data(runs.subtract(within, self._data))
            if found[0].size:
                self._data = runs.union(self._data, found)
            return runs.intersect(within, self._data)

    def _find_data(self, unknown: Runs) -> Runs:
        starts = unknown[0] * PAGE_SIZE
        ends = starts + unknown[1] * PAGE_SIZE
        found: list[tuple[int, int]] = []
        index = 0
        position = 0
        while index < starts.size:
            position = max(position, int(starts[index]))
            if position >= ends[index]:
                index += 1
                continue
            try:
                data = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            if data >= ends[index]:
                index = int(np.searchsorted(ends, data, "right"))
                position = data
                continue
            position = os.lseek(self.fd, data, os.SEEK_HOLE)
            found.append((data // PAGE_SIZE, position // PAGE_SIZE))
        edges = np.array(found, np.int64).reshape(-1, 2)
        return edges[:, 0], edges[:, 1] - edges[:, 0]

    @property
    def allocated_bytes(self) -> int:
        """Memory in use, in bytes."""
        return os.fstat(self.fd).st_blocks * 512

    def populate(self, first_page: int, pages: int) -> None:
        """Allocate pages and map them here, without changing their contents; holes among them become zeros.

        The first touch of a page is what costs most of its transfer, so it is done ahead, off the clock. `ValueError`
        if not all of it is RAM, `OSError` (ENOMEM) if there is not enough memory.
        """
        if first_page < 0 or pages < 0 or first_page + pages > self.layout.pages:
            raise ValueError(f"pages {first_page} to {first_page + pages} are not all in RAM")
        if not pages:
            return
        start, size = first_page * PAGE_SIZE, pages * PAGE_SIZE
        if _LIBC.madvise(self.bytes.ctypes.data + start, size, _MADV_POPULATE_WRITE) == 0:
            return
        if ctypes.get_errno() == errno.ENOMEM:
            raise OSError(errno.ENOMEM, f"no memory for {size} bytes of guest RAM")
        # Linux before 5.14 does not know the advice. Memory that is only reserved is still told as a hole.
        os.posix_fallocate(self.fd, start, size)

    def map_data(self, data: Runs) -> None:
        """Map pages that hold data here, as reading them would, but all at once; what cannot be is mapped when read."""
        for first, count in zip(*(part.tolist() for part in data), strict=True):
            _LIBC.madvise(self.bytes.ctypes.data + first * PAGE_SIZE, count * PAGE_SIZE, _MADV_POPULATE_READ)

    def close(self) -> None:
        """Close the descriptor and give up the mapping; views that are still in use keep the memory mapped."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        del self.words, self.pages, self.bytes, self.view
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
