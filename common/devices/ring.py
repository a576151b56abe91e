"""The ring of entries by which a driver gives work to a device (layout: datasheets, pci)."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common.datasheets import pci
from common.devices.dma import DmaFault, DmaPort
from common.devices.registers import RegisterBlock
from common.vfio.feature import Buffer

__all__ = ["MAX_ENTRIES", "Ring"]

MAX_ENTRIES = 1 << 15
_TAIL = struct.Struct("<I")
_STATE = struct.Struct("<QIB3x")
_ATTENTION, _START, _STOP = 1, 2, 4
_U32 = 0xFFFF_FFFF


class Ring:
    """A ring as the device sees it; HEAD and STATUS are registers, the rest is here.

    A driver writes CONTROL whenever it likes; the engine obeys at its next step (`obey`), so that no register access
    ever waits for DMA. `completion` is the entries' field that a driver waits for. `attention`: the ring must be looked
    at, for somebody rang or work is left.
    """

    STATE_SIZE: ClassVar[int] = _STATE.size

    def __init__(self, registers: RegisterBlock, dma: DmaPort, entry: np.dtype[np.void], completion: str) -> None:
        self.attention = False
        self._registers = registers
        self._dma = dma
        self._entry = entry
        self._completion = completion
        self._base = 0
        self._entries = 0
        self._lock = threading.Lock()
        self._pending = 0  # _START and _STOP that the engine has not obeyed yet

    @property
    def enabled(self) -> bool:
        """Whether the device works on the ring."""
        return bool(self._registers.get(pci.STATUS, 4) & pci.STATUS_ENABLED)

    def control_written(self, *, before: bool, now: bool) -> None:
        """Note a change of CONTROL_ENABLE until the engine obeys; a stop and a start in a row restart the ring."""
        with self._lock:
            if before and not now:
                self._pending = _STOP
            elif now and not before:
                self._pending |= _START

    def obey(self) -> None:
        """Stop and start as CONTROL has asked since the last step; a start begins at entry 0.

        Raise `DmaFault` if the ring is not possible (number of entries, alignment).
        """
        with self._lock:
            pending, self._pending = self._pending, 0
        if pending & _STOP:
            self._status(clear=pci.STATUS_ENABLED)
        if not pending & _START:
            return
        base = self._registers.get(pci.RING_BASE, 8)
        entries = self._registers.get(pci.RING_ENTRIES, 4)
        if not valid(base, entries):
            raise DmaFault(f"no ring: {entries} entries at iova 0x{base:x}")
        self._base, self._entries, self.attention = base, entries, True
        self._registers.put(pci.HEAD, 4, 0)
        self._status(clear=pci.STATUS_FAULT, put=pci.STATUS_ENABLED)

    def halt(self) -> None:
        """Stop working on a ring that cannot be used; the driver has to start it again."""
        self.attention = False
        self._status(clear=pci.STATUS_ENABLED)

    def posted(self) -> int:
        """Return how many entries wait; raise `DmaFault` (also if there are more than fit) or `DmaStalled`."""
        tail = _TAIL.unpack(self._dma.read(self._base, _TAIL.size))[0]
        posted: int = (tail - self._registers.get(pci.HEAD, 4)) & _U32
        if posted > self._entries:
            raise DmaFault(f"{posted} entries posted in a ring of {self._entries}")
        return posted

    def fetch(self, count: int) -> list[tuple[Any, ...]]:
        """Return the next entries, at most `count` and none beyond the ring's end; raise as `posted`."""
        index = self._registers.get(pci.HEAD, 4) % self._entries
        count = min(count, self._entries - index)
        raw = self._dma.read(self._address(index), count * self._entry.itemsize)
        entries: list[tuple[Any, ...]] = np.frombuffer(raw, dtype=self._entry).tolist()
        return entries

    def complete(self, entries: Sequence[tuple[Any, ...]]) -> None:
        """Write back the next entries, finished, and move HEAD; raise as `posted`.

        A driver that sees an entry finished must find the rest of it written and HEAD moved. A copy has no order inside
        it, so the entries are written unfinished first, and once more with what says that they are finished.
        """
        finished: npt.NDArray[np.void] = np.array(entries, dtype=self._entry)
        head = self._registers.get(pci.HEAD, 4)
        address = self._address(head % self._entries)
        unfinished = finished.copy()
        unfinished[self._completion] = 0
        self._dma.write(address, unfinished.tobytes())
        self._registers.put(pci.HEAD, 4, head + len(entries))
        self._dma.write(address, finished.tobytes())

    def reset(self) -> None:
        """Forget everything but what the registers hold."""
        self._base = self._entries = 0
        self._pending = 0
        self.attention = False

    def save(self) -> bytes:
        """Return the state."""
        return _STATE.pack(self._base, self._entries, _ATTENTION * self.attention | self._pending)

    @staticmethod
    def check(state: Buffer) -> None:
        """Raise ValueError if this is no state of a ring."""
        if len(state) != _STATE.size:
            raise ValueError(f"{len(state)} bytes of ring state, {_STATE.size} are expected")
        base, entries, flags = _STATE.unpack(state)
        if flags & ~(_ATTENTION | _START | _STOP) or not (valid(base, entries) or (base, entries) == (0, 0)):
            raise ValueError("the ring's state is not possible")

    def load(self, state: Buffer) -> None:
        """Put back a state that has been checked."""
        self._base, self._entries, flags = _STATE.unpack(state)
        self.attention = bool(flags & _ATTENTION)
        self._pending = flags & (_START | _STOP)

    def _address(self, index: int) -> int:
        return self._base + pci.RING_HEADER + index * self._entry.itemsize

    def _status(self, *, clear: int = 0, put: int = 0) -> None:
        self._registers.change(pci.STATUS, 4, clear=clear, put=put)


def valid(base: int, entries: int) -> bool:
    """Tell whether a ring of so many entries can lie at this IOVA: a power of two of them, 64-byte aligned."""
    return 0 < entries <= MAX_ENTRIES and entries & (entries - 1) == 0 and base % pci.RING_HEADER == 0
