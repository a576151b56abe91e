"""The vCPU: run, pause, state out, state in, dirty log.

That is all the rest of the project knows of a vCPU. This one runs guest programs cooperatively, a step at a time; what
is asked of it is done between two steps. Its own state is small: the clock, what runs are counted by, interrupts that
were taken but not handled, and the programs' step registers. Everything else is in guest RAM.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from common.guest.boot import Boot
from common.guest.device import GuestDevice
from common.guest.memory import GuestMemory
from common.guest.programs.clock import Clock
from common.guest.programs.program import NEVER, Moment, Program
from common.guest.programs.registry import create_programs
from common.guest.throttle import awake_ns, sleep_left_ns
from common.ipc.channel import Client

__all__ = ["Vcpu"]


class Vcpu:
    """Created paused. Errors are `OSError` (EBUSY, EINVAL) and `ValueError`, with a sentence.

    Guest time is `monotonic` (ns) plus an offset; for a fresh guest it begins with 0.
    """

    def __init__(self, memory: GuestMemory, traps: Client, monotonic: Callable[[], int] = time.monotonic_ns) -> None:
        self.memory = memory
        self.running = False
        self.interrupts: dict[int, str] = {}  # eventfd → device
        self._traps = traps
        self._monotonic = monotonic
        self._fresh: bool | None = None
        self._programs: list[Program[Any]] = []
        self._next_ns: list[int] = []
        self._pending: set[str] = set()
        self._offset_ns = 0
        self._runs = 0
        self._percent = 0
        self._run_ns = 0  # time run before `_since_ns`
        self._since_ns = 0  # guest time of the last run or change of throttle

    def attach(self, boot: Boot, fds: Sequence[int]) -> None:
        """Take over descriptors, and create the programs without looking at RAM, which may not have arrived yet."""
        if self._fresh is not None:
            raise OSError(errno.EBUSY, "the vCPU is attached already")
        devices = {}
        for info in boot.devices:
            devices[info.name] = GuestDevice(
                info.name,
                info.kind,
                info.container,
                info.viommu,
                info.bars,
                None if info.doorbell is None else fds[info.doorbell],
                tuple(fds[vector] for vector in info.vectors),
                self._traps,
            )
        self._programs = create_programs(boot, self.memory, devices)
        self.interrupts = {fd: device.name for device in devices.values() for fd in device.interrupts}
        for fd in self.interrupts:
            # The machine reads them too, to drain them: what was readable a moment ago may not be.
            os.set_blocking(fd, False)
        self._next_ns = [NEVER] * len(self._programs)
        self._fresh = boot.fresh
        if boot.fresh:
            self._offset_ns = -self._monotonic()

    # The clock.

    def _now_ns(self) -> int:
        return self._monotonic() + self._offset_ns

    def _run_time_ns(self, now_ns: int) -> int:
        return self._run_ns + awake_ns(max(0, now_ns - self._since_ns), self._percent)

    def throttle(self, percent: int) -> None:
        """Let it run only (100 - percent) % of the time, percent 0 to 99 (QEMU: cpu_throttle_set)."""
        if type(percent) is not int:
            raise TypeError(f"a vCPU is throttled by a number, not by {percent!r:.40}")
        sleep_left_ns(0, percent)
        if self.running:
            now = self._now_ns()
            self._run_ns, self._since_ns = self._run_time_ns(now), now
        self._percent = percent

    # Run and pause.

    def run(self) -> None:
        """Continue; nothing happens if it runs. Every program takes a step soon, whatever it waited for."""
        if self._fresh is None:
            raise OSError(errno.EINVAL, "the vCPU is not attached to a machine yet")
        if self.running:
            return
        self._runs += 1
        self._since_ns = self._now_ns()
        moment = Moment(self._since_ns, self._run_ns, self._runs)
        for program in self._programs:
            program.start(moment, fresh=self._fresh)
        self._next_ns = [self._since_ns] * len(self._programs)
        self.running = True

    def pause(self) -> None:
        """Stop; between steps, so no trap is outstanding. Nothing happens if it does not run."""
        if self.running:
            self._run_ns = self._run_time_ns(self._now_ns())
            self.running = False

    def wait_ns(self) -> int:
        """Return for how long there is nothing to do."""
        now = self._now_ns()
        asleep = sleep_left_ns(max(0, now - self._since_ns), self._percent)
        return asleep or max(0, min(self._next_ns, default=NEVER) - now)

    def step(self) -> None:
        """Let the program that has been due for longest take a step, if one is due."""
        now = self._now_ns()
        if not self._programs or sleep_left_ns(max(0, now - self._since_ns), self._percent):
            return
        index = self._next_ns.index(min(self._next_ns))
        if self._next_ns[index] > now:
            return
        program = self._programs[index]
        interrupted = program.device_name in self._pending
        if program.device_name is not None:
            self._pending.discard(program.device_name)
        moment = Moment(now, self._run_time_ns(now), self._runs, interrupted)
        self._next_ns[index] = program.advance(moment)

    def interrupt(self, fd: int) -> None:
        """Take an interrupt from an eventfd; it is handled by the driver's next step, which is due now."""
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        device = self.interrupts[fd]
        self._pending.add(device)
        now = self._now_ns()
        for index, program in enumerate(self._programs):
            if program.device_name == device:
                self._next_ns[index] = min(self._next_ns[index], now)

    # State.

    def state_out(self) -> dict[str, Any]:
        """Return the state of a paused vCPU, as JSON can have it."""
        self._require_paused()
        return {
            "clock_offset_ns": self._offset_ns,
            "runs": self._runs,
            "run_ns": self._run_ns,
            "pending": sorted(self._pending),
            "steps": {program.name: program.steps for program in self._programs if program.steps is not None},
        }

    def state_in(self, state: object) -> None:
        """Take over another vCPU's state; `TypeError` or `ValueError`, with nothing changed, if it is none."""
        self._require_paused()
        if not isinstance(state, dict) or set(state) != {"clock_offset_ns", "runs", "run_ns", "pending", "steps"}:
            raise ValueError("this is not the state of a vCPU")
        numbers = [state["clock_offset_ns"], state["runs"], state["run_ns"]]
        pending, steps = state["pending"], state["steps"]
        if not isinstance(pending, list) or not isinstance(steps, dict):
            raise TypeError("the vCPU's state has pending interrupts or steps of another type")
        if any(type(number) is not int for number in (*numbers, *steps.values())) or min(numbers[1:]) < 0:
            raise ValueError("the vCPU's state has something that is not a number where one must be")
        if any(number.bit_length() > 63 for number in (*numbers, *steps.values())):
            raise ValueError("the vCPU's state has a number of more than 64 bits")
        programs = {program.name: program for program in self._programs}
        if any(not isinstance(name, str) for name in pending):
            raise TypeError("the vCPU's state has a pending interrupt that is no name")
        if unknown := (set(steps) - set(programs)) | (set(pending) - set(self.interrupts.values())):
            raise ValueError(f"the vCPU's state is of another machine: it has {', '.join(sorted(map(str, unknown)))}")
        self._offset_ns, self._runs, self._run_ns = numbers
        self._pending = set(pending)
        for name, program in programs.items():
            program.steps = steps.get(name)

    def _require_paused(self) -> None:
        if self._fresh is None:
            raise OSError(errno.EINVAL, "the vCPU is not attached to a machine yet")
        if self.running:
            raise OSError(errno.EBUSY, "the vCPU runs; pause it first")

    def report(self) -> dict[str, Any]:
        """Return what the programs say of themselves, and the last gap that the clock saw across a pause."""
        gaps = [program.gap for program in self._programs if isinstance(program, Clock)]
        gap_us, gap_run = next((gap for gap in gaps if gap is not None), (None, 0))
        programs = [program.report() for program in self._programs]
        return {"programs": programs, "gap_us": gap_us, "gap_run": gap_run}
