from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

import pytest
from device_rig import PATIENCE, Rig

from common.datasheets import pci
from common.vfio.migration import DeviceState
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


# INTx: a level.

INTX = 0
MASK, UNMASK = IrqFlags.ACTION_MASK, IrqFlags.ACTION_UNMASK
NONE, EVENTFD = IrqFlags.DATA_NONE, IrqFlags.DATA_EVENTFD
BUFFERS = 0x10000


@pytest.fixture
def nic(rig: Callable[..., Rig]) -> Rig:
    """A nic with INTx and a ring."""
    device = rig("nic", rate=1e9)
    device.map_ram()
    device.client.set_irqs(INTX, EVENTFD | TRIGGER, 0, 1, fds=[device.irq])
    device.bus_master(on=True)
    device.enable(8)
    return device


def receive(device: Rig) -> None:
    """Have the device finish an entry."""
    device.post((BUFFERS, 64, 0, 0, 0, 0))
    device.wait_head(device.tail)
    device.wait(lambda: device.read(pci.INTERRUPT) == pci.INTERRUPT_RING)


def shown(device: Rig) -> bool:
    """Return Interrupt Status of configuration space."""
    return bool(device.client.region_read(7, 0x06, 2)[0] & 1 << 3)


def test_the_pin_interrupts_once_until_it_is_unmasked(nic: Rig) -> None:
    assert not shown(nic)
    receive(nic)
    assert nic.interrupted() and shown(nic)
    receive(nic)
    assert taken(nic.irq) == 0
    nic.client.set_irqs(INTX, NONE | UNMASK, 0, 1)
    assert taken(nic.irq) == 1  # nobody has acknowledged it
    nic.write(pci.INTERRUPT, pci.INTERRUPT_RING)
    assert not shown(nic)
    nic.client.set_irqs(INTX, NONE | UNMASK, 0, 1)
    assert taken(nic.irq) == 0
    receive(nic)
    assert nic.interrupted()


def test_the_pin_is_masked_by_request(nic: Rig) -> None:
    nic.client.set_irqs(INTX, NONE | MASK, 0, 1)
    receive(nic)
    assert taken(nic.irq) == 0
    nic.client.set_irqs(INTX, IrqFlags.DATA_BOOL | UNMASK, 0, 1, b"\0")
    assert taken(nic.irq) == 0
    nic.client.set_irqs(INTX, IrqFlags.DATA_BOOL | UNMASK, 0, 1, b"\1")
    assert taken(nic.irq) == 1


def test_the_pin_is_unmasked_by_an_eventfd(nic: Rig) -> None:
    unmask = os.eventfd(0, os.EFD_NONBLOCK)
    nic.client.set_irqs(INTX, EVENTFD | UNMASK, 0, 1, fds=[unmask])
    receive(nic)
    assert nic.interrupted()
    os.eventfd_write(unmask, 1)
    assert nic.interrupted()
    assert taken(unmask) == 0
    nic.client.set_irqs(INTX, EVENTFD | UNMASK, 0, 1)
    os.eventfd_write(unmask, 1)
    nic.client.set_irqs(INTX, NONE | TRIGGER, 0, 1)
    assert taken(nic.irq) == 1
    assert taken(unmask) == 1
    os.close(unmask)
    with pytest.raises(DeviceError) as refused:
        nic.client.set_irqs(INTX, EVENTFD | MASK, 0, 1)
    assert refused.value.errno == errno.ENOTTY


def test_interrupt_disable_silences_the_pin_and_shows_it_still(nic: Rig) -> None:
    nic.client.region_write(7, 0x04, (0x406).to_bytes(2, "little"))
    receive(nic)
    assert taken(nic.irq) == 0 and shown(nic)
    nic.bus_master(on=True)
    assert taken(nic.irq) == 1


def test_who_comes_late_finds_the_pin_asserted(nic: Rig) -> None:
    nic.client.set_irqs(INTX, NONE | TRIGGER, 0, 0)
    receive(nic)
    assert taken(nic.irq) == 0
    nic.client.set_irqs(INTX, EVENTFD | TRIGGER, 0, 1, fds=[nic.irq])
    assert taken(nic.irq) == 1


def test_an_asserted_pin_moves_with_the_device(nic: Rig, rig: Callable[..., Rig]) -> None:
    receive(nic)
    target = rig("nic", rate=1e9)
    target.client.set_irqs(INTX, EVENTFD | TRIGGER, 0, 1, fds=[target.irq])
    target.load(nic.dump())
    assert shown(target) and target.dump() == nic.dump()
    target.client.set_state(DeviceState.RUNNING)
    assert target.interrupted()


def test_with_msix_the_pin_rests(nic: Rig) -> None:
    vector = os.eventfd(0, os.EFD_NONBLOCK)
    nic.client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 1, fds=[vector])
    nic.post((BUFFERS, 64, 0, 0, 0, 0))
    nic.wait(lambda: taken(vector) == 1)
    assert taken(nic.irq) == 0 and nic.read(pci.INTERRUPT) == 0
    os.close(vector)


def in_a_dma_message(device: Rig) -> threading.Event:
    """Let a device wait for the answer to a DMA message, until the event is set."""
    asked, go = threading.Event(), threading.Event()

    def read(_iova: int, count: int) -> bytes:
        asked.set()
        assert go.wait(PATIENCE)
        return bytes(count)

    device.client.on_dma_read = read
    device.bus_master(on=True)
    device.write(pci.RING_BASE, 1 << 32, 8)
    device.write(pci.RING_ENTRIES, 4)
    device.write(pci.CONTROL, pci.CONTROL_ENABLE)
    assert asked.wait(PATIENCE)
    return go


def test_bus_mastering_is_off_when_no_dma_is_under_way_any_more(rig: Callable[..., Rig]) -> None:
    device = rig("nic")
    go = in_a_dma_message(device)
    off = threading.Thread(target=lambda: device.bus_master(on=False))
    off.start()
    off.join(0.3)
    waited = off.is_alive()
    go.set()
    off.join(PATIENCE)
    assert waited and not off.is_alive()


def test_are_set_up_while_a_dma_message_is_under_way(rig: Callable[..., Rig]) -> None:
    # QEMU answers no DMA message while one of its CPUs waits for an answer of ours.
    device = rig("nic")
    go = in_a_dma_message(device)
    began = time.monotonic()
    timer = threading.Timer(PATIENCE / 2, go.set)
    timer.start()
    try:
        device.client.set_irqs(MSIX, IrqFlags.DATA_EVENTFD | TRIGGER, 0, 1, fds=[device.irq])
        device.client.set_irqs(INTX, EVENTFD | UNMASK, 0, 1, fds=[device.irq])
        device.client.region_write(7, 0x3C, b"\x0b")
        assert not go.is_set(), f"answered after {time.monotonic() - began:.1f} s, when the DMA was"
    finally:
        timer.cancel()
        go.set()
