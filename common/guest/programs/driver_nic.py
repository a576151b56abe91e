"""driver for a nic: every packet exactly once, in order, and still the same when its buffer is needed again.

With a `peer` it lets the nic write into the window at the start of the peer's BAR 2 (`peer_window`), where the peer's
driver looks for what came.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from common.datasheets import accelerator, nic, pattern, pci
from common.guest.device import GuestDevice
from common.guest.programs.driver import MAPS_PER_STEP, Driver, DriverState, check_knob
from common.guest.programs.program import Area, Moment, in_ram

__all__ = ["NicDriver", "NicKnobs", "peer_window"]

RING_ENTRIES = 128
POST_LIMIT = 64
MAX_PEER_WINDOW = 1 << 20
# A buffer's content: packet number `sequence`; length 0 is none.
PACKET = np.dtype([("sequence", "<u8"), ("length", "<u8")])


def peer_window(memory_size: int) -> int:
    """Return how many bytes at the start of an accelerator's memory belong to its peer."""
    return min(memory_size // 8, MAX_PEER_WINDOW)


@dataclass(frozen=True, slots=True)
class NicKnobs:
    """`remap`: packets from one new IOVA to the next, 0 for never; `buffers` of `buffer_size` bytes each.

    `reset_every`: packets after which the nic is reset, 0 for never; not with a peer, which keeps what it wrote.
    """

    device: str
    remap: int = 64
    peer: str | None = None
    buffers: int = 2 * RING_ENTRIES
    buffer_size: int = 2048
    stall_ms: int = 5000
    reset_every: int = 0

    def __post_init__(self) -> None:
        check_knob("remap", self.remap, 0, 1 << 32)
        check_knob("buffers", self.buffers, RING_ENTRIES, 4096)
        check_knob("buffer_size", self.buffer_size, 64, 64 << 10)
        check_knob("stall_ms", self.stall_ms, 1, 3_600_000)
        check_knob("reset_every", self.reset_every, 0, 0 if self.peer else 1 << 32)


@in_ram
class NicState(DriverState):
    """Sequences are those that must come next."""

    expected: int
    bytes: int


class NicDriver(Driver[NicState]):
    """Posts every buffer that is free, after a second look at the packet that it holds."""

    COUNTERS: tuple[str, ...] = (*Driver.COUNTERS, "bytes")
    COMPLETION = "done"
    MAGIC = nic.MAGIC

    def __init__(
        self, name: str, area: Area, knobs: NicKnobs, device: GuestDevice, peer: GuestDevice | None, iova_top: int
    ) -> None:
        super().__init__(name, area, NicState, device, iova_top)
        self._knobs = knobs
        self._peer = peer
        self.lay_out(area, (nic.ENTRY, RING_ENTRIES), (knobs.buffers, knobs.buffer_size), knobs.stall_ms)
        self._packets = area.array(knobs.buffers, PACKET)

    def begin(self, moment: Moment) -> None:
        """Begin with no packet."""
        super().begin(moment)
        self._packets.data[:] = 0
        self._packets.mark()

    def prepare(self) -> None:
        """Point the nic to its peer, and learn which packet comes first."""
        if self._peer is not None:
            self._peer.enable()
            size = peer_window(self._peer.read(accelerator.MEMORY_SIZE, 8))
            iova = self.map_for_good(self._peer.bars[pci.MEMORY_BAR], size)
            self.device.write(nic.PEER_BASE, iova, 8)
            self.device.write(nic.PEER_SIZE, size)
        self.state.expected = self.device.read(nic.SEQUENCE, 8)

    def control(self) -> int:
        """Enable the nic, and its writes to the peer if it has one."""
        return pci.CONTROL_ENABLE | (nic.CONTROL_PEER if self._peer is not None else 0)

    def post(self, moment: Moment) -> int:
        """Post all buffers that fit into the ring, a limited number at a time."""
        if self._knobs.reset_every and self.state.finished >= self._knobs.reset_every:
            self.reset()
            return moment.now_ns
        first = self.state.posted
        count = min(self.ring.entries - self.outstanding, POST_LIMIT)
        if not count:
            return moment.now_ns + self._stall_ns
        packets = self._packets.data
        buffers = np.arange(first, first + count) % self.buffers.count
        remaps = 0
        for index, (sequence, length) in enumerate(packets[buffers].tolist()):
            if remaps == MAPS_PER_STEP:
                buffers = buffers[:index]
                break
            if length:
                self._check(int(buffers[index]), sequence, length, "kept")
            remaps += self.maybe_remap(first + index, self._knobs.remap)
        slots = self.ring.slots(first, buffers.size)
        packets["length"][buffers] = 0
        self._packets.mark()
        table = self.ring.table
        table["iova"][slots] = self.buffers.iovas[buffers]
        table["size"][slots] = self._knobs.buffer_size
        table["done"][slots] = 0
        self.publish(first + int(buffers.size))
        return moment.now_ns if self.outstanding < self.ring.entries else moment.now_ns + self._stall_ns

    def finish(self, first: int, count: int) -> None:
        """Take packets: each must have the next sequence number and the right content."""
        packets = self._packets.data
        entries = self.ring.table[self.ring.slots(first, count)].tolist()
        iovas = self.buffers.iovas.tolist()
        for request, (iova, _, done, sequence, length, checksum) in enumerate(entries, first):
            buffer = request % self.buffers.count
            if iova != iovas[buffer]:
                self.error(f"entry {request} points to {iova:#x}, not to its buffer")
            elif done != 1:
                self.error(f"entry {request} was refused (done = {done}) at {iova:#x}")
            elif not 16 <= length <= self.buffers.size:
                self.error(f"packet {sequence} has {length} bytes, in a buffer of {self.buffers.size}")
            else:
                self._take(buffer, sequence, length, checksum)
                packets[buffer] = (sequence, length)
        self._packets.mark()

    def _take(self, buffer: int, sequence: int, length: int, checksum: int) -> None:
        state = self.state
        if sequence > state.expected:
            self.error(f"lost: {sequence - state.expected} packets before packet {sequence}")
        elif sequence < state.expected:
            self.error(f"doubled: packet {sequence} came after packet {state.expected - 1}")
        state.expected = sequence + 1
        state.bytes += length
        if zlib.crc32(self._check(buffer, sequence, length, "received")) != checksum:
            self.error(f"packet {sequence} does not have the checksum of its entry")

    def _check(self, buffer: int, sequence: int, length: int, what: str) -> bytes:
        data = self.buffers.read(buffer, length)
        if data != pattern.block(sequence, length):
            page = self.memory.page_of(self.buffers.gpa(buffer))
            self.error(
                f"packet {sequence}, {what} in page {page} of RAM, is wrong: it looks like {pattern.seed_of(data)}"
            )
        return data

    def audit(self) -> None:
        """See that the nic has not gone back behind what came from it."""
        sequence = self.device.read(nic.SEQUENCE, 8)
        if sequence < self.state.expected:
            self.error(f"SEQUENCE is {sequence}, but packet {self.state.expected - 1} has come")
