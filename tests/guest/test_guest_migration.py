"""A guest that is moved goes on; a guest that lost something on the way says so."""

from __future__ import annotations

from typing import Any

import pytest
from fake_machine import FakeMachine

KINDS = {"nic0": "nic", "nvme0": "nvme", "acc0": "accelerator"}


def whole_machine(**knobs: Any) -> FakeMachine:
    programs = [
        {"program": "driver", "name": "nic0", "device": "nic0", "peer": "acc0", **knobs},
        {"program": "driver", "name": "nvme0", "device": "nvme0"},
        {"program": "driver", "name": "acc0", "device": "acc0"},
        {"program": "clock", "name": "clock0"},
        {
            "program": "writer",
            "name": "writer0",
            "region_gpa": 32 << 20,
            "region_size": 2 << 20,
            "pattern": "random",
        },
        {"program": "idle", "name": "idle0"},
    ]
    return FakeMachine(programs, KINDS)


def test_a_guest_goes_on_where_it_stopped_again_and_again() -> None:
    machine = whole_machine()
    machine.run(300)
    for _ in range(3):
        before = machine.vcpu.report()
        machine.migrate(downtime_ms=70)
        machine.pass_time(200)
        after = machine.vcpu.report()
        assert machine.errors() == []
        assert after["gap_us"] == pytest.approx(70_000, abs=1500)
        for old, new in zip(before["programs"], after["programs"], strict=True):
            assert new["counters"]["steps"] > old["counters"]["steps"]
            assert all(new["counters"][name] >= value for name, value in old["counters"].items())


def test_a_guest_that_was_moved_while_its_drivers_were_set_up_goes_on() -> None:
    machine = FakeMachine([{"program": "driver", "name": "nic0", "device": "nic0", "buffers": 600}], KINDS)
    machine.vcpu.run()
    for _ in range(20):
        machine.now_ns += 100_000
        machine.vcpu.step()
    assert machine.report()["counters"]["posted"] == 0
    machine.migrate(precopy_ms=0)
    machine.pass_time(100)
    assert machine.errors() == []
    assert machine.report()["counters"]["finished"] > 100
    mapped = [iova for what, iova, _ in machine.history if what == "map"]
    assert len(mapped) >= 601 and len(machine.mappings) == 601


def test_pages_that_the_guest_wrote_and_that_were_lost_are_noticed() -> None:
    machine = whole_machine()
    machine.run(300)
    machine.migrate(lose_vcpu_log=True)
    machine.pass_time(300)
    noticed = {program["name"] for program in machine.vcpu.report()["programs"] if program["errors"]}
    # An idle guest did not write while it was moved.
    assert noticed == {"nic0", "nvme0", "acc0", "clock0", "writer0"}


@pytest.mark.parametrize("remap", [0, 1, 64])
def test_pages_that_devices_wrote_and_that_were_lost_are_noticed(remap: int) -> None:
    machine = whole_machine(remap=remap)
    machine.run(300)
    machine.migrate(lose_device_log=True, precopy_ms=60)
    machine.pass_time(400)
    noticed = {program["name"] for program in machine.vcpu.report()["programs"] if program["errors"]}
    assert noticed == {"nic0", "nvme0", "acc0"}


def test_without_the_register_an_old_but_consistent_program_is_not_noticed() -> None:
    # Why there is one: everything that the program looks at is of the same age.
    for keep_steps, expected in ((False, 0), (True, 1)):
        machine = FakeMachine([{"program": "idle", "name": "idle0"}])
        machine.run(1000)
        machine.migrate(lose_vcpu_log=True, precopy_ms=1000, keep_steps=keep_steps)
        machine.pass_time(600)
        assert len(machine.errors()) == expected


def test_one_old_page_of_a_device_buffer_is_enough() -> None:
    machine = FakeMachine([{"program": "driver", "name": "nic0", "device": "nic0"}], KINDS)
    machine.run(200)
    page = int(next(gpa for what, _, gpa in machine.history[50:] if what == "map")) // 4096
    old = machine.ram.pages[page].copy()
    machine.pass_time(100)
    assert (machine.ram.pages[page] != old).any()
    machine.vcpu.pause()
    machine.ram.pages[page] = old
    machine.run(100)
    assert [error for error in machine.errors() if f"page {page} of RAM" in error]
