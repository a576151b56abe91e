"""clock: ticks, and so measures from inside how long the guest stood still.

The gap that counts is the one that spans a pause: from the last tick of one run to the first of the next.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from common.guest.programs.program import Area, Moment, Program, in_ram

__all__ = ["Clock", "ClockKnobs"]

HISTORY = 1024


@dataclass(frozen=True, slots=True)
class ClockKnobs:
    """`period_us`: microseconds from tick to tick."""

    period_us: int = 1000

    def __post_init__(self) -> None:
        if not 100 <= self.period_us <= 1_000_000:
            raise ValueError(f"period_us must be 100 to 1000000, not {self.period_us}")


@in_ram
class ClockState(ctypes.LittleEndianStructure):
    """Times are guest time."""

    ticks: int
    last_ns: int
    due_ns: int
    run: int
    gap_ns: int
    gap_run: int
    longest_us: int  # between two ticks of one run


class Clock(Program[ClockState]):
    """Each tick goes into a ring of the last 1024; time must not go back, nor the ring to an older content."""

    COUNTERS = ("ticks", "longest_us")

    def __init__(self, name: str, area: Area, knobs: ClockKnobs) -> None:
        super().__init__(name, area, ClockState)
        self._period_ns = knobs.period_us * 1000
        self._history = area.array(HISTORY, "<u8")

    def begin(self, moment: Moment) -> None:
        """Begin with the present and no tick."""
        self._history.data[:] = 0
        self._history.mark()
        self.state.last_ns = moment.now_ns
        self.state.due_ns = moment.now_ns + self._period_ns
        self.state.run = moment.run

    @property
    def gap(self) -> tuple[int, int] | None:
        """The last gap between two runs in microseconds, and the number of the run that it led to."""
        if not self._started or not self.state.gap_run:
            return None
        return self.state.gap_ns // 1000, self.state.gap_run

    def step(self, moment: Moment) -> int:
        """Tick, or wait until it is time."""
        state = self.state
        crossed = state.run != moment.run
        if moment.now_ns < state.due_ns and not crossed:
            return state.due_ns
        if moment.now_ns < state.last_ns:
            self.error(f"time went back by {state.last_ns - moment.now_ns} ns in run {moment.run}")
        since = max(0, moment.now_ns - state.last_ns)
        if crossed:
            self._check_history()
            state.run, state.gap_run, state.gap_ns = moment.run, moment.run, since
        else:
            state.longest_us = max(state.longest_us, since // 1000)
        self._history.data[state.ticks % HISTORY] = moment.now_ns
        self._history.mark(state.ticks % HISTORY, 1)
        state.ticks += 1
        state.last_ns = moment.now_ns
        # A tick that is late does not delay those after it, but ticks that were missed are not made up for.
        state.due_ns = max(state.due_ns + self._period_ns, moment.now_ns + self._period_ns // 2)
        return state.due_ns

    def _check_history(self) -> None:
        """Check the whole ring: ticks up to the last one, each later than the one before."""
        state = self.state
        kept = min(state.ticks, HISTORY)
        if not kept:
            return
        order = np.arange(state.ticks - kept, state.ticks) % HISTORY
        times = self._history.data[order].astype(np.int64)
        if times[-1] != state.last_ns or times[0] == 0 or (np.diff(times) <= 0).any():
            self.error(f"the ring of ticks is not what it was before run {state.run + 1}")
