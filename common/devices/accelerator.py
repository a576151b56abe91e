"""accelerator: much memory of its own, which jobs, peers and the device itself change (datasheets, accelerator)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from common.datasheets import accelerator, pattern
from common.devices.dma import DmaFault
from common.devices.knobs import Knobs
from common.devices.ring_device import Entry, RingDevice
from common.devices.stream import DeviceMemory
from common.vfio.feature import Buffer
from common.vfio.migration import MigrationFlags

__all__ = ["Accelerator", "AcceleratorKnobs"]

_CLASS_ACCELERATOR = 0x120000
_MIN_MEMORY, _MAX_MEMORY = 64 << 10, 16 << 30
_MAX_LENGTH = 1 << 20
_BACKLOG = 0.02  # seconds of its rate that the device makes up for after it could not work
_MAX_MOVES = 256  # in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorKnobs(Knobs):
    """Knobs of an accelerator: `memory` in bytes, a power of two; `churn` of its own half in bytes per second."""

    KIND_FLAGS: ClassVar[MigrationFlags] = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY

    memory: int = 16 << 20
    churn: float = 1e6

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)  # super() would find the class that slots have replaced
        if not _MIN_MEMORY <= self.memory <= _MAX_MEMORY or self.memory & (self.memory - 1):
            raise ValueError(f"memory {self.memory} is no power of two within {_MIN_MEMORY} and {_MAX_MEMORY} bytes")
        if self.churn > 1e10:
            raise ValueError(f"churn {self.churn} is more than 1e10 bytes per second")


class Accelerator(RingDevice):
    """The device."""

    ENTRY = accelerator.ENTRY
    memory: DeviceMemory

    def __init__(self, name: str, knobs: AcceleratorKnobs) -> None:
        super().__init__(
            name,
            knobs,
            magic=accelerator.MAGIC,
            device_id=accelerator.DEVICE_ID,
            class_code=_CLASS_ACCELERATOR,
            geometry=knobs.memory,
            memory=knobs.memory,
        )
        self.registers.define_constant(accelerator.MEMORY_SIZE, 8, knobs.memory)
        self.registers.define(accelerator.STEPS, 8)
        self._half = knobs.memory // 2
        self._cells = self._half // accelerator.CELL
        self._churn = knobs.churn / accelerator.CELL  # moves per second
        self._due = 0.0  # moves
        self._counted = 0.0  # when that was so
        self.reset_work()

    def allowance(self, posted: int, now: float) -> tuple[int, float]:  # noqa: ARG002 - there is always time for jobs
        """Let all jobs run."""
        return posted, 0.0

    def execute(self, entry: Entry) -> Entry:
        """Run one job."""
        opcode, length, offset, iova, argument, _ = entry
        try:
            status = self._run(opcode, length, offset, iova, argument)
        except DmaFault:
            self.fault()
            status = accelerator.STATUS_DMA_FAULT
        return opcode, length, offset, iova, argument, status

    def background(self, now: float) -> float | None:
        """Move on the cells whose time has come."""
        if not self._churn:
            return None
        self._due = min(self._due + (now - self._counted) * self._churn, max(_BACKLOG * self._churn, 1.0))
        self._counted = now
        steps = self.registers.get(accelerator.STEPS, 8)
        moves = min(int(self._due), _MAX_MOVES)
        for move in range(steps, steps + moves):
            cell = move % self._cells
            content = pattern.block(accelerator.cell_seed(cell, move // self._cells + 1), accelerator.CELL)
            self.memory.write(self._half + cell * accelerator.CELL, content)
        self.registers.put(accelerator.STEPS, 8, steps + moves)
        self._due -= moves
        return max(1 - self._due, 0.0) / self._churn

    def memory_written(self, offset: int, data: Buffer) -> None:
        """Take a write to BAR 2 where it is the driver's and the peers'; the device's own half ignores it."""
        if offset < self._half:
            self.memory.write(offset, memoryview(data)[: self._half - offset])

    def reset_work(self) -> None:
        """Clear the driver's half, and put every cell at step 0."""
        self.memory.bytes[: self._half] = 0
        for cell in range(self._cells):
            at = self._half + cell * accelerator.CELL
            self.memory.view[at : at + accelerator.CELL] = pattern.block(
                accelerator.cell_seed(cell, 0), accelerator.CELL
            )
        self.memory.mark(0, self.memory.bytes.size)

    def _run(self, opcode: int, length: int, offset: int, iova: int, argument: int) -> int:
        if opcode not in {accelerator.OP_LOAD, accelerator.OP_XOR, accelerator.OP_STORE}:
            return accelerator.STATUS_BAD_OPCODE
        # STORE may read all of the memory; what changes it keeps to the driver's half.
        limit = 2 * self._half if opcode == accelerator.OP_STORE else self._half
        if not 0 < length <= _MAX_LENGTH or offset + length > limit:
            return accelerator.STATUS_BAD_RANGE
        if opcode == accelerator.OP_LOAD:
            self.memory.write(offset, self.dma.read(iova, length))
        elif opcode == accelerator.OP_STORE:
            self.dma.write(iova, bytes(self.memory.view[offset : offset + length]))
        else:
            span = self.memory.bytes[offset : offset + length]
            np.bitwise_xor(span, np.uint8(argument & 0xFF), out=span)
            self.memory.mark(offset, length)
        return accelerator.STATUS_OK
