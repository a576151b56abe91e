from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from device_rig import Rig

from common.datasheets import nvme, pattern
from common.devices.nvme import Nvme, NvmeKnobs
from common.vfio.migration import DeviceState

BUFFERS = 0x10000
BLOCK = nvme.BLOCK_SIZE


def block(lba: int, generation: int = 0) -> bytes:
    return pattern.block(nvme.content_seed(lba, generation), BLOCK)


@pytest.fixture
def disk(rig: Callable[..., Rig]) -> Rig:
    device = rig("nvme", blocks=1000, latency_us=0)
    device.set_up()
    device.enable(8)
    return device


def run(device: Rig, *commands: tuple[int, ...]) -> list[int]:
    """Run commands; return their status."""
    first = device.tail
    device.post(*commands)
    device.wait_head(device.tail)
    entries = device.ring()
    return [int(entries["status"][n % device.size]) for n in range(first, device.tail)]


def test_reads_what_was_written_and_else_generation_0(disk: Rig) -> None:
    disk.ram.mmap[BUFFERS : BUFFERS + 2 * BLOCK] = block(10, 3) + block(11, 0xFFFFFF)
    assert run(disk, (nvme.OP_WRITE, 2, 10, BUFFERS, 1, 0)) == [nvme.STATUS_OK]
    assert run(disk, (nvme.OP_READ, 4, 9, BUFFERS, 2, 0)) == [nvme.STATUS_OK]
    assert disk.ram.mmap[BUFFERS : BUFFERS + 4 * BLOCK] == block(9) + block(10, 3) + block(11, 0xFFFFFF) + block(12)
    assert disk.interrupted()


def test_finishes_in_order_and_returns_the_drivers_fields(disk: Rig) -> None:
    commands = [(nvme.OP_READ, 1 + n % 2, n, BUFFERS + n * 2 * BLOCK, 100 + n, 0) for n in range(8)]
    assert run(disk, *commands) == [nvme.STATUS_OK] * 8
    assert [tuple(entry)[:5] for entry in disk.ring().tolist()] == [command[:5] for command in commands]


@pytest.mark.parametrize("damage", ["flipped", "other block", "zero"])
def test_a_write_is_right_to_the_byte_or_not_at_all(disk: Rig, damage: str) -> None:
    bad = {"flipped": block(11, 5)[:-1] + b"!", "other block": block(12, 5), "zero": bytes(BLOCK)}[damage]
    disk.ram.mmap[BUFFERS : BUFFERS + 2 * BLOCK] = block(10, 5) + bad
    assert run(disk, (nvme.OP_WRITE, 2, 10, BUFFERS, 0, 0)) == [nvme.STATUS_BAD_DATA]
    assert run(disk, (nvme.OP_READ, 2, 10, BUFFERS, 0, 0)) == [nvme.STATUS_OK]
    assert disk.ram.mmap[BUFFERS : BUFFERS + 2 * BLOCK] == block(10) + block(11)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ((nvme.OP_READ, 0, 0), nvme.STATUS_BAD_LBA),
        ((nvme.OP_READ, 257, 0), nvme.STATUS_BAD_LBA),
        ((nvme.OP_READ, 2, 999), nvme.STATUS_BAD_LBA),
        ((nvme.OP_WRITE, 1, (1 << 64) - 1), nvme.STATUS_BAD_LBA),
        ((7, 1, 0), nvme.STATUS_BAD_OPCODE),
    ],
)
def test_refuses_impossible_commands(disk: Rig, command: tuple[int, int, int], status: int) -> None:
    assert run(disk, (*command, BUFFERS, 0, 0)) == [status]


def test_the_largest_transfer(disk: Rig) -> None:
    assert run(disk, (nvme.OP_READ, 256, 100, BUFFERS, 0, 0)) == [nvme.STATUS_OK]
    assert disk.ram.mmap[BUFFERS : BUFFERS + 256 * BLOCK] == b"".join(block(lba) for lba in range(100, 356))


def test_capacity_is_a_register(disk: Rig) -> None:
    assert disk.read(nvme.CAPACITY, 8) == 1000


def test_reset_keeps_the_disk(disk: Rig) -> None:
    disk.ram.mmap[BUFFERS : BUFFERS + BLOCK] = block(10, 3)
    assert run(disk, (nvme.OP_WRITE, 1, 10, BUFFERS, 1, 0)) == [nvme.STATUS_OK]
    disk.client.reset()
    disk.enable(8)
    assert run(disk, (nvme.OP_READ, 1, 10, BUFFERS, 1, 0)) == [nvme.STATUS_OK]
    assert disk.ram.mmap[BUFFERS : BUFFERS + BLOCK] == block(10, 3)


def test_a_command_that_waits_is_carried_out_by_the_device_that_takes_over(rig: Callable[..., Rig]) -> None:
    source, target = rig("nvme", latency_us=10_000_000), rig("nvme", latency_us=0)
    for device in (source, target):
        device.set_up()
        device.size, device.base = 8, device.RING
    source.enable(8)
    source.post((nvme.OP_READ, 1, 5, BUFFERS, 0, 0))
    state = source.dump()
    assert source.ram.mmap[BUFFERS : BUFFERS + BLOCK] == bytes(BLOCK)
    target.load(state)
    target.client.set_state(DeviceState.RUNNING)
    target.wait_head(1)
    assert target.ram.mmap[BUFFERS : BUFFERS + BLOCK] == block(5)


def test_commands_take_their_latency_each_from_when_it_was_seen() -> None:
    device = Nvme("nvme0", NvmeKnobs(latency_us=1000))
    assert device.allowance(2, 10.0) == (0, pytest.approx(0.001))
    assert device.allowance(5, 10.0005) == (0, pytest.approx(0.0005))
    assert device.allowance(5, 10.0011)[0] == 2
    assert device.allowance(5, 10.0016)[0] == 5


MAP = np.dtype([("lba", "<u4"), ("generation", "<u4")])


def map_of(*written: tuple[int, int], count: int | None = None) -> bytes:
    entries = np.array(list(written), dtype=MAP)
    return (entries.size if count is None else count).to_bytes(8, "little") + entries.tobytes()


@pytest.mark.parametrize(
    "state",
    [
        b"",
        map_of()[:-1],
        map_of((1, 1), count=2),
        map_of((1, 1), (2, 1), count=1),
        map_of((1, 1), (1, 2)),
        map_of((2, 1), (1, 1)),
        map_of((1000, 1)),
        map_of((1, 0)),
        map_of((1, 1 << 24)),
        map_of(count=(1 << 64) - 1),
    ],
)
def test_refuses_a_map_that_cannot_be(state: Any) -> None:
    device = Nvme("nvme0", NvmeKnobs(blocks=1000))
    with pytest.raises(ValueError):
        device.check_kind(b"", state)


def test_takes_a_map_that_can_be() -> None:
    device = Nvme("nvme0", NvmeKnobs(blocks=1000))
    state = map_of((0, 1), (7, 5), (999, 0xFFFFFF))
    device.check_kind(b"", state)
    device.load_kind(state)
    assert device.save_kind() == state
