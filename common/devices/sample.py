"""sample: what clients that are written for libvfio-user's sample server expect (datasheets, sample)."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from common.datasheets import sample
from common.devices.base import ALL_IOVAS, EmulatedDevice
from common.devices.dma import DmaFault, DmaStalled
from common.devices.knobs import Knobs
from common.devices.pci import COMMAND_BUS_MASTER, COMMAND_MEMORY, Bar, ConfigSpace
from common.vfio.feature import Buffer, PrecopyInfo, Range
from common.vfio.migration import MigrationFlags

__all__ = ["Sample", "SampleKnobs"]

_CLASS_UNASSIGNED = 0xFF0000
_CHUNK = 1024
_TIMER = struct.Struct("<q")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleKnobs(Knobs):
    """Knobs of a sample: those that every kind has."""

    KIND_FLAGS: ClassVar[MigrationFlags] = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY


class Sample(EmulatedDevice):
    """The device."""

    def __init__(self, name: str, knobs: SampleKnobs) -> None:
        self._ram = bytearray(sample.MEMORY_SIZE)
        self._due = 0  # what was written to TIMER
        self._armed = False
        self._fired = False  # and nobody has looked
        bars = {sample.TIMER_BAR: sample.TIMER_BAR_SIZE, sample.MEMORY_BAR: sample.MEMORY_BAR_SIZE}
        config = ConfigSpace(
            sample.DEVICE_ID,
            _CLASS_UNASSIGNED,
            {index: Bar(size) for index, size in bars.items()},
            0,
            vendor_id=sample.VENDOR_ID,
            subsystem=sample.SUBSYSTEM,
            command=COMMAND_MEMORY | COMMAND_BUS_MASTER,
        )
        super().__init__(name, knobs, config, bars, _Format(self._ram))

    def step(self, now: float) -> float | None:  # noqa: ARG002 - the timer is not one of the monotonic clock
        """Fire when it is time."""
        if not self._armed:
            return None
        left = self._due - time.time()
        if left > 0:
            return min(left, 1.0)  # the clock may be set meanwhile
        self._armed = False
        self._fired = True
        # Clients answer messages only after they have seen the interrupt.
        self._intx.update()
        self._exercise()
        return None

    def bar_read(self, index: int, offset: int, count: int) -> bytes:
        """Read the timer, or RAM."""
        if index == sample.MEMORY_BAR:
            return bytes(self._ram[offset : offset + count]).ljust(count, b"\0")
        running = self._migration.running
        if running and offset < sample.TIMER_SIZE:
            self._fired = False
        passed = (int(time.time()) if running else 0) - self._due
        return _TIMER.pack(passed)[offset : offset + count].ljust(count, b"\0")

    def bar_write(self, index: int, offset: int, data: Buffer) -> None:
        """Set the timer, or write to RAM."""
        if index == sample.MEMORY_BAR:
            count = max(min(len(data), len(self._ram) - offset), 0)
            self._ram[offset : offset + count] = data[:count]
        elif offset < sample.TIMER_SIZE:
            if offset or len(data) != sample.TIMER_SIZE or _TIMER.unpack(data)[0] < 0:
                raise OSError(errno.EINVAL, f"no time: {len(data)} bytes at 0x{offset:x}")
            with self._engine.lock:
                self._due = _TIMER.unpack(data)[0]
                self._armed, self._fired = self._due > 0, False
            self._engine.wake()

    def interrupt_pending(self) -> bool:
        """Tell whether the timer has fired and nobody has looked; a device that is stopped asserts nothing."""
        return self._fired and self._migration.running

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        """Start the log; without ranges for everything, as libvfio-user logs whatever ranges it is given."""
        return super().logging_start(page_size, ranges or (ALL_IOVAS,))

    def reset_kind(self) -> None:
        """Clear RAM and timer."""
        self._ram[:] = bytes(len(self._ram))
        self._due, self._armed, self._fired = 0, False, False

    def save_state(self) -> bytes:
        """Return the timer."""
        return _TIMER.pack(self._due if self._armed else -self._due)

    def load_state(self, state: bytes) -> None:
        """Take over RAM and timer."""
        (due,) = _TIMER.unpack_from(state, len(self._ram))
        self._ram[:] = state[: len(self._ram)]
        self._due, self._armed, self._fired = abs(due), due > 0, False

    def _exercise(self) -> None:
        usable = [mapping.iova for mapping in self._mappings.ordered() if mapping.readable and mapping.writable][:2]
        try:
            # The mapped one first: when the client has answered the last message, all of it is done.
            for by_message, iova in reversed([*zip((True, False), usable, strict=False)]):
                for at in range(0, len(sample.DMA_CONTENT), _CHUNK):
                    self.dma.write(iova + at, sample.DMA_CONTENT[at : at + _CHUNK], by_message=by_message)
                for at in range(0, len(sample.DMA_CONTENT), 2 * _CHUNK):
                    self.dma.read(iova + at, 2 * _CHUNK, by_message=by_message)
        except (DmaFault, DmaStalled):
            return


@dataclass(frozen=True, slots=True)
class _Format:
    """The state's layout: RAM, then the timer."""

    ram: bytearray

    def save(self) -> _Saving:
        return _Saving(self.ram)

    def load(self) -> _Loading:
        return _Loading(len(self.ram), len(self.ram) + sample.TIMER_SIZE)

    def length(self, state: bytes) -> int:
        return len(self.ram) + len(state)


class _Saving:
    def __init__(self, ram: bytearray) -> None:
        self._ram = ram
        self._cursor = 0  # in PRE_COPY
        self._ending: memoryview | None = None  # what is left to read in STOP_COPY

    def info(self) -> PrecopyInfo:
        return PrecopyInfo(len(self._ram) - self._cursor, 0)

    def finish(self, state: bytes) -> None:
        self._ending = memoryview(self._begun() + self._ram + state)

    def remaining(self, state: bytes) -> int:
        return len(self._begun() + self._ram + state) if self._ending is None else len(self._ending)

    def read(self, size: int) -> memoryview:
        if self._ending is None:
            part = memoryview(self._ram[self._cursor : self._cursor + size])
            self._cursor += len(part)
        else:
            part, self._ending = self._ending[:size], self._ending[size:]
        return part

    def _begun(self) -> bytearray:
        """Return the rest of the memory that PRE_COPY has begun to bring: its length says that it was brought."""
        return self._ram[self._cursor :] if self._cursor else bytearray()


class _Loading:
    """Keeps the last bytes, which are those of STOP_COPY; before them all those of PRE_COPY were given, or none."""

    def __init__(self, memory: int, size: int) -> None:
        self._memory = memory
        self._size = size
        self._length = 0
        self._data = bytearray()

    def write(self, data: Buffer) -> None:
        self._length += len(data)
        self._data += data
        del self._data[: -self._size]

    def finish(self) -> bytes:
        if self._length - self._size not in {0, self._memory}:
            whole = f"{self._size} bytes, or {self._memory + self._size} with PRE_COPY"
            raise ValueError(f"{self._length} bytes are no whole state, which has {whole}")
        return bytes(self._data)
