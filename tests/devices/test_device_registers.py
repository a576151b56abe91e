from __future__ import annotations

import errno

import pytest

from common.datasheets import pci
from common.devices.pci import CONFIG_SIZE, Bar, ConfigSpace
from common.devices.registers import RegisterBlock


@pytest.fixture
def block() -> RegisterBlock:
    made = RegisterBlock(0x40)
    made.define_constant(0, 4, 0x1234)
    made.define(4, 4, 7, mask=0xF0)
    made.define(8, 4)
    made.define(0x10, 8, mask=(1 << 64) - 1)
    return made


def test_a_driver_writes_through_the_mask_only(block: RegisterBlock) -> None:
    block.write(0, b"\xff" * 8)
    assert (block.get(0, 4), block.get(4, 4)) == (0x1234, 0xF7)
    block.write(8, b"\xff" * 4)
    block.write(0x30, b"\xff" * 8)
    assert block.read(8, 4) == bytes(4)
    assert block.read(0x30, 0x20) == bytes(0x20)


def test_a_wide_register_is_written_whole_or_by_halves(block: RegisterBlock) -> None:
    block.write(0x10, (0x1122334455667788).to_bytes(8, "little"))
    block.write(0x14, (0xAABBCCDD).to_bytes(4, "little"))
    assert block.get(0x10, 8) == 0xAABBCCDD55667788


@pytest.mark.parametrize(("offset", "width"), [(0x10, 1), (0x10, 2), (0x10, 16), (0x12, 4), (0x14, 8), (0x10, 0)])
def test_no_other_access_is_one(block: RegisterBlock, offset: int, width: int) -> None:
    with pytest.raises(OSError) as refused:
        block.write(offset, b"\xff" * width)
    assert refused.value.errno == errno.EINVAL


def test_the_devices_own_writes_wrap(block: RegisterBlock) -> None:
    block.put(8, 4, (1 << 32) + 5)
    assert block.get(8, 4) == 5
    block.change(8, 4, clear=1, put=0x10)
    assert block.get(8, 4) == 0x14


def test_an_image_is_another_devices_if_a_constant_differs(block: RegisterBlock) -> None:
    image = bytearray(block.save())
    image[8] = 1
    block.check(image)
    block.load(image)
    assert block.get(8, 4) == 1
    image[0] = 0
    for wrong in (image, image[:-1], bytes(image) + b"\0"):
        with pytest.raises(ValueError):
            block.check(wrong)
    block.reset()
    assert block.get(8, 4) == 0 and block.get(4, 4) == 7


@pytest.fixture
def config() -> ConfigSpace:
    return ConfigSpace(0x0003, 0x120000, {0: Bar(0x1000), 2: Bar(1 << 34, wide=True), 4: Bar(0x1000)}, 1)


def read(config: ConfigSpace, offset: int, width: int) -> int:
    return int.from_bytes(config.read(offset, width), "little")


def test_says_what_it_is(config: ConfigSpace) -> None:
    assert read(config, 0, 4) == 0x0003 << 16 | pci.VENDOR_ID
    assert read(config, 9, 3) == 0x120000
    capability = read(config, 0x34, 1)
    assert read(config, capability, 1) == 0x11
    assert read(config, capability + 1, 1) == 0
    assert read(config, capability + 4, 4) == pci.MSIX_BAR


def test_bars_tell_their_size(config: ConfigSpace) -> None:
    config.write(0x10, b"\xff" * 24)
    assert read(config, 0x10, 4) == 0xFFFFF000
    assert read(config, 0x14, 4) == 0
    assert read(config, 0x18, 8) == (1 << 64) - (1 << 34) | 0xC
    assert read(config, 0x20, 4) == 0xFFFFF000
    config.write(0x18, (0x38_0000_1234).to_bytes(8, "little"))
    assert read(config, 0x18, 8) == 0x38_0000_000C


def test_bus_mastering_is_off_until_somebody_switches_it_on(config: ConfigSpace) -> None:
    assert not config.bus_master
    config.write(0x04, b"\xff\xff\xff\xff")
    assert config.bus_master
    assert read(config, 0x04, 4) == 0x0010_0406
    config.write(0x04, b"\x02\x00")
    assert not config.bus_master


def test_a_whole_image_is_restored_by_one_write() -> None:
    first, second = (ConfigSpace(1, 0x020000, {0: Bar(0x1000)}, 1) for _ in range(2))
    first.write(0x10, (0xFE00_0000).to_bytes(4, "little"))
    first.write(0x04, b"\x06\x04")
    first.write(0x42, b"\xff\xff")
    second.write(0, first.read(0, CONFIG_SIZE))
    assert second.read(0, CONFIG_SIZE) == first.read(0, CONFIG_SIZE)
    assert read(second, 0x42, 2) == 0xC000
