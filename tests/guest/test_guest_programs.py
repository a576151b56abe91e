"""Programs that need no device: what they check, and that each check can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_machine import FIRST_AREA, FakeMachine

from common.guest.programs.pages import WORDS
from common.guest.programs.program import MESSAGES
from common.memory import runs
from common.memory.layout import PAGE_SIZE

REGION = 32 << 20
CLOCK: dict[str, Any] = {"program": "clock", "name": "clock0"}


def writer(**knobs: Any) -> dict[str, Any]:
    return {
        "program": "writer",
        "name": "writer0",
        "region_gpa": REGION,
        "region_size": 1 << 20,
        "rate": 40_000_000,
        **knobs,
    }


def test_an_idle_guest_wakes_up_now_and_then() -> None:
    machine = FakeMachine([{"program": "idle", "name": "idle0"}])
    machine.run(1000)
    assert machine.report()["counters"]["steps"] == 4


def test_a_clock_measures_the_gap_between_two_runs() -> None:
    machine = FakeMachine([CLOCK])
    machine.run(100)
    assert machine.vcpu.report()["gap_us"] is None
    machine.vcpu.pause()
    machine.pass_time(300, vcpu_runs=False)
    machine.run(50)
    report = machine.vcpu.report()
    assert report["gap_us"] == pytest.approx(300_000, abs=1500)
    assert report["gap_run"] == 2
    machine.run(10)
    assert machine.vcpu.report()["gap_run"] == 2
    assert machine.errors() == []


def test_a_clock_notices_that_time_went_back() -> None:
    machine = FakeMachine([CLOCK])
    machine.run(100)
    machine.vcpu.pause()
    machine.now_ns -= 50_000_000
    machine.run(5)
    assert [error for error in machine.errors() if "time went back" in error]


@pytest.mark.parametrize("ticks", [200, 3000])
def test_a_clock_notices_an_old_ring_of_ticks(ticks: int) -> None:
    machine = FakeMachine([CLOCK])
    machine.run(ticks)
    ring = machine.memory.view(FIRST_AREA + PAGE_SIZE, 2 * PAGE_SIZE)
    old = ring.copy()
    machine.run(100)
    machine.vcpu.pause()
    ring[:] = old
    machine.run(5)
    assert [error for error in machine.errors() if "ring of ticks" in error]


@pytest.mark.parametrize("pattern", ["sequential", "random", "hotspot"])
def test_a_writer_dirties_its_region_at_its_rate_and_is_content(pattern: str) -> None:
    machine = FakeMachine([writer(pattern=pattern)])
    machine.run(500)
    machine.vcpu.pause()
    machine.run(500)
    counters = machine.report()["counters"]
    assert counters["pages"] == pytest.approx(40_000_000 / PAGE_SIZE, rel=0.05)
    # Every page but those of the first lap is checked before it is written, and the whole region after the pause.
    assert counters["checked"] >= counters["pages"] - 256
    assert machine.errors() == []


def test_a_hotspot_gets_most_writes() -> None:
    machine = FakeMachine([writer(pattern="hotspot", region_size=10 << 20)])
    machine.run(100)
    machine.memory.start_log()
    machine.pass_time(300)
    pages = runs.expand(machine.memory.take_log().runs()) - REGION // PAGE_SIZE
    assert np.count_nonzero((pages >= 0) & (pages < 256)) == 256
    assert 0 < np.count_nonzero((pages >= 256) & (pages < 2560)) < 600


def test_a_writer_without_a_rate_writes_nothing() -> None:
    machine = FakeMachine([writer(rate=0)])
    machine.run(500)
    assert machine.report()["counters"]["pages"] == 0


@pytest.mark.parametrize("pattern", ["sequential", "random", "hotspot"])
@pytest.mark.parametrize("page", [0, 13, 255])
def test_a_writer_finds_a_page_that_came_over_old(pattern: str, page: int) -> None:
    machine = FakeMachine([writer(pattern=pattern)])
    machine.run(200)
    view = machine.memory.view(REGION + page * PAGE_SIZE, PAGE_SIZE)
    old = view.copy()
    machine.pass_time(400)
    machine.vcpu.pause()
    assert (view != old).any()
    view[:] = old
    machine.run(20)
    assert [error for error in machine.errors() if f"wrong page {REGION // PAGE_SIZE + page} " in error]


def test_a_writer_finds_a_page_soon_after_a_pause_though_it_would_write_it_late() -> None:
    machine = FakeMachine([writer(region_size=16 << 20, rate=20_000_000)])
    machine.run(400)
    machine.vcpu.pause()
    machine.memory.view(REGION + 1000 * PAGE_SIZE, PAGE_SIZE)[:] = 0
    machine.run(20)
    assert machine.errors() == [f"wrong page {REGION // PAGE_SIZE + 1000} of RAM: it is empty, not at sequence 1"]


def test_an_old_state_page_disagrees_with_the_register() -> None:
    machine = FakeMachine([CLOCK])
    machine.run(100)
    page = machine.memory.view(FIRST_AREA, PAGE_SIZE)
    old = page.copy()
    machine.pass_time(2)
    machine.vcpu.pause()
    page[:] = old
    machine.run(5)
    assert [error for error in machine.errors() if "its state in RAM is of step" in error]


def test_a_program_that_is_not_in_ram_is_not_begun_again_where_a_guest_ran_before() -> None:
    machine = FakeMachine([CLOCK])
    machine.run(10)
    machine.vcpu.pause()
    state = machine.vcpu.state_out()
    machine.memory.view(FIRST_AREA, PAGE_SIZE)[:] = 0
    machine.vcpu = machine._vcpu(fresh=False)
    machine.vcpu.state_in(state)
    machine.run(10)
    assert machine.errors() == ["the program is not in RAM where it was"]
    assert not machine.memory.view(FIRST_AREA, PAGE_SIZE).any()


def test_a_program_that_finds_itself_in_ram_goes_on() -> None:
    machine = FakeMachine([CLOCK, writer()])
    machine.run(100)
    machine.vcpu.pause()
    ticks = machine.report()["counters"]["ticks"]
    state = machine.vcpu.state_out()
    machine.vcpu = machine._vcpu(fresh=True)
    machine.vcpu.state_in(state)
    machine.run(100)
    assert machine.report()["counters"]["ticks"] == pytest.approx(2 * ticks, abs=2)
    assert machine.errors() == []


def test_errors_are_kept_in_ram_and_all_of_them_counted() -> None:
    machine = FakeMachine([writer()])
    machine.run(100)
    machine.vcpu.pause()
    machine.memory.view(REGION, 100 * WORDS * 8)[:] = 0
    machine.run(2)
    machine.migrate()
    report = machine.report()
    assert report["counters"]["errors"] >= 100
    assert len(report["errors"]) == MESSAGES + 1 and report["errors"][-1].startswith("and ")


def test_nonsense_in_ram_stops_the_program_and_nothing_else() -> None:
    machine = FakeMachine([{"program": "driver", "name": "d", "device": "nic0"}, CLOCK], {"nic0": "nic"})
    machine.run(50)
    state = machine.memory.view(FIRST_AREA + 2048, 1024).view("<u8")
    state[:] += np.uint64(1000) * np.arange(state.size, dtype=np.uint64)
    machine.pass_time(50)
    assert [error for error in machine.errors() if error.startswith("stopped by ")]
    assert machine.report("clock0")["counters"]["ticks"] == 100
