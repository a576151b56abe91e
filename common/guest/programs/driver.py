"""What all drivers have in common: set-up, interrupts, bounded waiting, remapping, a look at the device's registers.

A driver takes finished entries only when its device has raised an interrupt, as a real one does. It waits for a
bounded time, measured in time that the vCPU ran; then it counts an error, `stalled`, says which signal was lost, and
helps itself, so that the guest goes on. Interrupts without a cause are accepted, and counted.
"""

from __future__ import annotations

import ctypes
from typing import Generic, TypeVar

import numpy as np

from common.datasheets import pci
from common.guest.device import GuestDevice
from common.guest.programs.iova import IovaAllocator
from common.guest.programs.program import Area, Moment, Program, in_ram
from common.guest.programs.ring import Buffers, Ring

__all__ = ["MAPS_PER_STEP", "Driver", "DriverState", "check_knob", "mix"]

AUDIT_NS = 500_000_000
MAPS_PER_STEP = 8
FINISH_LIMIT = 64

_State = TypeVar("_State", bound="DriverState")


def mix(number: int) -> int:
    """Return 64 bits that look random and follow from `number` (splitmix64)."""
    z = (number + 1) * 0x9E37_79B9_7F4A_7C15 & 0xFFFF_FFFF_FFFF_FFFF
    z = (z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9 & 0xFFFF_FFFF_FFFF_FFFF
    z = (z ^ z >> 27) * 0x94D0_49BB_1331_11EB & 0xFFFF_FFFF_FFFF_FFFF
    return z ^ z >> 31


def check_knob(name: str, value: int, low: int, high: int) -> None:
    """Raise `ValueError` unless `value` is from `low` to `high`."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high}, not {value}")


@in_ram
class DriverState(ctypes.LittleEndianStructure):
    """Entries are counted from the first one ever; times are those that the vCPU ran."""

    mapped: int  # buffers so far
    running: int  # 1 when set-up is done
    ring_iova: int
    posted: int
    finished: int
    polling: int  # 1: there may be finished entries that an interrupt told of
    waiting_ns: int  # since when nothing has been finished
    audit_ns: int
    run: int  # of the last audit
    faults: int  # register, at the last audit
    interrupts: int
    spurious: int
    stalls: int
    remaps: int
    resets: int


class Driver(Program[_State], Generic[_State]):
    """Base of drivers. They add what an entry is, and what its completion must look like."""

    COUNTERS: tuple[str, ...] = ("posted", "finished", "interrupts", "spurious", "stalls", "remaps", "resets")
    COMPLETION: str  # the field of a ring entry that the device makes nonzero
    MAGIC: int

    def __init__(self, name: str, area: Area, state: type[_State], device: GuestDevice, iova_top: int) -> None:
        super().__init__(name, area, state)
        self.device = device
        self.device_name = device.name
        self.iovas = IovaAllocator(area, iova_top)

    def lay_out(self, area: Area, ring: tuple[np.dtype[np.void], int], buffers: tuple[int, int], stall_ms: int) -> None:
        """Take memory for the ring (kind and number of entries) and the buffers (number and size)."""
        self.ring = Ring(area, *ring)
        self.buffers = Buffers(area, self.device, self.iovas, *buffers)
        self._stall_ns = stall_ms * 1_000_000

    def begin(self, moment: Moment) -> None:
        """Begin with nothing mapped."""
        self.iovas.begin()
        self.buffers.begin()
        self.ring.clear()
        self.state.run = moment.run

    # What kinds of drivers differ in.

    def prepare(self) -> None:
        """Program the registers that only this kind of device has, before it is enabled."""

    def control(self) -> int:
        """Return the value of CONTROL that makes the device work."""
        return pci.CONTROL_ENABLE

    def finish(self, first: int, count: int) -> None:
        """Check `count` entries that are finished, from number `first`."""
        raise NotImplementedError

    def post(self, moment: Moment) -> int:
        """Post what is due and return when to come again."""
        raise NotImplementedError

    def audit(self) -> None:
        """Compare what only this kind of device has with what was seen before."""

    def resumed(self) -> None:
        """Do what is to be done once after each pause."""

    # The common course of things.

    def step(self, moment: Moment) -> int:
        """Handle what is finished, if there was an interrupt; else see to it that waiting ends; post more."""
        state = self.state
        if not state.running:
            return self._set_up(moment)
        if not 0 <= self.outstanding <= self.ring.entries:
            raise ValueError(f"{state.posted} posted and {state.finished} finished, in a ring of {self.ring.entries}")
        if moment.run != state.run or moment.run_ns - state.audit_ns >= AUDIT_NS:
            self._audit(moment)
        if moment.interrupted or state.polling:
            self._take_finished(moment)
        elif self.outstanding and moment.run_ns - state.waiting_ns >= self._stall_ns:
            self._stalled(moment)
        if not self.outstanding:
            state.waiting_ns = moment.run_ns
        again = self.post(moment)
        if state.polling:
            return moment.now_ns
        return min(again, moment.now_ns + AUDIT_NS)

    @property
    def outstanding(self) -> int:
        """Entries that are posted and not finished."""
        return self.state.posted - self.state.finished

    def publish(self, posted: int) -> None:
        """Hand all entries before number `posted` to the device."""
        self.state.posted = posted
        self.ring.publish(posted)
        self.device.ring_doorbell()

    def maybe_remap(self, request: int, period: int) -> bool:
        """Give the buffer of a request another IOVA, every `period` requests, in each lap other buffers; tell if so."""
        lap, buffer = divmod(request, self.buffers.count)
        if not period or not self.device.viommu or (request + lap) % period:
            return False
        self.buffers.remap(buffer, reuse=self.state.remaps % 2 == 1)
        self.state.remaps += 1
        return True

    def _set_up(self, moment: Moment) -> int:
        state = self.state
        if not state.mapped:
            self.device.enable()
            magic = self.device.read(pci.ID)
            if magic != self.MAGIC:
                raise ValueError(f"{self.device.name} is another device: its ID is {magic:#x}, not {self.MAGIC:#x}")
            state.ring_iova = self.map_for_good(self.ring.gpa, self.ring.size)
            self.prepare()
        for _ in range(min(MAPS_PER_STEP, self.buffers.count - state.mapped)):
            self.buffers.map(state.mapped)
            state.mapped += 1
        if state.mapped < self.buffers.count:
            return moment.now_ns
        self.device.write(pci.RING_BASE, state.ring_iova, 8)
        self.device.write(pci.RING_ENTRIES, self.ring.entries)
        self.device.write(pci.CONTROL, self.control())
        state.faults = self.device.read(pci.FAULTS)
        state.audit_ns = state.waiting_ns = moment.run_ns
        state.running = 1
        return moment.now_ns

    def reset(self) -> None:
        """Reset the device, lose what it was told to do, and set it up again with the buffers that it had."""
        state = self.state
        self.device.reset()
        self.device.enable()
        self.ring.clear()
        state.posted = state.finished = state.polling = state.running = 0
        state.resets += 1
        self.prepare()

    def map_for_good(self, gpa: int, size: int) -> int:
        """Map whole pages that stay mapped; return their IOVA."""
        if not self.device.viommu:
            return gpa
        iova = self.iovas.allocate(size)
        self.device.map(iova, gpa, size)
        return iova

    def _take_finished(self, moment: Moment) -> None:
        state = self.state
        state.interrupts += moment.interrupted
        count = self.ring.finished(state.finished, min(self.outstanding, FINISH_LIMIT), self.COMPLETION)
        if count:
            self.finish(state.finished, count)
            state.finished += count
            state.waiting_ns = moment.run_ns
        elif not state.polling:
            state.spurious += 1
        state.polling = int(count == FINISH_LIMIT)

    def _stalled(self, moment: Moment) -> None:
        state = self.state
        state.stalls += 1
        waited = f"for {(moment.run_ns - state.waiting_ns) // 1_000_000} ms"
        state.waiting_ns = moment.run_ns
        if count := self.ring.finished(state.finished, min(self.outstanding, FINISH_LIMIT), self.COMPLETION):
            self.error(f"stalled: no interrupt {waited}, but {count} entries or more are finished")
            state.polling = 1
        else:
            head = self.device.read(pci.HEAD)
            self.error(f"stalled: entry {state.finished} is not finished {waited}, HEAD {head}, posted {state.posted}")
            self.device.ring_doorbell()

    def _audit(self, moment: Moment) -> None:
        state = self.state
        head = self.device.read(pci.HEAD)
        if head - state.finished & 0xFFFF_FFFF > self.outstanding:
            self.error(f"HEAD is {head}, with {state.finished} entries finished and {state.posted} posted")
        faults = self.device.read(pci.FAULTS)
        if faults != state.faults:
            self.error(f"FAULTS went from {state.faults} to {faults}")
            state.faults = faults
        if self.ring.tail != state.posted & 0xFFFF_FFFF:
            self.error(f"the ring's tail is {self.ring.tail}, but {state.posted} entries were posted")
        self.audit()
        if moment.run != state.run:
            self.resumed()
        state.run = moment.run
        state.audit_ns = moment.run_ns
