from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest
from fake_machine import FakeMachine

from common.guest.boot import parse
from common.guest.vcpu import Vcpu
from common.memory import runs

CLOCK: dict[str, Any] = {"program": "clock", "name": "clock0"}


def writer(**knobs: Any) -> dict[str, Any]:
    return {"program": "writer", "name": "writer0", "region_gpa": 32 << 20, "region_size": 4 << 20, **knobs}


def pages_of(machine: FakeMachine) -> int:
    return int(machine.report("writer0")["counters"]["pages"])


def test_nothing_happens_before_run_and_after_pause() -> None:
    machine = FakeMachine([CLOCK])
    assert machine.report() == {"name": "clock0", "counters": {}, "errors": []}
    assert machine.ram.allocated_bytes == 0
    machine.run(10)
    ticks = machine.report()["counters"]["ticks"]
    assert ticks == 10
    machine.vcpu.pause()
    assert not machine.vcpu.running
    assert machine.report()["counters"]["ticks"] == ticks


def test_run_and_pause_may_be_repeated() -> None:
    machine = FakeMachine([CLOCK])
    machine.run(2)
    machine.vcpu.run()
    machine.vcpu.pause()
    machine.vcpu.pause()
    assert machine.vcpu.state_out()["runs"] == 1


def test_guest_time_of_a_fresh_guest_begins_with_zero() -> None:
    machine = FakeMachine([CLOCK])
    start = machine.now_ns
    machine.run(3)
    machine.vcpu.pause()
    assert machine.vcpu.state_out()["clock_offset_ns"] == -start


def test_state_goes_out_and_in_only_while_paused() -> None:
    machine = FakeMachine([CLOCK])
    machine.run(3)
    with pytest.raises(OSError) as out:
        machine.vcpu.state_out()
    with pytest.raises(OSError):
        machine.vcpu.state_in({})
    assert out.value.errno == errno.EBUSY
    machine.vcpu.pause()
    state = machine.vcpu.state_out()
    machine.vcpu.state_in(state)
    assert machine.vcpu.state_out() == state
    assert state["steps"] == {"clock0": machine.report()["counters"]["steps"]}


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {},
        {"clock_offset_ns": 0, "runs": 1, "run_ns": 0, "pending": [], "steps": {"other": 1}},
        {"clock_offset_ns": 0, "runs": 1, "run_ns": 0, "pending": ["nic0"], "steps": {}},
        {"clock_offset_ns": 0, "runs": -1, "run_ns": 0, "pending": [], "steps": {}},
        {"clock_offset_ns": 0, "runs": 1, "run_ns": 0, "pending": [], "steps": {"clock0": "1"}},
        {"clock_offset_ns": 0, "runs": 1, "run_ns": 0, "pending": {}, "steps": {}},
        {"clock_offset_ns": 0.5, "runs": 1, "run_ns": 0, "pending": [], "steps": {}},
    ],
)
def test_a_state_that_is_none_is_refused(wrong: object) -> None:
    machine = FakeMachine([CLOCK])
    before = machine.vcpu.state_out()
    with pytest.raises((TypeError, ValueError)):
        machine.vcpu.state_in(wrong)
    assert machine.vcpu.state_out() == before


def test_an_interrupt_that_was_taken_but_not_handled_travels() -> None:
    machine = FakeMachine([{"program": "driver", "name": "d", "device": "nvme0"}], {"nvme0": "nvme"})
    machine.run(10)
    os.eventfd_write(machine.devices["nvme0"].interrupt, 1)
    machine.vcpu.interrupt(machine.devices["nvme0"].interrupt)
    machine.vcpu.pause()
    state = machine.vcpu.state_out()
    assert state["pending"] == ["nvme0"]
    before = machine.report()["counters"]["interrupts"]
    machine.vcpu = machine._vcpu(fresh=False)
    machine.vcpu.state_in(state)
    machine.vcpu.run()
    for _ in range(3):
        machine.vcpu.step()
    assert machine.report()["counters"]["interrupts"] == before + 1


def test_an_interrupt_that_somebody_else_took_is_no_harm() -> None:
    machine = FakeMachine([{"program": "driver", "name": "d", "device": "nvme0"}], {"nvme0": "nvme"})
    machine.run(1)
    machine.vcpu.interrupt(machine.devices["nvme0"].interrupt)
    machine.vcpu.pause()
    assert machine.vcpu.state_out()["pending"] == []


def test_a_throttled_vcpu_dirties_less() -> None:
    machine = FakeMachine([writer(rate=20_000_000)])
    machine.run(1000)
    full = pages_of(machine)
    machine.vcpu.throttle(80)
    machine.pass_time(1000)
    throttled = pages_of(machine) - full
    assert throttled == pytest.approx(full / 5, abs=2 * 160)
    machine.vcpu.throttle(0)
    machine.pass_time(1000)
    assert pages_of(machine) - full - throttled == pytest.approx(full, abs=2 * 160)
    for wrong in (100, "50", True):
        with pytest.raises((TypeError, ValueError)):
            machine.vcpu.throttle(wrong)  # type: ignore[arg-type]  # that is the point


def test_a_pause_is_no_time_to_make_up_for() -> None:
    machine = FakeMachine([writer(rate=20_000_000)])
    machine.run(100)
    machine.vcpu.pause()
    before = pages_of(machine)
    machine.pass_time(5000, vcpu_runs=False)
    machine.run(100)
    assert pages_of(machine) == pytest.approx(2 * before, abs=2 * 160)


def test_a_busy_program_does_not_starve_another() -> None:
    machine = FakeMachine([writer(rate=100 * 10**9), CLOCK])
    machine.vcpu.run()
    for _ in range(200):
        machine.now_ns += 100_000
        machine.vcpu.step()
    assert machine.report("clock0")["counters"]["ticks"] >= 15


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [
        ([{"program": "nothing", "name": "x"}], "no program"),
        ([{"program": "idle", "name": "x", "rate": 3}], "no knob"),
        ([{"program": "clock", "name": "x", "period_us": 1}], "period_us"),
        ([{"program": "clock", "name": "x", "area_size": 4096}], "too small"),
        ([{"program": "clock", "name": "x", "area_gpa": 17}], "whole pages"),
        ([{"program": "clock", "name": "x", "area_gpa": 1 << 40}], "no RAM"),
        ([{"program": "driver", "name": "x", "device": "nic9"}], "not in this machine"),
        ([{"program": "driver", "name": "x", "device": "nvme0", "depth": 3}], "power of two"),
        ([{"program": "driver", "name": "x", "device": "nvme0", "peer": "nvme0"}], "no knob"),
        ([writer(pattern="circular")], "pattern"),
        ([writer(region_size=4096)], "region"),
        ([writer(region_gpa=64 << 20)], "no RAM"),
        ([writer(rate=-1)], "rate"),
    ],
)
def test_programs_that_cannot_be_are_refused(programs: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FakeMachine(programs, {"nvme0": "nvme"})


def test_a_second_attach_and_a_run_before_the_first_are_refused() -> None:
    machine = FakeMachine([CLOCK])
    boot, fds = machine.boot(fresh=True)
    with pytest.raises(OSError) as again:
        machine.vcpu.attach(parse(boot, len(fds)), fds)
    assert again.value.errno == errno.EBUSY
    with pytest.raises(OSError):
        Vcpu(machine.memory, machine).run()  # type: ignore[arg-type]  # it has `call`


def test_only_written_pages_of_ram_are_allocated() -> None:
    machine = FakeMachine([writer(region_size=16 << 20, rate=4_096_000)])
    machine.run(500)
    machine.vcpu.pause()
    machine.run(500)
    assert machine.ram.allocated_bytes <= (pages_of(machine) + 4) * 4096
    assert not machine.errors()


def test_all_that_a_guest_writes_is_in_its_log() -> None:
    kinds = {"nic0": "nic", "nvme0": "nvme", "acc0": "accelerator"}
    drivers = [{"program": "driver", "name": name, "device": name, "remap": 2} for name in kinds]
    machine = FakeMachine([*drivers, CLOCK, writer(pattern="random"), {"program": "idle", "name": "idle0"}], kinds)
    machine.run(100)
    for device in machine.devices.values():
        device.dirty.clear()
    machine.memory.start_log()
    before = machine.ram.pages.copy()
    machine.pass_time(300)
    changed = np.flatnonzero((machine.ram.pages != before).any(axis=1))
    log = runs.expand(machine.memory.take_log().runs())
    by_devices = {page for device in machine.devices.values() for page in device.dirty}
    assert set(changed.tolist()) <= set(log.tolist()) | by_devices
    # And only what it wrote: a log of everything would be right as well.
    assert log.size < 3 * changed.size
