from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from device_rig import Rig

from common.vfio_user.client import DeviceError
from common.vfio_user.description import IrqFlags

TRIGGER = IrqFlags.ACTION_TRIGGER
MSIX = 2


def taken(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def test_has_a_pin_and_msix(rig: Callable[..., Rig]) -> None:
    irqs = rig("nic").client.irqs
    assert [info.count for info in irqs] == [1, 0, 1, 0, 0]
    assert [info.flags for info in irqs[:3]] == [7, 0, 1]  # EVENTFD, and for the pin MASKABLE and AUTOMASKED


@pytest.mark.parametrize(
    ("flags", "data", "signals"),
    [(IrqFlags.DATA_NONE, b"", 1), (IrqFlags.DATA_BOOL, b"\1", 1), (IrqFlags.DATA_BOOL, b"\0", 0)],
)
def test_can_be_triggered_by_hand(rig: Callable[..., Rig], flags: IrqFlags, data: bytes, signals: int) -> None:
    device = rig("nic")
    device.client.set_irqs(MSIX, IrqFlags.DATA_EVENTFD | TRIGGER, 0, 1, fds=[device.irq])
    device.client.set_irqs(MSIX, flags | TRIGGER, 0, 1, data)
    assert taken(device.irq) == signals


@pytest.mark.parametrize("how", ["without descriptors", "disable"])
def test_an_eventfd_is_taken_away(rig: Callable[..., Rig], how: str) -> None:
    device = rig("nic")
    device.client.set_irqs(MSIX, IrqFlags.DATA_EVENTFD | TRIGGER, 0, 1, fds=[device.irq])
    if how == "disable":
        device.client.set_irqs(MSIX, IrqFlags.DATA_NONE | TRIGGER, 0, 0)
    else:
        device.client.set_irqs(MSIX, IrqFlags.DATA_EVENTFD | TRIGGER, 0, 1)
    device.client.set_irqs(MSIX, IrqFlags.DATA_NONE | TRIGGER, 0, 1)
    assert taken(device.irq) == 0


def test_what_is_no_eventfd_is_refused_and_the_old_one_stays(rig: Callable[..., Rig]) -> None:
    device = rig("nic")
    device.client.set_irqs(MSIX, IrqFlags.DATA_EVENTFD | TRIGGER, 0, 1, fds=[device.irq])
    reading, writing = os.pipe()
    with pytest.raises(DeviceError) as refused:
        device.client.set_irqs(MSIX, IrqFlags.DATA_EVENTFD | TRIGGER, 0, 1, fds=[writing])
    os.close(reading)
    os.close(writing)
    assert refused.value.errno == errno.EINVAL
    device.client.set_irqs(MSIX, IrqFlags.DATA_NONE | TRIGGER, 0, 1)
    assert taken(device.irq) == 1


def test_masking_is_the_vmms_affair(rig: Callable[..., Rig]) -> None:
    device = rig("nic")
    with pytest.raises(DeviceError) as refused:
        device.client.set_irqs(MSIX, IrqFlags.DATA_NONE | IrqFlags.ACTION_MASK, 0, 1)
    assert refused.value.errno == errno.ENOTTY


def test_the_table_is_kept_and_the_rest_of_its_bar_is_not(rig: Callable[..., Rig]) -> None:
    device = rig("nic")
    assert device.client.region_read(4, 0, 20) == bytes(12) + b"\1\0\0\0" + bytes(4)
    device.client.region_write(4, 8, b"0123456789abcdef")
    device.client.region_write(4, 0x800, b"pending")
    assert device.client.region_read(4, 0, 0x1000) == bytes(8) + b"01234567" + bytes(0xFF0)
