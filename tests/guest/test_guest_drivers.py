"""Drivers: what they do, and that they notice what a device or a migration did wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_machine import FakeAccelerator, FakeMachine, FakeNic, FakeNvme

from common.datasheets import accelerator, pattern
from common.guest.boot import parse
from common.guest.programs.driver_accelerator import latest_write, steps_of
from common.guest.programs.driver_nvme import request_of
from common.guest.vcpu import Vcpu

KINDS = ("nic", "nvme", "accelerator")


def machine_with(kind: str, *, viommu: bool = True, **knobs: Any) -> FakeMachine:
    program = {"program": "driver", "name": "driver0", "device": kind, "remap": 4, **knobs}
    return FakeMachine([program], {kind: kind}, viommu=viommu)


def device_of(machine: FakeMachine) -> Any:
    return next(iter(machine.devices.values()))


@pytest.mark.parametrize("viommu", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_driver_works_and_finds_nothing_wrong(kind: str, viommu: bool) -> None:
    machine = machine_with(kind, viommu=viommu)
    machine.run(700)
    assert machine.errors() == []
    counters = machine.report()["counters"]
    assert counters["finished"] > 150
    assert bool(counters["remaps"]) == viommu
    assert bool(machine.history) == viommu


@pytest.mark.parametrize("kind", KINDS)
def test_every_buffer_moves_and_an_address_comes_to_mean_another_page(kind: str) -> None:
    machine = machine_with(kind)
    machine.run(800)
    pages: dict[int, set[int]] = {}
    moved: dict[int, int] = {}
    for what, iova, gpa in machine.history:
        if what == "map":
            pages.setdefault(iova, set()).add(gpa)
            moved[gpa] = moved.get(gpa, 0) + 1
    assert max(len(meant) for meant in pages.values()) > 1
    assert sum(times > 1 for times in moved.values()) >= len(moved) - 1  # all but the ring


def test_drivers_of_one_container_do_not_meet() -> None:
    devices = {"nic0": "nic", "nic1": "nic", "nvme0": "nvme"}
    programs = [{"program": "driver", "name": name, "device": name, "remap": 1} for name in devices]
    machine = FakeMachine(programs, devices)
    machine.run(300)
    assert machine.errors() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_spurious_interrupt_is_no_error(kind: str) -> None:
    machine = machine_with(kind)
    machine.run(100)
    machine.devices[kind].work = lambda: None  # type: ignore[method-assign]  # a test's device
    machine.pass_time(2)
    before = machine.report()["counters"]["spurious"]
    for _ in range(3):
        os.eventfd_write(machine.devices[kind].interrupt, 1)
        machine.pass_time(1)
    assert machine.report()["counters"]["spurious"] == before + 3
    assert machine.errors() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_interrupt_is_noticed_and_the_driver_goes_on(kind: str) -> None:
    machine = machine_with(kind, stall_ms=300)
    machine.run(100)
    device_of(machine).lose_interrupt = True
    machine.pass_time(250)
    assert machine.errors() == []
    machine.pass_time(250)
    assert any(re.match(r"stalled: no interrupt for 3\d\d ms", error) for error in machine.errors())
    device_of(machine).lose_interrupt = False
    finished = machine.report()["counters"]["finished"]
    machine.pass_time(500)
    counters = machine.report()["counters"]
    assert counters["finished"] > finished + 10 and counters["stalls"] in (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_doorbell_is_noticed_and_the_driver_goes_on(kind: str) -> None:
    machine = machine_with(kind, stall_ms=300)
    machine.run(100)
    device = device_of(machine)
    device.lose_doorbell, device.budget = True, 1000  # so that it has nothing to do and sleeps
    machine.pass_time(500)
    device.budget = 4
    assert any(re.search(r"is not finished for 3\d\d ms", error) for error in machine.errors())
    device.lose_doorbell = False
    finished = machine.report()["counters"]["finished"]
    machine.pass_time(800)
    assert machine.report()["counters"]["finished"] > finished + 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_pause_is_no_stall(kind: str) -> None:
    machine = machine_with(kind, stall_ms=300)
    machine.run(100)
    machine.pass_time(100, devices_run=False)
    counters = machine.report()["counters"]
    assert counters["posted"] > counters["finished"]
    machine.vcpu.pause()
    machine.pass_time(10_000, vcpu_runs=False, devices_run=False)
    machine.run(100)
    assert machine.errors() == []


def test_a_device_without_doorbell_descriptor_is_rung_by_a_write() -> None:
    machine = machine_with("nvme")
    boot, fds = machine.boot(fresh=True)
    boot["devices"][0]["doorbell_fd"] = None
    machine.vcpu = Vcpu(machine.memory, machine, lambda: machine.now_ns)  # type: ignore[arg-type]  # it has `call`
    machine.vcpu.attach(parse(boot, len(fds)), fds)
    machine.run(100)
    assert machine.report()["counters"]["finished"] > 0
    assert machine.errors() == []


def test_the_wrong_device_is_not_driven() -> None:
    machine = machine_with("nvme")
    device_of(machine).registers[0] = 0x1234
    machine.run(10)
    assert "is another device" in machine.errors()[0]
    assert device_of(machine).registers.get(0x08) is None


def harm_nic(nic: FakeNic) -> dict[str, Callable[[], object]]:
    def corrupt() -> None:
        nic.corrupt = lambda data: data[:-1] + bytes([data[-1] ^ 1])

    def skip() -> None:
        nic.sequence += 3

    def repeat() -> None:
        nic.sequence -= 1

    def go_back() -> None:
        nic.sequence -= 50
        nic.registers[0x08] = 0

    return {"is wrong": corrupt, "lost: 3 packets": skip, "doubled": repeat, "SEQUENCE is": go_back}


@pytest.mark.parametrize("expected", ["is wrong", "lost: 3 packets", "doubled", "SEQUENCE is"])
def test_a_nic_that_errs_is_noticed(expected: str) -> None:
    machine = machine_with("nic")
    machine.run(100)
    harm_nic(device_of(machine))[expected]()
    machine.pass_time(600)
    assert any(expected in error for error in machine.errors())


@pytest.mark.parametrize("kind", KINDS)
def test_registers_of_the_past_are_noticed(kind: str) -> None:
    machine = machine_with(kind)
    machine.run(100)
    device_of(machine).head -= 40
    device_of(machine).registers[0x08] = 0
    machine.pass_time(600)
    assert any(error.startswith("HEAD is") for error in machine.errors())
    device_of(machine).faults = 2
    machine.pass_time(600)
    assert "FAULTS went from 0 to 2" in machine.errors()


def test_a_namespace_of_the_past_is_noticed() -> None:
    machine = machine_with("nvme", span=64)
    machine.run(500)
    nvme: FakeNvme = device_of(machine)
    old = dict(nvme.generations)
    machine.pass_time(200)
    nvme.generations = old
    machine.pass_time(500)
    assert any("read in page" in error and "is wrong" in error for error in machine.errors())


def test_device_memory_of_the_past_is_noticed() -> None:
    machine = machine_with("accelerator", block=8192)
    machine.run(3000)
    device: FakeAccelerator = device_of(machine)
    half = device.content.size // 2
    old = device.content[:half].copy()
    machine.pass_time(500)
    device.content[:half] = old
    machine.pass_time(3000)
    assert any("what was stored, brought" in error for error in machine.errors())


def test_a_cell_of_the_past_is_noticed() -> None:
    machine = machine_with("accelerator")
    machine.run(1000)
    device: FakeAccelerator = device_of(machine)
    half = device.content.size // 2
    device.content[half : half + accelerator.CELL] = np.frombuffer(
        pattern.block(accelerator.cell_seed(0, 1), accelerator.CELL), np.uint8
    )
    machine.vcpu.pause()
    device.work = lambda: None  # type: ignore[method-assign]  # so that the cell stays
    machine.run(50)
    assert any(error.startswith("cell 0 is wrong: it looks like cell 0 at step 1,") for error in machine.errors())


def test_steps_that_go_back_are_noticed() -> None:
    machine = machine_with("accelerator")
    machine.run(500)
    device_of(machine).moves -= 1000
    machine.pass_time(100)
    assert any(error.startswith("STEPS went back") for error in machine.errors())


def peers() -> FakeMachine:
    programs = [
        {"program": "driver", "name": "acc0", "device": "acc0"},
        {"program": "driver", "name": "nic0", "device": "nic0", "peer": "acc0"},
    ]
    return FakeMachine(programs, {"acc0": "accelerator", "nic0": "nic"})


def test_what_a_nic_writes_to_its_peer_is_found_there() -> None:
    machine = peers()
    machine.run(500)
    assert machine.errors() == []
    assert machine.report("acc0")["counters"]["peer_blocks"] > 1000


def test_a_lost_write_to_the_peer_is_noticed() -> None:
    machine = peers()
    machine.run(200)
    nic: Any = machine.devices["nic0"]
    nic.lose_peer_writes = True
    machine.pass_time(200)
    assert any("of the peer's window is wrong" in error for error in machine.errors())


def test_after_a_pause_all_device_memory_is_looked_at_soon() -> None:
    machine = peers()
    machine.run(300)
    machine.vcpu.pause()
    before = machine.report("acc0")["counters"]["cells"]
    machine.run(20)
    assert machine.report("acc0")["counters"]["cells"] - before >= machine.devices["acc0"].cells


@pytest.mark.parametrize(("cells", "moves"), [(4, 0), (4, 3), (4, 4), (4, 1001), (1, 7)])
def test_steps_of_cells_add_up_to_the_moves(cells: int, moves: int) -> None:
    steps = [0] * cells
    for move in range(moves):
        steps[move % cells] += 1
    assert [steps_of(cell, moves, cells) for cell in range(cells)] == steps


@pytest.mark.parametrize("writes", [0, 1, 4, 5, 8, 1003])
def test_the_latest_write_to_a_block_of_the_window(writes: int) -> None:
    blocks = 4
    latest: list[int | None] = [None] * blocks
    for write in range(writes):
        latest[write % blocks] = write
    assert [latest_write(block, writes, blocks) for block in range(blocks)] == latest


def test_requests_stay_inside_and_are_of_all_kinds() -> None:
    requests = [request_of(number, 50, 8) for number in range(2000)]
    assert all(r.lba >= 0 and 1 <= r.blocks <= 8 and r.lba + r.blocks <= 50 for r in requests)
    assert {r.blocks for r in requests} == set(range(1, 9))
    assert 900 < sum(r.write for r in requests) < 1100
    assert request_of(5, 1, 8).blocks == 1
