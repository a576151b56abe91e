"""SET_IRQS and DEVICE_RESET."""

from __future__ import annotations

import os
import select

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import Device, parsed
from common.conformance.lab import Lab
from common.conformance.probe import name_of_error
from common.vfio.migration import DeviceState
from common.vfio_user.codec import Command
from common.vfio_user.description import DeviceInfo, IrqFlags, IrqInfo, IrqSet

_RESET = 1
_QUIET = 0.1  # seconds for which an eventfd is watched
_EVENTFD = IrqFlags.DATA_EVENTFD | IrqFlags.ACTION_TRIGGER


def _irq(device: Device) -> IrqInfo:
    for irq in device.irqs.values():
        if irq.count and irq.flags & 1:
            return irq
    raise Unknown("the device has no interrupt that takes an eventfd")


@check("SET_IRQS gives a vector an eventfd; triggering the vector by hand signals it; count 0 takes it away.")
def eventfd(lab: Lab) -> str:
    """Give the first vector one, take it away, and trigger the vector; then give it one again, and trigger it."""
    device = lab.device()
    irq = _irq(device)
    give = IrqSet(irq.index, _EVENTFD, 0, 1).pack()
    off = IrqSet(irq.index, IrqFlags.DATA_NONE | IrqFlags.ACTION_TRIGGER, 0, 0).pack()
    trigger = IrqSet(irq.index, IrqFlags.DATA_NONE | IrqFlags.ACTION_TRIGGER, 0, 1).pack()
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        # In this order, for a pin that has been signalled once may be masked.
        device.accepted(Command.DEVICE_SET_IRQS, give, fds=[fd])
        device.accepted(Command.DEVICE_SET_IRQS, off)
        device.ask(Command.DEVICE_SET_IRQS, trigger)
        ready, _, _ = select.select([fd], [], [], _QUIET)
        if ready:
            raise Failure(f"interrupt {irq.index} was triggered, and an eventfd that was taken away was signalled")
        device.accepted(Command.DEVICE_SET_IRQS, give, fds=[fd])
        reply = device.ask(Command.DEVICE_SET_IRQS, trigger)
        if reply.error:
            raise Unknown(f"triggering by hand is refused with {name_of_error(reply.error)}")
        ready, _, _ = select.select([fd], [], [], lab.limits.answer)
        if not ready:
            raise Failure(f"interrupt {irq.index} was triggered, and its eventfd was not signalled")
        device.accepted(Command.DEVICE_SET_IRQS, off)
    finally:
        os.close(fd)
    return f"interrupt {irq.index}"


@check("SET_IRQS names vectors that are there, one kind of data and one action; anything else is refused.")
def invalid(lab: Lab) -> None:
    """Ask for too many, for none that is there, for two kinds of data, for no action."""
    device = lab.device()
    irq = _irq(device)
    none = IrqFlags.DATA_NONE | IrqFlags.ACTION_TRIGGER
    for what, request in (
        ("more vectors than there are", IrqSet(irq.index, none, 1, irq.count)),
        ("vectors beyond the last", IrqSet(irq.index, none, irq.count, 1)),
        ("vectors around 2^32", IrqSet(irq.index, none, 0xFFFF_FFFF, 2)),
        ("two kinds of data", IrqSet(irq.index, none | IrqFlags.DATA_BOOL, 0, 1)),
        ("no action", IrqSet(irq.index, IrqFlags.DATA_NONE, 0, 1)),
        ("an interrupt that is not there", IrqSet(0xFFFF, none, 0, 1)),
    ):
        device.refused(f"SET_IRQS for {what}", Command.DEVICE_SET_IRQS, request.pack())


@check("DEVICE_RESET, of a device that says it can be reset, is carried out, and leaves the device in RUNNING.")
def reset(lab: Lab) -> None:
    """Reset it while it runs."""
    device = lab.device()
    info = parsed(DeviceInfo.unpack, device.accepted(Command.DEVICE_GET_INFO, DeviceInfo().pack()).body)
    if not info.flags & _RESET:
        raise Unknown("the device says that it cannot be reset")
    device.accepted(Command.DEVICE_RESET)
    if device.migration_flags and (state := device.get_state()) is not DeviceState.RUNNING:
        raise Failure(f"after a reset the device is in {state.name}")
