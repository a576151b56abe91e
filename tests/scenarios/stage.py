"""Where a scenario is played: two hosts, a machine that keeps journals, and guards that can be taken away.

A scenario is a bug that somebody has shipped, or nearly (each class says who). The machine is brought to the moment in
question by holding processes at points, twice: with the guard that keeps the page, when everything must be verified,
and with exactly this guard taken away, when the verifier must find the page and say who wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
import pytest
from rig import Hold, Rig, assert_completed, machine_toml, wait_for
from switchover.v1 import host_pb2

from common.guest.device import GuestDevice
from common.guest.memory import GuestMemory
from common.guest.programs.driver_nic import NicDriver, NicKnobs
from common.guest.programs.driver_nvme import NvmeDriver, NvmeKnobs
from common.guest.programs.iova import TOP
from common.guest.programs.program import Area
from common.machine import record
from common.machine.board import AREA_SIZE, FIRST_AREA
from common.machine.client import Changes, MachineClient, MappingChange
from common.memory.layout import PAGE_SIZE
from common.memory.ram import GuestRam
from console.report import report

ALL_AT_ONCE = 60_000.0
"""A downtime, in ms, that accepts whatever is left after round 0."""

RAM = 64 << 20
GUEST_AREAS = range(FIRST_AREA // PAGE_SIZE, (FIRST_AREA + 2 * AREA_SIZE) // PAGE_SIZE)
"""The RAM pages in which a guest of two programs keeps what it knows."""

CLOCK_ONLY = """
[[guest]]
program = "clock"
"""


def traced(**options: Any) -> str:
    """Return a machine file as `machine_toml`, of a machine that keeps journals; its guest has only a clock."""
    return "trace = true\n" + machine_toml(**{"guest": CLOCK_ONLY, **options})


def driven(kind: str, knobs: str = "", driver: str = "", **options: Any) -> str:
    """Return the file of such a machine with one device and its driver, both with knobs."""
    guest = f'{CLOCK_ONLY}[[guest]]\nprogram = "driver"\ndevice = "{kind}0"\n{driver}\n'
    return traced(devices=(kind,), drivers=False, extra={kind: knobs}, guest=guest, **options)


@lru_cache
def places(kind: str) -> tuple[range, range]:
    """Return the RAM pages of the buffers and of the ring of a driver that is the second program of a guest."""
    with GuestRam.create(RAM) as ram:
        area = Area(GuestMemory(ram), FIRST_AREA + AREA_SIZE, AREA_SIZE)
        device: Any = GuestDevice("it", kind, "default", True, {}, None, (), None)  # type: ignore[arg-type]
        driver: NicDriver | NvmeDriver = (
            NicDriver("driver0", area, NicKnobs("it"), device, None, TOP)
            if kind == "nic"
            else NvmeDriver("driver0", area, NvmeKnobs("it"), device, TOP)
        )
        addresses = (
            *(driver.buffers.gpa(0), driver.buffers.gpa(driver.buffers.count)),
            *(driver.ring.gpa, driver.ring.gpa + driver.ring.size),
        )
        del area, driver
    buffers, buffers_end, ring, ring_end = (address // PAGE_SIZE for address in addresses)
    return range(buffers, buffers_end), range(ring, ring_end)


class Stage:
    """Two hosts; the machine is at `here` and migrates to `there`."""

    def __init__(self, machine: str) -> None:
        self._rig = Rig()
        try:
            self.here = self._rig.start("host", machine)
            self.there = self._rig.start("host")
            self.wait_for_steps(1)
        except BaseException:
            self._rig.close()
            raise

    def close(self) -> None:
        """Strike the set."""
        for path in self._rig.hooks.iterdir():
            path.unlink()
        self._rig.close()

    @contextmanager
    def without(self, guard: str) -> Iterator[None]:
        """Take a guard away, in all processes."""
        path = self._rig.hooks / f"{guard}.off"
        path.touch()
        try:
            yield
        finally:
            path.unlink()

    def held(self, point: str) -> Hold:
        """Hold whoever comes to a point from now on."""
        return self._rig.held(point)

    def in_the_middle_of_a_write(self, device: str) -> Hold:
        """Hold a device that has begun to fill a buffer, while it is in its step."""
        # From where it looks at its ring: what comes next is the data of an entry, not the ring's own pages.
        with self.held("device.rung") as rung:
            rung()
            hold = self.held(f"{device}-dma-written")
        hold()
        return hold

    def begin(self, **options: Any) -> str:
        """Begin a migration; by default it switches over after round 0."""
        return self.here.begin(self.there.address, **{"max_downtime_ms": ALL_AT_ONCE, **options})

    def end(self, session: str) -> host_pb2.MigrationResult:
        """Return a migration's result; the machine is `here` again, and runs."""
        result = self.here.follow(session)
        wait_for(lambda: self._is_settled(), "it does not end")
        if self.there.look().HasField("machine"):
            if self.here.look().HasField("machine"):
                # Both copies are kept after a late mismatch; the operator decides for the one that was moved.
                self.here.stub.StopMachine(host_pb2.StopMachineRequest(), timeout=20)
            self.here, self.there = self.there, self.here
            self.here.stub.Resume(host_pb2.ResumeRequest(), timeout=20)
        return result

    def _is_settled(self) -> bool:
        try:
            return not (self.here.look().migrating or self.there.look().migrating)
        except grpc.RpcError:
            # A machine that is being ended does not answer.
            return False

    def machine(self) -> MachineClient:
        """Connect to the machine process, behind the daemon's back."""
        known = record.read(self.here.state_dir / "record.json")
        assert known is not None
        return MachineClient.connect(Path(known.directory))

    def remap(self, gone: MappingChange | None, back: MappingChange | None) -> None:
        """Change the machine's mappings."""
        machine = self.machine()
        machine.change_mappings(Changes((gone,) if gone else (), (back,) if back else ()))
        machine.close()

    def counter(self, program: str, name: str) -> int:
        """Return a counter of a guest's program; fail if a program has found something wrong."""
        return self.here.counters()[program][name]

    def wait_for_steps(self, steps: int) -> None:
        """Wait until every program of the guest has taken that many steps more."""
        before = self.here.counters()

        def taken() -> bool:
            now = self.here.counters()
            return all(now[name]["steps"] >= before[name]["steps"] + steps for name in before)

        wait_for(taken, "the guest stands still")

    def wait_for_more(self, program: str, name: str, more: int) -> None:
        """Wait until a counter has grown."""
        before = self.counter(program, name)
        wait_for(lambda: self.counter(program, name) >= before + more, f"{program} stands still at {before}")


@pytest.mark.usefixtures("stage")
class Scenario:
    """A scenario: `play` brings the machine to the moment and migrates it; it is told whether the guard is there."""

    GUARD: str
    MACHINE: str
    WRITER: str  # how the line begins that says who wrote a page

    def prepare(self, stage: Stage) -> None:
        """Do what comes before, with all guards in place."""

    def unguarded(self, stage: Stage) -> AbstractContextManager[None]:
        """Take the guard away for the whole play."""
        return stage.without(self.GUARD)

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        raise NotImplementedError

    def pages(self) -> Callable[[int], bool]:
        """Return what tells the pages that can be lost here."""
        raise NotImplementedError

    def test_the_verifier_finds_it(self, stage: Stage) -> None:
        self.prepare(stage)
        with self.unguarded(stage):
            result = self.play(stage, guarded=False)
        told = json.dumps(report(result), indent=1)
        assert (result.result, result.reason, result.verified) == ("failed", "DATA_LOSS", "false"), told
        self.check_mismatches(result, told)

    def check_mismatches(self, result: host_pb2.MigrationResult, told: str) -> None:
        assert result.mismatches, told
        possible = self.pages()
        wrong = [mismatch.page for mismatch in result.mismatches if not possible(mismatch.page)]
        assert not wrong, told
        for mismatch in result.mismatches:
            assert any(line.startswith(self.WRITER) for line in mismatch.could_have_written), told

    def test_the_guard_keeps_it(self, stage: Stage) -> None:
        self.prepare(stage)
        assert_completed(self.play(stage, guarded=True))
