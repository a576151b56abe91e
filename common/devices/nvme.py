"""nvme: reads and writes the blocks of a namespace that can be computed (datasheets, nvme).

It has no pre-copy: all of its state, which is the map of generations, goes in STOP_COPY.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from common.datasheets import nvme, pattern, pci
from common.devices.dma import DmaFault
from common.devices.knobs import Knobs
from common.devices.ring_device import Entry, RingDevice
from common.vfio.feature import Buffer
from common.vfio.migration import MigrationFlags

__all__ = ["Nvme", "NvmeKnobs"]

_CLASS_STORAGE = 0x018000  # mass storage, other: no operating system takes it for an NVM Express controller
_MAX_BLOCKS = 1 << 22  # a namespace of 16 GiB: the map of one that is full of writes still fits the state
_MAX_TRANSFER = 256
_MAX_GENERATION = 0xFFFFFF
_WRITTEN = np.dtype([("lba", "<u4"), ("generation", "<u4")])
_COUNT = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeKnobs(Knobs):
    """Knobs of an nvme: `blocks` of 4096 bytes, `latency_us` that every command takes at least."""

    KIND_FLAGS: ClassVar[MigrationFlags] = MigrationFlags.STOP_COPY | MigrationFlags.P2P

    blocks: int = 1 << 18
    latency_us: int = 100

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)  # super() would find the class that slots have replaced
        if not 1 <= self.blocks <= _MAX_BLOCKS:
            raise ValueError(f"blocks {self.blocks} is not within 1 and {_MAX_BLOCKS}")
        if self.latency_us > 10_000_000:
            raise ValueError(f"latency_us {self.latency_us} is more than 10 seconds")


class Nvme(RingDevice):
    """The device."""

    ENTRY = nvme.ENTRY

    def __init__(self, name: str, knobs: NvmeKnobs) -> None:
        super().__init__(
            name,
            knobs,
            magic=nvme.MAGIC,
            device_id=nvme.DEVICE_ID,
            class_code=_CLASS_STORAGE,
            geometry=knobs.blocks,
        )
        self.registers.define_constant(nvme.CAPACITY, 8, knobs.blocks)
        self._generations: npt.NDArray[np.uint32] = np.zeros(knobs.blocks, dtype=np.uint32)
        self._latency = knobs.latency_us / 1e6
        # When commands were seen: (time, HEAD once they are done). It does not travel: who resumes sees them anew.
        self._seen: deque[tuple[float, int]] = deque()

    def allowance(self, posted: int, now: float) -> tuple[int, float]:
        """Return how many commands have waited for as long as a command takes."""
        head = self.registers.get(pci.HEAD, 4)
        seen = self._seen
        while seen and not 0 < (seen[0][1] - head) & 0xFFFF_FFFF <= posted:
            seen.popleft()
        known = (seen[-1][1] - head) & 0xFFFF_FFFF if seen else 0
        if known < posted:
            seen.append((now, (head + posted) & 0xFFFF_FFFF))
        ready = 0
        for since, end in seen:
            if since + self._latency > now:
                break
            ready = (end - head) & 0xFFFF_FFFF
        if not ready:
            return 0, seen[0][0] + self._latency - now
        return ready, 0.0

    def execute(self, entry: Entry) -> Entry:
        """Carry out one command."""
        opcode, blocks, lba, iova, command, _ = entry
        if opcode not in {nvme.OP_READ, nvme.OP_WRITE}:
            status = nvme.STATUS_BAD_OPCODE
        elif not 1 <= blocks <= _MAX_TRANSFER or lba + blocks > self._generations.size:
            status = nvme.STATUS_BAD_LBA
        else:
            try:
                if opcode == nvme.OP_READ:
                    self._read(lba, blocks, iova)
                    status = nvme.STATUS_OK
                else:
                    status = self._write(lba, blocks, iova)
            except DmaFault:
                self.fault()
                status = nvme.STATUS_DMA_FAULT
        return opcode, blocks, lba, iova, command, status

    def _read(self, lba: int, blocks: int, iova: int) -> None:
        generations = self._generations[lba : lba + blocks].tolist()
        seeds = (nvme.content_seed(block, generation) for block, generation in enumerate(generations, lba))
        self.dma.write(iova, b"".join(pattern.block(seed, nvme.BLOCK_SIZE) for seed in seeds))

    def _write(self, lba: int, blocks: int, iova: int) -> int:
        data = memoryview(self.dma.read(iova, blocks * nvme.BLOCK_SIZE))
        generations = []
        for block in range(blocks):
            content = data[block * nvme.BLOCK_SIZE : (block + 1) * nvme.BLOCK_SIZE]
            generation = nvme.generation_of(pattern.seed_of(content))
            if content != pattern.block(nvme.content_seed(lba + block, generation), nvme.BLOCK_SIZE):
                return nvme.STATUS_BAD_DATA
            generations.append(generation)
        # All of a command or none of it, like a device with a power-loss-protected cache.
        self._generations[lba : lba + blocks] = generations
        return nvme.STATUS_OK

    def save_kind(self) -> bytes:
        """Return the generations that are not 0, in order of LBA."""
        lbas = np.flatnonzero(self._generations)
        written = np.empty(lbas.size, dtype=_WRITTEN)
        written["lba"] = lbas
        written["generation"] = self._generations[lbas]
        return _COUNT.pack(lbas.size) + written.tobytes()

    def check_kind(self, registers: Buffer, state: Buffer) -> None:  # noqa: ARG002 - CAPACITY is checked as a constant
        """Refuse a map that no device like this can have saved."""
        if len(state) < _COUNT.size or len(state) != _COUNT.size + _COUNT.unpack_from(state)[0] * _WRITTEN.itemsize:
            raise ValueError("the map of generations is incomplete")
        written = np.frombuffer(state, dtype=_WRITTEN, offset=_COUNT.size)
        lbas = written["lba"].astype(np.int64)
        if lbas.size and (int(lbas[-1]) >= self._generations.size or bool((np.diff(lbas) <= 0).any())):
            raise ValueError("the map of generations is not in order, or beyond the namespace")
        generations = written["generation"]
        if bool(((generations == 0) | (generations > _MAX_GENERATION)).any()):
            raise ValueError("the map of generations has some that cannot be")

    def load_kind(self, state: Buffer) -> None:
        """Take over a map of generations."""
        written = np.frombuffer(state, dtype=_WRITTEN, offset=_COUNT.size)
        self._generations[:] = 0
        self._generations[written["lba"]] = written["generation"]

    def reset_work(self) -> None:
        """Keep the namespace: it is a disk."""
        self._seen.clear()
