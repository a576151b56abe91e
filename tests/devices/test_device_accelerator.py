from __future__ import annotations

from collections.abc import Callable

import pytest
from device_rig import Rig

from common.datasheets import accelerator, pattern, pci
from common.devices.accelerator import Accelerator, AcceleratorKnobs
from common.vfio.migration import DeviceState

BUFFERS = 0x10000
MEMORY = 1 << 20
CELL = accelerator.CELL


def cells_at(steps: int, memory: int) -> bytes:
    """Return the device's own half after so many moves, as the datasheet has it."""
    cells = memory // 2 // CELL
    made = [(steps - cell + cells - 1) // cells for cell in range(cells)]
    return b"".join(pattern.block(accelerator.cell_seed(cell, step), CELL) for cell, step in enumerate(made))


@pytest.fixture
def device(rig: Callable[..., Rig]) -> Rig:
    made = rig("accelerator", memory=MEMORY, churn=0)
    made.set_up()
    made.enable(8)
    return made


def run(device: Rig, *jobs: tuple[int, ...]) -> list[int]:
    first = device.tail
    device.post(*jobs)
    device.wait_head(device.tail)
    return [int(device.ring()["status"][n % device.size]) for n in range(first, device.tail)]


def test_load_xor_store(device: Rig) -> None:
    data = pattern.block(4711, 10_000)
    device.ram.mmap[BUFFERS : BUFFERS + len(data)] = data
    jobs = [
        (accelerator.OP_LOAD, len(data), 123, BUFFERS, 0, 0),
        (accelerator.OP_XOR, 100, 123, 0, 0x1A5, 0),
        (accelerator.OP_STORE, len(data), 123, BUFFERS + 0x8000, 0, 0),
    ]
    assert run(device, *jobs) == [accelerator.STATUS_OK] * 3
    changed = bytes(byte ^ 0xA5 for byte in data[:100]) + data[100:]
    assert device.ram.mmap[BUFFERS + 0x8000 : BUFFERS + 0x8000 + len(data)] == changed
    assert device.client.region_read(2, 123, len(data)) == changed
    assert device.interrupted()


@pytest.mark.parametrize(
    ("job", "status"),
    [
        ((accelerator.OP_LOAD, 0, 0), accelerator.STATUS_BAD_RANGE),
        ((accelerator.OP_LOAD, 2, MEMORY // 2 - 1), accelerator.STATUS_BAD_RANGE),
        ((accelerator.OP_XOR, 1, MEMORY // 2), accelerator.STATUS_BAD_RANGE),
        ((accelerator.OP_STORE, 2, MEMORY - 1), accelerator.STATUS_BAD_RANGE),
        ((accelerator.OP_STORE, 1, (1 << 64) - 1), accelerator.STATUS_BAD_RANGE),
        ((accelerator.OP_STORE, (1 << 20) + 1, 0), accelerator.STATUS_BAD_RANGE),
        ((accelerator.OP_STORE, CELL, MEMORY // 2), accelerator.STATUS_OK),
        ((9, 1, 0), accelerator.STATUS_BAD_OPCODE),
    ],
)
def test_checks_its_jobs(device: Rig, job: tuple[int, int, int], status: int) -> None:
    assert run(device, (*job, BUFFERS, 0, 0)) == [status]
    assert device.client.region_read(2, 0, MEMORY) == bytes(MEMORY // 2) + cells_at(0, MEMORY)


def test_a_refused_access_is_a_fault(device: Rig) -> None:
    assert run(device, (accelerator.OP_LOAD, 64, 0, 0xDEAD_0000, 0, 0)) == [accelerator.STATUS_DMA_FAULT]
    assert device.read(pci.FAULTS) == 1


def test_writes_from_outside_reach_the_drivers_half_only(device: Rig) -> None:
    device.client.region_write(2, MEMORY // 2 - 4, b"12345678")
    device.client.region_write(2, MEMORY // 2 + 2, b"12345678")
    device.client.region_write(2, MEMORY - 4, b"1234")
    image = device.client.region_read(2, 0, MEMORY)
    assert image == bytes(MEMORY // 2 - 4) + b"1234" + cells_at(0, MEMORY)


def test_its_own_half_is_what_its_steps_say(rig: Callable[..., Rig]) -> None:
    device = rig("accelerator", memory=256 << 10, churn=1e8)
    assert device.read(accelerator.MEMORY_SIZE, 8) == 256 << 10
    device.wait(lambda: device.read(accelerator.STEPS, 8) > 100)
    device.client.set_state(DeviceState.STOP)
    steps = device.read(accelerator.STEPS, 8)
    half = 128 << 10
    assert device.client.region_read(2, half, half) == cells_at(steps, 256 << 10)
    device.client.set_state(DeviceState.RUNNING)
    device.wait(lambda: device.read(accelerator.STEPS, 8) > steps)
    device.client.reset()
    device.client.set_state(DeviceState.STOP)
    steps = device.read(accelerator.STEPS, 8)
    assert device.client.region_read(2, half, half) == cells_at(steps, 256 << 10)


@pytest.mark.parametrize("churn", [4096.0, 1e6, 5e7])
def test_the_churn_rate_is_kept_and_pauses_are_not_made_up_for(churn: float) -> None:
    device = Accelerator("accelerator0", AcceleratorKnobs(memory=1 << 20, churn=churn))
    device.background(100.0)
    first = device.registers.get(accelerator.STEPS, 8)
    now = 100.0
    while now < 103:
        delay = device.background(now)
        assert delay is not None
        now += max(delay, 0.001)
    moves = device.registers.get(accelerator.STEPS, 8) - first
    expected = 3 * churn / CELL
    backlog = max(0.02 * churn / CELL, 1) + 1
    assert expected - backlog <= moves <= expected + backlog
    before = device.registers.get(accelerator.STEPS, 8)
    device.background(now + 3600)
    assert device.registers.get(accelerator.STEPS, 8) - before <= backlog


def test_marks_what_it_changes_for_the_next_stream(rig: Callable[..., Rig]) -> None:
    device = rig("accelerator", memory=MEMORY, churn=0)
    device.set_up()
    device.enable(8)
    device.client.set_state(DeviceState.PRE_COPY)
    device.drain()
    assert run(device, (accelerator.OP_LOAD, 2, 4095, BUFFERS, 0, 0)) == [accelerator.STATUS_OK]
    assert device.client.precopy_info().dirty_bytes == 2 * 4096 + 32
    assert run(device, (accelerator.OP_XOR, 1, 3 * 4096, 0, 1, 0)) == [accelerator.STATUS_OK]
    assert device.client.precopy_info().dirty_bytes == 3 * 4096 + 64
    assert run(device, (accelerator.OP_STORE, 4096, 5 * 4096, BUFFERS, 1, 0)) == [accelerator.STATUS_OK]
    assert device.client.precopy_info().dirty_bytes == 3 * 4096 + 64
