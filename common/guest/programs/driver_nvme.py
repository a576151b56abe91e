"""driver for an nvme: reads and writes at random, and knows the generation of every block.

Requests follow from their number, and are finished in order; so a read that is posted after a write expects what that
writes. A buffer's content is checked when it comes and again when the buffer is needed for the next request. A batch is
posted when the one before is finished: no later doorbell or interrupt makes up for one that was lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from common.datasheets import nvme, pattern
from common.guest.device import GuestDevice
from common.guest.programs.driver import Driver, DriverState, check_knob, mix
from common.guest.programs.program import Area, Moment, in_ram

__all__ = ["NvmeDriver", "NvmeKnobs", "Request", "request_of"]

BACKLOG_NS = 100_000_000
GENERATIONS = 1 << 24


@dataclass(frozen=True, slots=True)
class NvmeKnobs:
    """`iops` requests a second, in batches of `depth` (a power of two), of 1 to `max_blocks`, in `span` blocks."""

    device: str
    remap: int = 16
    iops: int = 500
    depth: int = 16
    max_blocks: int = 8
    span: int = 4096
    stall_ms: int = 5000

    def __post_init__(self) -> None:
        check_knob("remap", self.remap, 0, 1 << 32)
        check_knob("iops", self.iops, 1, 1_000_000)
        check_knob("depth", self.depth, 1, 32)
        check_knob("max_blocks", self.max_blocks, 1, 64)
        check_knob("span", self.span, self.max_blocks, 1 << 18)
        check_knob("stall_ms", self.stall_ms, 1, 3_600_000)
        if self.depth & self.depth - 1:
            raise ValueError(f"depth must be a power of two, not {self.depth}")


@in_ram
class NvmeState(DriverState):
    """`due_ns`: when the next request is to be posted, in time that the vCPU ran."""

    due_ns: int
    span: int
    reads: int
    writes: int


class Request(NamedTuple):
    """What a driver asks for."""

    write: bool
    lba: int
    blocks: int


def request_of(number: int, span: int, max_blocks: int) -> Request:
    """Return request `number`: as many reads as writes, within the first `span` blocks."""
    random = mix(number)
    blocks = (random >> 1 & 0xFFFF) % min(max_blocks, span) + 1
    return Request(bool(random & 1), (random >> 17) % (span - blocks + 1), blocks)


class NvmeDriver(Driver[NvmeState]):
    """`generations` is the driver's view of the namespace; each request keeps those that its data must have."""

    COUNTERS: tuple[str, ...] = (*Driver.COUNTERS, "reads", "writes")
    COMPLETION = "status"
    MAGIC = nvme.MAGIC

    def __init__(self, name: str, area: Area, knobs: NvmeKnobs, device: GuestDevice, iova_top: int) -> None:
        super().__init__(name, area, NvmeState, device, iova_top)
        self._knobs = knobs
        buffers = 2 * knobs.depth
        self.lay_out(area, (nvme.ENTRY, knobs.depth), (buffers, knobs.max_blocks * nvme.BLOCK_SIZE), knobs.stall_ms)
        self._generations = area.array(knobs.span, "<u4")
        self._requested = area.array((buffers, knobs.max_blocks), "<u4")

    def begin(self, moment: Moment) -> None:
        """Begin with an untouched namespace."""
        super().begin(moment)
        self._generations.data[:] = 0
        self._generations.mark()
        self._requested.data[:] = 0
        self._requested.mark()
        self.state.due_ns = moment.run_ns

    def prepare(self) -> None:
        """Stay inside the namespace."""
        self.state.span = min(self._knobs.span, self.device.read(nvme.CAPACITY, 8))
        if not self.state.span:
            raise ValueError(f"{self.device.name} has no blocks")

    def post(self, moment: Moment) -> int:
        """Post the next batch when it is due by the rate; a guest that was kept from it makes up for little of it."""
        state = self.state
        if self.outstanding:
            return moment.now_ns + self._stall_ns
        state.due_ns = max(state.due_ns, moment.run_ns - BACKLOG_NS)
        if moment.run_ns < state.due_ns:
            return moment.now_ns + state.due_ns - moment.run_ns
        batch = self.ring.entries
        for number in range(state.posted, state.posted + batch):
            self._post_one(number)
        self._requested.mark()
        state.due_ns += batch * 1_000_000_000 // self._knobs.iops
        self.publish(state.posted + batch)
        return moment.now_ns + self._stall_ns

    def _post_one(self, number: int) -> None:
        buffer = number % self.buffers.count
        if number >= self.buffers.count:
            self._check(number - self.buffers.count, "kept")
        self.maybe_remap(number, self._knobs.remap)
        request = self._request(number)
        generations = self._generations.data[request.lba : request.lba + request.blocks]
        if request.write:
            generations[:] = (generations + 1) % GENERATIONS
            self._generations.mark(request.lba, request.blocks)
        self._requested.data[buffer, : request.blocks] = generations
        if request.write:
            self.buffers.write(buffer, self._content(number))
        opcode = nvme.OP_WRITE if request.write else nvme.OP_READ
        iova = int(self.buffers.iovas[buffer])
        entry = (opcode, request.blocks, request.lba, iova, number & 0xFFFF_FFFF, 0)
        self.ring.table[number % self.ring.entries] = entry

    def finish(self, first: int, count: int) -> None:
        """Check what requests led to."""
        entries = self.ring.table[self.ring.slots(first, count)].tolist()
        for number, (*_, command, status) in enumerate(entries, first):
            request = self._request(number)
            if request.write:
                self.state.writes += 1
            else:
                self.state.reads += 1
            if command != number & 0xFFFF_FFFF:
                self.error(f"entry {number} is of command {command}")
            elif status != nvme.STATUS_OK:
                self.error(f"request {number} ended with status {status}: {request}")
            elif not request.write:
                self._check(number, "read")

    def _request(self, number: int) -> Request:
        return request_of(number, self.state.span, self._knobs.max_blocks)

    def _content(self, number: int) -> bytes:
        """Return what the buffer of a request must hold; until its buffer is used again."""
        request = self._request(number)
        generations = self._requested.data[number % self.buffers.count, : request.blocks].tolist()
        seeds = (nvme.content_seed(lba, generation) for lba, generation in enumerate(generations, request.lba))
        return b"".join(pattern.block(seed, nvme.BLOCK_SIZE) for seed in seeds)

    def _check(self, number: int, what: str) -> None:
        request = self._request(number)
        data = self.buffers.read(number % self.buffers.count, request.blocks * nvme.BLOCK_SIZE)
        expected = self._content(number)
        if data == expected:
            return
        page = self.memory.page_of(self.buffers.gpa(number % self.buffers.count))
        for block in range(request.blocks):
            start = block * nvme.BLOCK_SIZE
            got, wanted = data[start : start + nvme.BLOCK_SIZE], expected[start : start + nvme.BLOCK_SIZE]
            if got != wanted:
                seed = pattern.seed_of(got)
                self.error(
                    f"block {request.lba + block}, {what} in page {page + block} of RAM, is wrong: it looks like block "
                    f"{seed >> 24} at {nvme.generation_of(seed)}, not at {nvme.generation_of(pattern.seed_of(wanted))}"
                )
