"""A block of device registers: an image of bytes, and a mask that says which bits a driver may write."""

from __future__ import annotations

import errno
import threading

from common.vfio.feature import Buffer

__all__ = ["RegisterBlock"]


class RegisterBlock:
    """Little-endian registers of 4 or 8 bytes, naturally aligned; what is not defined reads as zero and ignores writes.

    The image is the state: whoever saves a device saves it, and whoever loads one puts it back. A lock that is held for
    nothing else keeps a driver's write of two registers from undoing what the device does to one of them.
    """

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._image = bytearray(size)
        self._mask = bytearray(size)
        self._reset = bytearray(size)
        self._constants: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return len(self._image)

    def define(self, offset: int, width: int, value: int = 0, mask: int = 0) -> None:
        """Define a register with its value after reset and the bits that a driver may write."""
        span = slice(offset, offset + width)
        self._image[span] = self._reset[span] = value.to_bytes(width, "little")
        self._mask[span] = mask.to_bytes(width, "little")

    def define_constant(self, offset: int, width: int, value: int) -> None:
        """Define a register that says what the device is, and so must be equal in a device that takes its state."""
        self.define(offset, width, value)
        self._constants.append((offset, width))

    def get(self, offset: int, width: int) -> int:
        """Return a register's value."""
        return int.from_bytes(self._image[offset : offset + width], "little")

    def put(self, offset: int, width: int, value: int) -> None:
        """Set a register as the device itself does, whatever a driver may write; too large a value wraps."""
        data = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        with self._lock:
            self._image[offset : offset + width] = data

    def change(self, offset: int, width: int, *, clear: int = 0, put: int = 0) -> None:
        """Clear bits of a register, then set bits, as the device itself does."""
        with self._lock:
            value = self.get(offset, width) & ~clear | put
            self._image[offset : offset + width] = value.to_bytes(width, "little")

    def read(self, offset: int, count: int) -> bytes:
        """Return what a driver reads; beyond the image there are zeros."""
        return bytes(self._image[offset : offset + count]).ljust(count, b"\0")

    def write(self, offset: int, data: Buffer) -> None:
        """Write as a driver does; raise OSError (EINVAL) unless it is one aligned access of 4 or 8 bytes."""
        width = len(data)
        if width not in {4, 8} or offset % width:
            raise OSError(errno.EINVAL, f"no register access: {width} bytes at 0x{offset:x}")
        self.write_masked(offset, data)

    def write_masked(self, offset: int, data: Buffer) -> None:
        """Write any number of bytes where the mask lets them through."""
        count = max(min(len(data), self.size - offset), 0)
        span = slice(offset, offset + count)
        mask = int.from_bytes(self._mask[span], "little")
        new = int.from_bytes(data[:count], "little")
        with self._lock:
            old = int.from_bytes(self._image[span], "little")
            self._image[span] = (old & ~mask | new & mask).to_bytes(count, "little")

    def reset(self) -> None:
        """Give every register the value that it has after reset."""
        self._image[:] = self._reset

    def save(self) -> bytes:
        """Return the image."""
        return bytes(self._image)

    def check(self, image: Buffer) -> None:
        """Raise ValueError if an image is not one of a device like this."""
        if len(image) != self.size:
            raise ValueError(f"an image of {len(image)} bytes of registers, {self.size} are expected")
        for offset, width in self._constants:
            span = slice(offset, offset + width)
            if image[span] != self._reset[span]:
                raise ValueError(f"register 0x{offset:x} is another device's")

    def load(self, image: Buffer) -> None:
        """Put back an image that has been checked."""
        self._image[:] = image
