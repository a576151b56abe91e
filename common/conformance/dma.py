"""Memory that is mapped for DMA."""

from __future__ import annotations

import time

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import Device
from common.conformance.lab import Lab
from common.conformance.memory import AREA, FIRST, PAGE, SECOND
from common.conformance.probe import name_of_error
from common.vfio.feature import Buffer
from common.vfio_user.codec import DMA_READABLE, DMA_WRITABLE, UNMAP_ALL, Command, DmaMap, DmaUnmap
from common.vfio_user.description import DeviceInfo
from common.vfio_user.transport import Message

_BOTH = DMA_READABLE | DMA_WRITABLE
_MANY = 64
_SMALL_TRANSFER = 1024


def _unmap(device: Device, flags: int, iova: int, size: int) -> int:
    return device.ask(Command.DMA_UNMAP, DmaUnmap(flags, iova, size).pack()).error


@check("DMA_MAP takes memory with its descriptor, or without one; DMA_UNMAP takes it away and repeats the request.")
def map_and_unmap(lab: Lab) -> None:
    """Map and unmap, twice."""
    device, memory = lab.device(), lab.memory()
    for shared in (True, False, True):
        memory.shared = shared
        device.map_area(memory, FIRST)
        request = DmaUnmap(0, FIRST, AREA).pack()
        if device.accepted(Command.DMA_UNMAP, request).body[: len(request)] != request:
            raise Failure("the reply to DMA_UNMAP does not repeat the request")


@check("A device has many mappings at a time.")
def many_mappings(lab: Lab) -> str:
    """Map single pages with gaps between them."""
    device, memory = lab.device(), lab.memory()
    for number in range(_MANY):
        body = DmaMap(_BOTH, number * PAGE, FIRST + 2 * number * PAGE, PAGE).pack()
        device.accepted(Command.DMA_MAP, body, fds=[memory.fd])
    for number in range(_MANY):
        device.accepted(Command.DMA_UNMAP, DmaUnmap(0, FIRST + 2 * number * PAGE, PAGE).pack())
    return f"{_MANY} mappings"


@check("DMA_UNMAP names a mapping exactly: what is not mapped, and part of a mapping, are refused.")
def unmap_exactly(lab: Lab) -> None:
    """Unmap nothing, the first half, and the middle."""
    device, memory = lab.device(), lab.memory()
    if not _unmap(device, 0, FIRST, AREA):
        raise Failure("an unmap of what is not mapped is not refused")
    device.map_area(memory, FIRST)
    for what, iova, size in (
        ("the first half of a mapping", FIRST, AREA // 2),
        ("the middle of a mapping", FIRST + PAGE, PAGE),
        ("more than a mapping", FIRST, 2 * AREA),
    ):
        if not _unmap(device, 0, iova, size):
            raise Failure(f"an unmap of {what} is not refused")
    device.unmap_area(FIRST)


@check("DMA_UNMAP with ALL takes everything away; it has no range.")
def unmap_all(lab: Lab) -> None:
    """Map two areas, unmap all, and map them again."""
    device, memory = lab.device(), lab.memory()
    device.map_both(memory)
    if not _unmap(device, UNMAP_ALL, FIRST, AREA):
        raise Failure("DMA_UNMAP with ALL and a range is not refused")
    if error := _unmap(device, UNMAP_ALL, 0, 0):
        raise Failure(f"DMA_UNMAP with ALL is refused: {name_of_error(error)}")
    if not _unmap(device, 0, SECOND, AREA):
        raise Failure("after DMA_UNMAP with ALL a mapping is still there")
    device.map_both(memory)


@check("Mappings do not overlap: one that would is refused, and the earlier one stays.")
def overlap(lab: Lab) -> str:
    """Map over the end of a mapping, inside it, and once more the same."""
    device, memory = lab.device(), lab.memory()
    device.map_area(memory, FIRST)
    for what, iova, size in (("over the end of", FIRST + AREA - PAGE, AREA), ("inside", FIRST + PAGE, PAGE)):
        body = DmaMap(_BOTH, 0, iova, size).pack()
        device.refused(f"a mapping {what} another", Command.DMA_MAP, body, fds=[memory.fd])
    same = device.ask(Command.DMA_MAP, DmaMap(_BOTH, 0, FIRST, AREA).pack(), fds=[memory.fd]).error
    device.unmap_area(FIRST)
    return f"the same once more: {name_of_error(same) if same else 'accepted'}"


@check("DMA_MAP names a range of addresses: one without size, or beyond 2^64, or with unknown flags, is refused.")
def invalid_mappings(lab: Lab) -> None:
    """Map such."""
    device, memory = lab.device(), lab.memory()
    for what, body in (
        ("without size", DmaMap(_BOTH, 0, FIRST, 0)),
        ("beyond 2^64", DmaMap(_BOTH, 0, (1 << 64) - PAGE, 2 * PAGE)),
        ("with unknown flags", DmaMap(0x8000_0000 | _BOTH, 0, FIRST, AREA)),
    ):
        device.refused(f"a mapping {what}", Command.DMA_MAP, body.pack(), fds=[memory.fd])


@check(
    "DMA to memory without a descriptor goes by DMA_READ and DMA_WRITE, which stay inside what is mapped, say how much "
    "they carry, and carry no more than the client's max_data_xfer_size."
)
def by_message(lab: Lab) -> str:
    """Have the device write by message, to a client that takes 1 KiB at a time."""
    device = lab.device(max_transfer=_SMALL_TRANSFER)
    memory = lab.memory()
    memory.shared = False
    exerciser = lab.exerciser(device, memory)
    exerciser.begin()
    exerciser.finish()
    if memory.wrong:
        raise Failure(memory.wrong[0])
    if not memory.by_message:
        raise Unknown("the device did its DMA without messages")
    if memory.largest_message > _SMALL_TRANSFER:
        raise Failure(f"a message with {memory.largest_message} bytes, the client takes {_SMALL_TRANSFER}")
    return f"{len(memory.by_message)} pages by message"


@check("Commands of both sides may cross: a server that waits for the answer to its own takes the client's meanwhile.")
def crossing(lab: Lab) -> None:
    """Ask for the device's description when a DMA message comes, and answer that one afterwards."""
    device, memory = lab.device(), lab.memory()
    memory.shared = False
    exerciser = lab.exerciser(device, memory)
    asked: list[int] = []

    def serve(command: Message) -> Buffer:
        if not asked:
            asked.append(device.send(Command.DEVICE_GET_INFO, DeviceInfo().pack()))
        return memory.serve(command)

    device.on_command = serve
    exerciser.begin()
    end = time.monotonic() + lab.limits.answer
    while not asked:
        if time.monotonic() > end:
            raise Unknown("the device did its DMA without messages")
        device.pump(0.1)
    reply = device.receive()
    if reply.error or (reply.header.message_id, reply.header.command) != (asked[0], Command.DEVICE_GET_INFO):
        raise Failure("the command that crossed one of the server is answered wrongly")
    exerciser.finish()
