"""The data stream of a migration: what a device gives out while it is saved, and takes in while it resumes.

A stream is a sequence of records: one IDENTITY (which device this is), MEMORY for every part of the device's memory and
again for what has changed since, and one STATE (registers and all else), which ends it. The same device in the same
state gives the same bytes for a stream that was not begun in PRE_COPY, however it is read.

On memory that changes while it is read: a record's dirty bits are cleared when it begins, and the memory itself is read
after that, perhaps much later. A write in between sets the bit again and the page goes once more; so no lock is held
and nothing is copied aside, and no record has a digest of memory.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from common.vfio.feature import Buffer, PrecopyInfo

__all__ = [
    "PAGE_SIZE",
    "RECORD_PAGES",
    "VERSION",
    "DeviceMemory",
    "LoadStream",
    "Loading",
    "RecordFormat",
    "RecordType",
    "SaveStream",
    "Saving",
    "StateFormat",
]

PAGE_SIZE = 4096
RECORD_PAGES = 256
VERSION = 1
MAX_STATE = 64 << 20
_MAGIC = 0x56445753  # "SWDV"
_HEADER = struct.Struct("<IHHQQQ")  # magic, version, type, offset in device memory, bytes that follow, their xxh3_64


class Saving(Protocol):
    """A saving session, from PRE_COPY or STOP_COPY to its end."""

    def info(self) -> PrecopyInfo:
        """Return what can be read now."""

    def finish(self, state: bytes) -> None:
        """Say that the device has stopped with `state`, which is the last that comes."""

    def remaining(self, state: bytes) -> int:
        """Return how many bytes are left to read if the device stops now with `state`; 0 at the end."""

    def read(self, size: int) -> memoryview:
        """Return up to `size` bytes, fewer only if there are no more now; valid until the next read."""


class Loading(Protocol):
    """A resuming session."""

    def write(self, data: Buffer) -> None:
        """Take the next bytes, in any pieces."""

    def finish(self) -> bytes:
        """Return the state that a whole stream has brought; raise ValueError with the first thing that was wrong."""


class StateFormat(Protocol):
    """How a device's state is laid out as a stream."""

    def save(self) -> Saving:
        """Begin a saving session."""

    def load(self) -> Loading:
        """Begin a resuming session."""

    def length(self, state: bytes) -> int:
        """Return how many bytes a whole stream has that begins in STOP_COPY."""


class RecordType(IntEnum):
    """What follows a record's header. MEMORY has no digest (0)."""

    IDENTITY = 1
    MEMORY = 2
    STATE = 3


class DeviceMemory:
    """A device's own memory and which of its pages have been written."""

    def __init__(self, size: int) -> None:
        self.bytes: npt.NDArray[np.uint8] = np.zeros(size, dtype=np.uint8)
        self.view = self.bytes.data
        self.dirty: npt.NDArray[np.bool_] = np.zeros(size // PAGE_SIZE, dtype=np.bool_)

    def write(self, offset: int, data: Buffer) -> None:
        """Write, then mark; bounds are the caller's."""
        self.view[offset : offset + len(data)] = data
        self.mark(offset, len(data))

    def mark(self, offset: int, size: int) -> None:
        """Mark the pages of a range that has been written."""
        self.dirty[offset // PAGE_SIZE : -(-(offset + size) // PAGE_SIZE)] = True

    def next_run(self) -> tuple[int, int]:
        """Return the first dirty run as (page, pages), of at most a record's size; no pages if nothing is dirty."""
        first = int(self.dirty.argmax())
        window = self.dirty[first : first + RECORD_PAGES]
        if not window[0]:
            return 0, 0
        return first, window.size if window.all() else int(window.argmin())

    def dirty_bytes(self, pages: int) -> int:
        """Return what the records for the dirty ones of the first `pages` pages would take, in bytes."""
        edges = np.flatnonzero(np.diff(self.dirty[:pages].view(np.int8), prepend=0, append=0))
        lengths = edges[1::2] - edges[::2]
        return int(lengths.sum()) * PAGE_SIZE + int((-(-lengths // RECORD_PAGES)).sum()) * _HEADER.size


def _record(kind: RecordType, body: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, kind, 0, len(body), xxhash.xxh3_64_intdigest(body)) + body


def _memory_bytes(pages: int) -> int:
    """Return what the records for that many pages in a row take, in bytes."""
    return pages * PAGE_SIZE + -(-pages // RECORD_PAGES) * _HEADER.size


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """The format of this module, for a device with an identity and perhaps memory of its own."""

    identity: bytes
    memory: DeviceMemory | None

    def save(self) -> SaveStream:
        """Begin a saving session."""
        return SaveStream(self.identity, self.memory)

    def load(self) -> LoadStream:
        """Begin a resuming session."""
        return LoadStream(self.identity, self.memory)

    def length(self, state: bytes) -> int:
        """Return how many bytes a whole stream has that begins in STOP_COPY."""
        pages = 0 if self.memory is None else self.memory.dirty.size
        return 2 * _HEADER.size + len(self.identity) + _memory_bytes(pages) + len(state)


class SaveStream:
    """One saving session, from PRE_COPY or STOP_COPY to its end."""

    def __init__(self, identity: bytes, memory: DeviceMemory | None) -> None:
        self._memory = memory
        self._pages = 0 if memory is None else memory.dirty.size
        self._cursor = 0  # pages below it have been given out once
        self._identity = _record(RecordType.IDENTITY, identity)
        self._parts: deque[memoryview] = deque()  # what is left of the record that is being read
        self._parts_initial = False
        self._state: bytes | None = None
        self._buffer = bytearray()

    def info(self) -> PrecopyInfo:
        """Return what can be read now."""
        waiting = sum(map(len, self._parts))
        initial = len(self._identity) + _memory_bytes(self._pages - self._cursor)
        dirty = 0 if self._memory is None else self._memory.dirty_bytes(self._cursor)
        if self._parts_initial:
            return PrecopyInfo(initial + waiting, dirty)
        return PrecopyInfo(initial, dirty + waiting)

    def finish(self, state: bytes) -> None:
        """Say that the device has stopped: the stream goes on with what has not been read, and ends with `state`."""
        self._state = _record(RecordType.STATE, state)

    def remaining(self, state: bytes) -> int:
        """Return how many bytes are left to read if the device stops now with `state`; 0 at the end."""
        info = self.info()
        ending = _HEADER.size + len(state) if self._state is None else len(self._state)
        return info.initial_bytes + info.dirty_bytes + ending

    def read(self, size: int) -> memoryview:
        """Return up to `size` bytes, fewer only if there are no more now; valid until the next read."""
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)
        filled = 0
        while filled < size and (self._parts or self._begin()):
            part = self._parts[0]
            count = min(len(part), size - filled)
            view[filled : filled + count] = part[:count]
            filled += count
            if count == len(part):
                self._parts.popleft()
            else:
                self._parts[0] = part[count:]
        return view[:filled]

    def _begin(self) -> bool:
        """Begin the next record; return whether there is one."""
        if self._identity:
            self._parts.append(memoryview(self._identity))
            self._parts_initial, self._identity = True, b""
            return True
        if self._memory is not None:
            first, pages = self._cursor, min(RECORD_PAGES, self._pages - self._cursor)
            self._parts_initial = pages > 0
            self._cursor += pages
            if not pages:
                first, pages = self._memory.next_run()
            if pages:
                self._memory.dirty[first : first + pages] = False
                offset, size = first * PAGE_SIZE, pages * PAGE_SIZE
                header = _HEADER.pack(_MAGIC, VERSION, RecordType.MEMORY, offset, size, 0)
                self._parts += (memoryview(header), self._memory.view[offset : offset + size])
                return True
        if self._state:
            self._parts.append(memoryview(self._state))
            self._parts_initial, self._state = False, b""
            return True
        return False


class LoadStream:
    """One resuming session: takes any bytes in any pieces, and says at the end what was wrong with them.

    Memory is written as it comes, for the device is stopped and its old content worthless; everything else waits until
    the stream is known to be whole.
    """

    def __init__(self, identity: bytes, memory: DeviceMemory | None) -> None:
        self._identity = identity
        self._memory = memory
        self._covered = np.zeros(0 if memory is None else memory.dirty.size, dtype=np.bool_)
        self._head = bytearray()
        self._kind: RecordType | None = None
        self._digest = 0
        self._target: memoryview = memoryview(b"")
        self._filled = 0
        self._identified = False
        self._state: bytes | None = None
        self._defect: str | None = None

    def write(self, data: Buffer) -> None:
        """Take the next bytes; after a defect they are thrown away."""
        view = memoryview(data).cast("B")
        while view and self._defect is None:
            try:
                view = view[self._take(view) :]
            except ValueError as error:
                self._defect = str(error)

    def finish(self) -> bytes:
        """Return the body of STATE of a whole stream; raise ValueError with the first thing that was wrong."""
        if self._defect is not None:
            raise ValueError(self._defect)
        if self._state is None:
            raise ValueError("the state is incomplete: its end has not come")
        if self._head:
            raise ValueError("there is more after the end of the state")
        return self._state

    def _take(self, view: memoryview) -> int:
        if self._kind is None:
            count = min(len(view), _HEADER.size - len(self._head))
            self._head += view[:count]
            if len(self._head) == _HEADER.size:
                self._open(*_HEADER.unpack(self._head))
                self._head.clear()
            return count
        count = min(len(view), len(self._target) - self._filled)
        self._target[self._filled : self._filled + count] = view[:count]
        self._filled += count
        if self._filled == len(self._target):
            self._close(self._kind)
            self._kind = None
        return count

    def _open(self, magic: int, version: int, kind: int, offset: int, size: int, digest: int) -> None:
        if magic != _MAGIC or version != VERSION:
            raise ValueError(f"a record of magic 0x{magic:x}, version {version}: unknown")
        if self._state is not None:
            raise ValueError("there is more after the end of the state")
        if self._identified == (kind == RecordType.IDENTITY):
            raise ValueError("a state says once, and first, which device it is of")
        if kind == RecordType.MEMORY:
            memory = self._memory
            if memory is None or digest or not 0 < size <= RECORD_PAGES * PAGE_SIZE or (offset | size) % PAGE_SIZE:
                raise ValueError(f"a record of {size} bytes of memory at 0x{offset:x}: not possible here")
            if offset + size > memory.bytes.size:
                raise ValueError(f"0x{offset:x} + 0x{size:x} is outside the device's memory")
            self._target = memory.view[offset : offset + size]
            self._covered[offset // PAGE_SIZE : (offset + size) // PAGE_SIZE] = True
        elif kind in {RecordType.IDENTITY, RecordType.STATE}:
            limit = len(self._identity) if kind == RecordType.IDENTITY else MAX_STATE
            if offset or not 0 < size <= limit:
                raise ValueError(f"a record of {size} bytes of type {kind}: not possible")
            self._target = memoryview(bytearray(size))
        else:
            raise ValueError(f"a record of type {kind}: unknown")
        self._kind, self._digest, self._filled = RecordType(kind), digest, 0

    def _close(self, kind: RecordType) -> None:
        if kind is RecordType.MEMORY:
            return
        body = bytes(self._target)
        if xxhash.xxh3_64_intdigest(body) != self._digest:
            raise ValueError("a record's content is not what its digest says")
        if kind is RecordType.IDENTITY:
            if body != self._identity:
                raise ValueError("the state is of another device, or of one with other knobs")
            self._identified = True
        elif not self._covered.all():
            raise ValueError(f"{self._covered.size - int(self._covered.sum())} pages of device memory have not come")
        else:
            self._state = body
