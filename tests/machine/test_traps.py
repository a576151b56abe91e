from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.ipc.channel import Message
from common.machine.board import BARS_32, Board
from common.machine.machine import Machine
from common.machine.traps import MAX_BLOCK, traps
from common.memory.layout import Layout

SIZE = 4 << 20


class FakeDevice:
    def __init__(self, name: str) -> None:
        self.name = name
        self.written: list[tuple[int, int, bytes]] = []
        self.enabled = 0
        self.client = SimpleNamespace(
            region_read=lambda index, offset, size: bytes([index, offset % 256, *range(size)])[:size],
            region_write=lambda *access: self.written.append(access),
        )

    def guest_enable(self) -> None:
        self.enabled += 1


class FakeContainer:
    def __init__(self) -> None:
        self.changes: list[Any] = []

    def map(self, *args: int, **flags: bool) -> None:
        self.changes.append((*args, flags))

    def unmap(self, *args: int) -> None:
        self.changes.append(args)


@pytest.fixture
def machine() -> SimpleNamespace:
    return SimpleNamespace(
        board=Board(Layout(64 << 20), [("a", {0: SIZE}), ("b", {2: SIZE})]),
        devices={"a": FakeDevice("a"), "b": FakeDevice("b")},
        containers={"default": FakeContainer()},
    )


def trap(machine: SimpleNamespace, name: str, **params: Any) -> Any:
    return traps(cast("Machine", machine))[name](Message(params))


def test_accesses_reach_the_bar_they_are_for(machine: SimpleNamespace) -> None:
    gpa = BARS_32 + SIZE + 0x10
    assert trap(machine, "mmio_read", gpa=gpa, size=4) == {"value": 0x01001002}
    trap(machine, "mmio_write", gpa=gpa, size=4, value=0x01020304)
    assert machine.devices["b"].written == [(2, 0x10, b"\x04\x03\x02\x01")] and not machine.devices["a"].written
    assert trap(machine, "mmio_block_read", gpa=gpa, size=6).payload == b"\x02\x10\x00\x01\x02\x03"


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (BARS_32 - 4, 4),
        (BARS_32 - 2, 4),
        (BARS_32 + SIZE - 2, 4),  # across two BARs, of two devices
        (BARS_32 + 2 * SIZE, 1),
        (BARS_32, 0),
        (BARS_32 + 8, -4),
        (BARS_32, MAX_BLOCK + 1),
        (0, 4),
    ],
)
@pytest.mark.parametrize("name", ["mmio_read", "mmio_write", "mmio_block_read"])
def test_no_access_beside_a_bar(machine: SimpleNamespace, name: str, gpa: int, size: int) -> None:
    with pytest.raises(OSError, match="no BAR at guest physical address"):
        trap(machine, name, gpa=gpa, size=size, value=0)
    assert not machine.devices["a"].written and not machine.devices["b"].written


def test_the_largest_block_may_be_read(machine: SimpleNamespace) -> None:
    machine.devices["a"].client.region_read = lambda _index, _offset, size: bytes(size)
    assert len(trap(machine, "mmio_block_read", gpa=BARS_32, size=MAX_BLOCK).payload) == MAX_BLOCK


def test_mappings_go_to_their_container(machine: SimpleNamespace) -> None:
    trap(machine, "iommu_map", container="default", iova=0x1000, size=0x2000, gpa=0x5000, readable=True, writable=False)
    trap(machine, "iommu_unmap", container="default", iova=0x1000, size=0x2000)
    assert machine.containers["default"].changes == [
        (0x1000, 0x2000, 0x5000, {"readable": True, "writable": False}),
        (0x1000, 0x2000),
    ]


def test_a_driver_enables_its_device(machine: SimpleNamespace) -> None:
    trap(machine, "irq_enable", device="b")
    assert (machine.devices["a"].enabled, machine.devices["b"].enabled) == (0, 1)
