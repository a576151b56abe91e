"""What remains of a client that has gone."""

from __future__ import annotations

from common.conformance.check import Failure, check
from common.conformance.lab import Lab
from common.conformance.memory import AREA, FIRST
from common.vfio.migration import DeviceState
from common.vfio_user.codec import HEADER_SIZE, Command, Header
from common.vfio_user.description import DeviceInfo


@check("A server outlives its client, and serves the next one.")
def next_client(lab: Lab) -> None:
    """Connect, go, connect again."""
    lab.device()
    device = lab.again()
    device.negotiate()
    device.accepted(Command.DEVICE_GET_INFO, DeviceInfo().pack())


@check("A client that goes in the midst of a message does no harm.")
def half_a_message(lab: Lab) -> None:
    """Send half of one, go, connect again."""
    device = lab.device()
    device.send_bytes(Header(7, Command.DEVICE_GET_INFO, HEADER_SIZE + 16).pack() + bytes(4))
    device = lab.again()
    device.negotiate()
    device.accepted(Command.DEVICE_GET_INFO, DeviceInfo().pack())


@check("A client that goes before it has negotiated does no harm.")
def silent_client(lab: Lab) -> None:
    """Connect, say nothing, go, connect again."""
    lab.connect()
    device = lab.again()
    device.negotiate()
    device.accepted(Command.DEVICE_GET_INFO, DeviceInfo().pack())


@check("The next client finds the device in RUNNING, whatever state the last one left it in.")
def state_of_the_next(lab: Lab) -> None:
    """Go while the device is in STOP, connect again."""
    device = lab.device()
    device.need_migration()
    device.set_state(DeviceState.STOP)
    device = lab.again()
    device.negotiate()
    device.look()
    if device.state is not DeviceState.RUNNING:
        raise Failure(f"the next client finds the device in {device.state.name}")


@check("The log of DMA goes with the client that started it: the next one starts its own.")
def log_of_the_next(lab: Lab) -> None:
    """Go while the log runs, connect again, and start it again."""
    device = lab.device()
    device.need_logging()
    device.map_both(lab.memory())
    device.start_logging()
    device = lab.again()
    device.negotiate()
    device.look()
    device.map_both(lab.memory())
    device.start_logging()
    device.report(FIRST, AREA)


@check("Mappings go with the client that made them: the next one maps the same addresses.")
def mappings_of_the_next(lab: Lab) -> None:
    """Go with memory mapped, connect again, and map it again."""
    device = lab.device()
    device.map_both(lab.memory())
    device = lab.again()
    device.negotiate()
    device.look()
    device.map_both(lab.memory())
