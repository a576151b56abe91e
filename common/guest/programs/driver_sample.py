"""Driver of the sample device of libvfio-user, ours or theirs: a timer, a memory, DMA to two pages, INTx.

Each cycle fills the memory in BAR 1, sets the timer in BAR 0, waits for the interrupt, and finds what the device has
written to the two pages that are mapped for it, and in BAR 1 what was put there. The interrupt may come before the DMA.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from common.datasheets import sample
from common.guest.device import GuestDevice
from common.guest.programs.driver import check_knob, mix
from common.guest.programs.iova import IovaAllocator
from common.guest.programs.program import Area, Moment, Program, in_ram
from common.memory.layout import PAGE_SIZE

__all__ = ["SampleDriver", "SampleKnobs"]

NS = 1_000_000_000
# What a busy host may take: how long is not what is checked.
DMA_NS = 5 * NS  # after the interrupt
LATE_NS = 10 * NS  # after the time that was set
POLL_NS = 5_000_000
PAGES = 2
WORD = 1 << 64


@dataclass(frozen=True, slots=True)
class SampleKnobs:
    """`delay_s`: seconds from setting the timer until it fires; less than 2 may be no time at all to whole seconds."""

    device: str
    delay_s: int = 2

    def __post_init__(self) -> None:
        check_knob("delay_s", self.delay_s, 1, 3600)


@in_ram
class SampleState(ctypes.LittleEndianStructure):
    """Times are those that the vCPU ran; `timer` is what the register was set to, in seconds since 1970."""

    mapped: int
    armed: int
    timer: int
    cycles: int
    interrupts: int
    spurious: int
    stalls: int
    waiting_ns: int
    interrupted_ns: int  # 0: not yet
    run: int


class SampleDriver(Program[SampleState]):
    """Cycle after cycle; what is not as it must be is an error."""

    COUNTERS = ("cycles", "interrupts", "spurious", "stalls")

    def __init__(self, name: str, area: Area, knobs: SampleKnobs, device: GuestDevice, iova_top: int) -> None:
        super().__init__(name, area, SampleState)
        if not device.viommu:
            raise ValueError("there is no vIOMMU to map in, and its device writes to whatever is mapped first")
        self.device_name = device.name
        self._device = device
        self._knobs = knobs
        self._iovas = IovaAllocator(area, iova_top)
        self._pages = area.array((PAGES, PAGE_SIZE), np.uint8)

    def begin(self, moment: Moment) -> None:
        """Begin with nothing mapped."""
        self._iovas.begin()
        self.state.run = moment.run

    def step(self, moment: Moment) -> int:
        """Set up, arm, or look whether what was armed has come."""
        state = self.state
        if not state.mapped:
            self._set_up()
        if moment.run != state.run:
            state.run = moment.run
            if state.cycles:
                self._check_memory()
        if not state.armed:
            self._arm(moment)
            return moment.now_ns + POLL_NS
        if moment.interrupted:
            state.interrupts += 1
            state.spurious += bool(state.interrupted_ns)
            state.interrupted_ns = state.interrupted_ns or moment.run_ns
            # Ours asserts its pin until the register is accessed: unmasked before that, it would interrupt again.
            self._device.read(sample.TIMER, 8)
            self._device.unmask()
        if state.interrupted_ns:
            self._look_for_dma(moment)
        elif moment.run_ns - state.waiting_ns > self._knobs.delay_s * NS + LATE_NS:
            self.error(f"cycle {state.cycles}: no interrupt {LATE_NS // NS} s after the timer's time")
            state.stalls += 1
            state.armed = 0
        return moment.now_ns + POLL_NS

    def _set_up(self) -> None:
        self._device.enable()
        for page in range(PAGES):
            self._device.map(self._iovas.allocate(PAGE_SIZE), self._pages.gpa + page * PAGE_SIZE, PAGE_SIZE)
        self.state.mapped = 1

    def _arm(self, moment: Moment) -> None:
        state = self.state
        self._pages.data[:] = 0
        self._pages.mark()
        state.cycles += 1
        self._device.write_bar(sample.MEMORY_BAR, 0, _content(state.cycles))
        # The register is read as the time since what it was set to, which is how a guest learns the device's time.
        now = (self._device.read(sample.TIMER, 8) + state.timer) % WORD
        state.timer = now + self._knobs.delay_s
        self._device.write(sample.TIMER, state.timer, 8)
        state.armed = 1
        state.interrupted_ns = 0
        state.waiting_ns = moment.run_ns

    def _look_for_dma(self, moment: Moment) -> None:
        state = self.state
        whole = bool((self._pages.data == np.frombuffer(sample.DMA_CONTENT, np.uint8)).all())
        if not whole and moment.run_ns - state.interrupted_ns < DMA_NS:
            return
        if not whole:
            wrong = np.flatnonzero((self._pages.data != np.frombuffer(sample.DMA_CONTENT, np.uint8)).any(axis=1))
            self.error(f"cycle {state.cycles}: the device has not written to pages {wrong.tolist()} as it does")
        self._check_memory()
        state.armed = 0

    def _check_memory(self) -> None:
        if self._device.read_bar(sample.MEMORY_BAR, 0, sample.MEMORY_SIZE) != _content(self.state.cycles):
            self.error(f"cycle {self.state.cycles}: the device's memory is not what was put there")


def _content(cycle: int) -> bytes:
    words = np.uint64(mix(cycle)) + np.arange(sample.MEMORY_SIZE // 8, dtype=np.uint64)
    return words.astype("<u8").tobytes()
