"""driver for an accelerator: what was put into its memory is there until something else is put there.

A job takes a slot of device memory, stores its content to RAM, where it must be what an earlier job left, then loads
new content and changes it. Beside the jobs the driver reads BAR 2: the device's own cells, each of which must be at the
step that it should have reached, and the window that a nic writes to, where every write must have arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.datasheets import accelerator, nic, pattern, pci
from common.guest.device import GuestDevice
from common.guest.programs.driver import Driver, DriverState, check_knob, mix
from common.guest.programs.driver_nic import peer_window
from common.guest.programs.program import NEVER, Area, Moment, in_ram

__all__ = ["AcceleratorDriver", "AcceleratorKnobs", "latest_write", "steps_of"]

STEPS_OF_JOB = 3  # STORE, LOAD, XOR
BATCH = 4  # jobs, posted when those before are finished: then nothing makes up for a signal that was lost
RING_ENTRIES = 16
JOBS = 16  # that have buffers
MAX_SLOTS = 1024
CELLS_AT_ONCE = 16
WINDOW_AT_ONCE = 64 << 10
HURRY = 256  # looks without a break after a pause
# A slot's content: pattern.block(seed, length) with each byte XORed; seed 0 is nothing that the driver knows of.
CONTENT = np.dtype([("seed", "<u8"), ("argument", "<u8")])
# What the two buffers of a job must hold.
JOB = np.dtype([("stored", CONTENT), ("loaded", CONTENT)])


def steps_of(cell: int, moves: int, cells: int) -> int:
    """Return at which step a cell is after `moves` cell moves."""
    return moves // cells + (cell < moves % cells)


def latest_write(block: int, writes: int, blocks: int) -> int | None:
    """Return the number of the last of `writes` writes that went to `block`, one of `blocks`; None if none did."""
    if writes <= block:
        return None
    return block + (writes - 1 - block) // blocks * blocks


@dataclass(frozen=True, slots=True)
class AcceleratorKnobs:
    """`jobs` a second on `block` bytes each; `looks` into BAR 2 a second, 0 for none."""

    device: str
    remap: int = 16
    jobs: int = 100
    block: int = 32 << 10
    looks: int = 20
    stall_ms: int = 5000

    def __post_init__(self) -> None:
        check_knob("remap", self.remap, 0, 1 << 32)
        check_knob("jobs", self.jobs, 1, 100_000)
        check_knob("block", self.block, 64, 64 << 10)
        check_knob("looks", self.looks, 0, 10_000)
        check_knob("stall_ms", self.stall_ms, 1, 3_600_000)


@in_ram
class AcceleratorState(DriverState):
    """Times are those that the vCPU ran."""

    memory_size: int
    block: int  # bytes of a slot
    slots: int
    due_ns: int  # next job
    look_ns: int  # next look
    looks: int
    hurry: int  # looks to take at once
    moves: int  # register STEPS, at the last look
    cells: int  # checked
    peer_blocks: int  # checked


class AcceleratorDriver(Driver[AcceleratorState]):
    """Job n has ring entries 3n (STORE), 3n + 1 (LOAD), 3n + 2 (XOR), and two buffers."""

    COUNTERS: tuple[str, ...] = (*Driver.COUNTERS, "looks", "cells", "peer_blocks")
    COMPLETION = "status"
    MAGIC = accelerator.MAGIC

    def __init__(
        self,
        name: str,
        area: Area,
        knobs: AcceleratorKnobs,
        device: GuestDevice,
        peer: GuestDevice | None,
        iova_top: int,
    ) -> None:
        """`peer` is the nic that writes to this device's memory."""
        super().__init__(name, area, AcceleratorState, device, iova_top)
        self._knobs = knobs
        self._peer = peer
        self.lay_out(area, (accelerator.ENTRY, RING_ENTRIES), (2 * JOBS, knobs.block), knobs.stall_ms)
        self._slots = area.array(MAX_SLOTS, CONTENT)
        self._held = area.array(JOBS, JOB)

    def begin(self, moment: Moment) -> None:
        """Begin with device memory of unknown content."""
        super().begin(moment)
        for array in (self._slots, self._held):
            array.data.view(np.uint8)[:] = 0
            array.mark()
        self.state.due_ns = self.state.look_ns = moment.run_ns

    def prepare(self) -> None:
        """Divide the driver's half of device memory: the peer's window, then slots."""
        state = self.state
        if self._peer is not None:
            self._peer.enable()
        state.memory_size = self.device.read(accelerator.MEMORY_SIZE, 8)
        room = state.memory_size // 2 - peer_window(state.memory_size)
        state.block = min(self._knobs.block, room // 4)
        if state.block < 64:
            raise ValueError(f"{self.device.name} has too little memory: {state.memory_size} bytes")
        state.slots = min(room // state.block, MAX_SLOTS)

    def post(self, moment: Moment) -> int:
        """Post the next batch of jobs when it is due and the last one is finished; look into BAR 2 when that is due."""
        state = self.state
        self._look_if_due(moment)
        if not self.outstanding and moment.run_ns >= state.due_ns:
            for _ in range(BATCH):
                self._post_job(state.posted // STEPS_OF_JOB)
            self.publish(state.posted)
            state.due_ns = max(state.due_ns, moment.run_ns) + BATCH * 1_000_000_000 // self._knobs.jobs
        if state.hurry:
            return moment.now_ns
        job_ns = self._stall_ns if self.outstanding else state.due_ns - moment.run_ns
        look_ns = state.look_ns - moment.run_ns if self._knobs.looks else NEVER
        return moment.now_ns + max(0, min(job_ns, look_ns))

    def _post_job(self, job: int) -> None:
        state = self.state
        held = self._held.data[job % JOBS]
        if job >= JOBS:
            self._check(job - JOBS, "stored", "kept")
            self._check(job - JOBS, "loaded", "kept")
        buffers = self._buffers(job)
        # Request numbers for remapping are those of buffers.
        self.maybe_remap(2 * job, self._knobs.remap)
        self.maybe_remap(2 * job + 1, self._knobs.remap)
        slot = mix(job) % state.slots
        content = self._slots.data[slot]
        held["stored"] = content
        seed, argument = job + 1, mix(job) >> 48 & 0xFF
        held["loaded"] = (seed, 0)
        content["seed"], content["argument"] = seed, argument
        self.buffers.write(buffers[1], pattern.block(seed, state.block))
        offset = peer_window(state.memory_size) + slot * state.block
        iovas = self.buffers.iovas
        first = job * STEPS_OF_JOB
        for number, entry in enumerate(
            (
                (accelerator.OP_STORE, state.block, offset, int(iovas[buffers[0]]), 0, 0),
                (accelerator.OP_LOAD, state.block, offset, int(iovas[buffers[1]]), 0, 0),
                (accelerator.OP_XOR, state.block, offset, 0, argument, 0),
            ),
            first,
        ):
            self.ring.table[number % self.ring.entries] = entry
        self._held.mark()
        self._slots.mark(slot, 1)
        state.posted = first + STEPS_OF_JOB

    def finish(self, first: int, count: int) -> None:
        """Check the statuses of entries, and what was stored."""
        entries = self.ring.table[self.ring.slots(first, count)].tolist()
        for number, (opcode, _, offset, *_, status) in enumerate(entries, first):
            job, step = divmod(number, STEPS_OF_JOB)
            if opcode != (accelerator.OP_STORE, accelerator.OP_LOAD, accelerator.OP_XOR)[step]:
                self.error(f"entry {number} of the ring has operation {opcode}")
            elif status != accelerator.STATUS_OK:
                self.error(f"job {job}: operation {opcode} at {offset:#x} ended with status {status}")
            elif opcode == accelerator.OP_STORE:
                self._check(job, "stored", "brought")

    def _buffers(self, job: int) -> tuple[int, int]:
        """Return the buffers of a job, for STORE and for LOAD."""
        return 2 * (job % JOBS), 2 * (job % JOBS) + 1

    def _check(self, job: int, which: str, what: str) -> None:
        seed, argument = self._held.data[job % JOBS][which].tolist()
        if not seed:
            return
        buffer = self._buffers(job)[which == "loaded"]
        data = np.frombuffer(self.buffers.read(buffer, self.state.block), np.uint8)
        wrong = data != np.frombuffer(pattern.block(seed, self.state.block), np.uint8) ^ np.uint8(argument)
        if wrong.any():
            page = self.memory.page_of(self.buffers.gpa(buffer))
            looks = pattern.seed_of((data ^ np.uint8(argument)).tobytes())
            self.error(
                f"job {job}: what was {which}, {what} from page {page} of RAM, differs in {int(wrong.sum())} bytes "
                f"from {seed} ^ {argument}: it looks like {looks}"
            )

    def _look_if_due(self, moment: Moment) -> None:
        state = self.state
        if not self._knobs.looks:
            return
        if state.hurry:
            state.hurry -= 1
        elif moment.run_ns < state.look_ns:
            return
        else:
            state.look_ns = max(state.look_ns, moment.run_ns) + 1_000_000_000 // self._knobs.looks
        if self._peer is not None and state.looks % 2:
            self._look_at_window(state.looks // 2)
        else:
            self._look_at_cells(state.looks // 2 if self._peer is not None else state.looks)
        state.looks += 1

    def _look_at_cells(self, look: int) -> None:
        state = self.state
        cells = state.memory_size // 2 // accelerator.CELL
        first = look * CELLS_AT_ONCE % cells
        count = min(CELLS_AT_ONCE, cells - first)
        before = self.device.read(accelerator.STEPS, 8)
        offset = state.memory_size // 2 + first * accelerator.CELL
        data = self.device.read_bar(pci.MEMORY_BAR, offset, count * accelerator.CELL)
        after = self.device.read(accelerator.STEPS, 8)
        if before < state.moves:
            self.error(f"STEPS went back from {state.moves} to {before}")
        state.moves = after
        state.cells += count
        for index in range(count):
            cell = first + index
            content = data[index * accelerator.CELL : (index + 1) * accelerator.CELL]
            seed = pattern.seed_of(content)
            low, high = steps_of(cell, before, cells), steps_of(cell, after, cells)
            possible = (accelerator.cell_seed(cell, step) for step in range(low, high + 1))
            if seed not in possible or content != pattern.block(seed, accelerator.CELL):
                self.error(
                    f"cell {cell} is wrong: it looks like cell {seed >> 40} at step {seed & 0xFF_FFFF_FFFF}, "
                    f"not at {low} to {high}"
                )

    def _look_at_window(self, look: int) -> None:
        if self._peer is None:
            return
        window = peer_window(self.state.memory_size)
        blocks = window // nic.PEER_BLOCK
        offset = look * WINDOW_AT_ONCE % window
        size = min(WINDOW_AT_ONCE, window - offset)
        before = self._peer.read(nic.PEER_SEQUENCE, 8)
        data = self.device.read_bar(pci.MEMORY_BAR, offset, size)
        after = self._peer.read(nic.PEER_SEQUENCE, 8)
        for start in range(0, size, nic.PEER_BLOCK):
            block = (offset + start) // nic.PEER_BLOCK
            oldest = latest_write(block, before, blocks)
            # The last write may have arrived although the nic has not counted it yet.
            newest = latest_write(block, after + 1, blocks)
            if oldest is None or newest is None:
                continue
            self.state.peer_blocks += 1
            content = data[start : start + nic.PEER_BLOCK]
            seed = pattern.seed_of(content)
            if seed not in range(oldest, newest + 1, blocks) or content != pattern.block(seed, nic.PEER_BLOCK):
                self.error(
                    f"block {block} of the peer's window is wrong: it looks like write {seed}, not {oldest} to {newest}"
                )

    def resumed(self) -> None:
        """Look at everything soon."""
        if self._knobs.looks:
            covering = self.state.memory_size // 2 // accelerator.CELL // CELLS_AT_ONCE
            self.state.hurry = min(2 * covering + 1, HURRY)
