"""Memory that a device under test may write to: a sealed file, known to the last byte, so that every write shows."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

import numpy as np

from common.vfio.feature import Buffer
from common.vfio_user.codec import DMA_ACCESS_SIZE, Command, DmaAccess
from common.vfio_user.transport import Message

__all__ = ["AREA", "FIRST", "PAGE", "SECOND", "DmaMemory", "sealed_file"]

PAGE: Final = 4096
AREA: Final = 4 << 20
FIRST: Final = AREA
"""I/O virtual address of the first area; the second one follows it at once. Both are multiples of their size."""
SECOND: Final = FIRST + AREA

_FILLER = b"\x5a"


def sealed_file(size: int) -> int:
    """Return the descriptor of a new file of `size` bytes, all holes, that nobody can cut off."""
    fd = os.memfd_create("switchover-check", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class DmaMemory:
    """Two areas of 4 MiB each. An IOVA and its offset in the file differ by `FIRST`.

    `shared`: whether the device gets the file when an area is mapped, or has to do its DMA by message. `mapped`: IOVAs
    of the areas that it may reach now.
    `by_message`: IOVAs of the pages that the device has written by DMA_WRITE; whoever carries such a write out knows of
    it. `read_by_message`: bytes. `wrong`: what was wrong with the messages.
    """

    def __init__(self) -> None:
        self.fd = sealed_file(2 * AREA)
        self.bytes = mmap.mmap(self.fd, 2 * AREA)
        self.shared = True
        self.mapped: set[int] = set()
        self.by_message: set[int] = set()
        self.read_by_message = 0
        self.largest_message = 0
        self.wrong: list[str] = []
        self._before = np.empty(0, np.uint8)
        self.bytes[:] = _FILLER * (2 * AREA)
        self.remember()

    def close(self) -> None:
        """Give it back."""
        self.bytes.close()
        os.close(self.fd)

    def fill(self) -> None:
        """Write over the second area as the guest does, so that the device's next write shows."""
        self.write(SECOND, _FILLER * AREA)

    def remember(self) -> None:
        """Take what is there now for what `changed` compares with."""
        self._before = np.frombuffer(bytearray(self.bytes), np.uint8)
        self.by_message.clear()

    def changed(self) -> set[int]:
        """Return the IOVAs of the pages that have changed since `remember`."""
        now = np.frombuffer(bytes(self.bytes), np.uint64)
        pages = np.flatnonzero((now != self._before.view(np.uint64)).reshape(-1, PAGE // 8).any(axis=1))
        return {FIRST + int(page) * PAGE for page in pages}

    def write(self, iova: int, data: bytes) -> None:
        """Write as the guest does; the device did not, so the pages count as unchanged."""
        self.bytes[iova - FIRST : iova - FIRST + len(data)] = data  # the device may write over it from here on
        self._before[iova - FIRST : iova - FIRST + len(data)] = np.frombuffer(data, np.uint8)

    def serve(self, command: Message) -> Buffer:
        """Carry out a DMA message of the device and return the body of the answer; OSError: EINVAL."""
        try:
            kind = Command(command.header.command)
            access = DmaAccess.unpack(command.body)
        except ValueError as error:
            raise self._refusal(f"command {command.header.command} of the server: {error}") from None
        data = memoryview(command.body)[DMA_ACCESS_SIZE:]
        start = access.iova - FIRST
        self.largest_message = max(self.largest_message, access.size)
        if access.size < 1 or not {access.iova & -AREA, access.iova + access.size - 1 & -AREA} <= self.mapped:
            raise self._refusal(f"{kind.name} of 0x{access.size:x} bytes at 0x{access.iova:x}, which is not mapped")
        if kind is Command.DMA_READ:
            if data:
                raise self._refusal("DMA_READ with data")
            self.read_by_message += access.size
            return access.pack() + self.bytes[start : start + access.size]
        if kind is Command.DMA_WRITE:
            if len(data) != access.size:
                raise self._refusal(f"DMA_WRITE that says {access.size} bytes and carries {len(data)}")
            self.bytes[start : start + access.size] = bytes(data)
            first, last = start // PAGE, (start + access.size - 1) // PAGE
            self.by_message.update(FIRST + page * PAGE for page in range(first, last + 1))
            return access.pack()
        raise self._refusal(f"{kind.name} is no command of a server")

    def _refusal(self, text: str) -> OSError:
        self.wrong.append(text)
        return OSError(errno.EINVAL, text)
