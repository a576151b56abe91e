"""Guest RAM as the vCPU sees it: by guest physical address, with a log of the pages that it writes.

The log is private to this process and is handed over, read and cleared, between two steps (kernel: KVM_GET_DIRTY_LOG).
Whoever writes through a view marks **after** the write: a mark that comes first may be taken, and the page read, before
the content is there.
"""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from common.memory import bitmap
from common.memory.layout import PAGE_SIZE
from common.memory.packed import PackedBitmap
from common.memory.ram import GuestRam
from common.memory.write_journal import WriteJournal

__all__ = ["Bytes", "GuestMemory"]

Bytes = npt.NDArray[np.uint8]


class GuestMemory:
    """Reads, writes, and the dirty log, which is off at first. Addresses outside RAM raise `ValueError`."""

    __slots__ = ("_log", "_ram", "journal")

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._log: bitmap.Words | None = None
        self.journal: WriteJournal | None = None  # of all that is marked, logged or not

    def view(self, gpa: int, size: int) -> Bytes:
        """Return [gpa, gpa + size) as a writable array of bytes; who writes to it calls `mark` afterwards."""
        offset = self._ram.layout.offset_of(gpa, size)
        return self._ram.bytes[offset : offset + size]

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of [gpa, gpa + size)."""
        return self.view(gpa, size).tobytes()

    def write(self, gpa: int, data: bytes) -> None:
        """Write `data`, which must not be empty, and mark it."""
        self.view(gpa, len(data))[:] = np.frombuffer(data, np.uint8)
        self.mark(gpa, len(data))

    def page_of(self, gpa: int) -> int:
        """Return the RAM page number of an address."""
        return self._ram.layout.offset_of(gpa, 1) // PAGE_SIZE

    def mark(self, gpa: int, size: int) -> None:
        """Log every page that [gpa, gpa + size) touches."""
        if self._log is None and self.journal is None:
            return
        offset = self._ram.layout.offset_of(gpa, size)
        first = offset // PAGE_SIZE
        pages = (offset + size - 1) // PAGE_SIZE - first + 1
        if self._log is not None:
            bitmap.set_range(self._log, first, pages)
        if self.journal is not None:
            self.journal.note(first, pages)

    def mark_pages(self, pages: npt.NDArray[np.int64]) -> None:
        """Log RAM page numbers."""
        if self._log is not None:
            bitmap.set_pages(self._log, pages)
        if self.journal is not None:
            self.journal.note_pages(pages)

    def start_log(self) -> None:
        """Start with an empty log; EINVAL if there is one already, for its bits would be lost."""
        if self._log is not None:
            raise OSError(errno.EINVAL, "the vCPU's dirty log is on already")
        self._log = bitmap.empty(self._ram.layout.pages)

    def stop_log(self) -> None:
        """Stop logging, and forget; nothing happens if it is off."""
        self._log = None

    def take_log(self) -> PackedBitmap:
        """Return the log, one bit for each page of RAM, and clear it; EINVAL if it is off."""
        if self._log is None:
            raise OSError(errno.EINVAL, "the vCPU's dirty log is off")
        taken, self._log = self._log, bitmap.empty(self._ram.layout.pages)
        return PackedBitmap.of(taken, self._ram.layout.pages)
