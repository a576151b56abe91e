"""Messages as such: headers, sizes, pieces, and what belongs to no command."""

from __future__ import annotations

import os
import struct
import time

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import Device
from common.conformance.lab import Lab
from common.conformance.probe import Hung, Lost, name_of_error
from common.vfio import feature as vfio
from common.vfio.feature import DeviceFeature
from common.vfio_user.codec import FEATURE_SIZE, FLAG_NO_REPLY, HEADER_SIZE, Command, Feature, Header, MigData
from common.vfio_user.description import DeviceInfo

_INFO = DeviceInfo().pack()
_LARGE_ROUNDS = 8

# Bytes of the fixed part of each command's body.
_FIXED_PARTS = {
    Command.DMA_MAP: 32,
    Command.DMA_UNMAP: 24,
    Command.DEVICE_GET_INFO: 16,
    Command.DEVICE_GET_REGION_INFO: 32,
    Command.DEVICE_GET_REGION_IO_FDS: 16,
    Command.DEVICE_GET_IRQ_INFO: 16,
    Command.DEVICE_SET_IRQS: 20,
    Command.REGION_READ: 16,
    Command.REGION_WRITE: 16,
    Command.DEVICE_FEATURE: 8,
    Command.MIG_DATA_READ: 8,
    Command.MIG_DATA_WRITE: 8,
}

# Bytes of the fixed part of the payload of features that are set, or got with a question.
_FEATURE_PARTS = {
    (DeviceFeature.MIG_DEVICE_STATE, vfio.FEATURE_SET): 8,
    (DeviceFeature.DMA_LOGGING_START, vfio.FEATURE_SET): 16,
    (DeviceFeature.DMA_LOGGING_REPORT, vfio.FEATURE_GET): 24,
}


def _still_answers(device: Device, after: str) -> None:
    """Insist that the conversation goes on."""
    try:
        device.accepted(Command.DEVICE_GET_INFO, _INFO)
    except Failure as error:
        raise Failure(f"after {after}: {error}") from None
    except (Lost, Hung) as error:
        raise type(error)(f"after {after}: {error}") from None


@check("A reply carries the id and the command of what it answers, whatever the id is; ids may repeat.")
def message_ids(lab: Lab) -> None:
    """Use ids from both ends, and one twice."""
    device = lab.device()
    for message_id in (0, 0xFFFF, 0xFFFF, 1):
        device.send(Command.DEVICE_GET_INFO, _INFO, message_id=message_id)
        reply = device.receive()
        if (reply.header.message_id, reply.header.command) != (message_id, Command.DEVICE_GET_INFO):
            raise Failure(f"id {message_id} is answered with id {reply.header.message_id}")


@check("Commands are answered in the order in which they came, also where several come before the first answer.")
def order(lab: Lab) -> None:
    """Send several commands at once."""
    device = lab.device()
    messages = [Header(number, Command.DEVICE_GET_INFO, HEADER_SIZE + len(_INFO)).pack() + _INFO for number in range(8)]
    device.send_bytes(b"".join(messages))
    ids = [device.receive().header.message_id for _ in messages]
    if ids != list(range(len(messages))):
        raise Failure(f"commands 0 to {len(messages) - 1} are answered in the order {ids}")


@check("A command with NO_REPLY is never answered, not even with a refusal.")
def no_reply(lab: Lab) -> None:
    """Send one that can be carried out, and one that cannot."""
    device = lab.device()
    for number, body in ((1, _INFO), (2, b"\0" * 16)):
        device.send(Command.DEVICE_GET_INFO, body, message_id=number, flags=FLAG_NO_REPLY)
    device.send(Command.DEVICE_GET_INFO, _INFO, message_id=3)
    reply = device.receive()
    if reply.header.message_id != 3:
        raise Failure(f"the command {reply.header.message_id} with NO_REPLY is answered")


@check("A command that is not known is refused, and the conversation goes on.")
def unknown_command(lab: Lab) -> str:
    """Send commands that never were, and one that is gone."""
    device = lab.device()
    errors = {device.refused(f"command {number}", number, b"\0" * 16) for number in (0, 14, 99, 0xFFFF)}
    _still_answers(device, "unknown commands")
    return f"refused with {', '.join(sorted(map(name_of_error, errors)))}"


@check("A body that is shorter than the fixed part of its command is refused before anything is done with it.")
def short_body(lab: Lab) -> None:
    """Send each command with the first bytes of its body only."""
    device = lab.device()
    for command, size in _FIXED_PARTS.items():
        for length in (4, size - 1):
            body = struct.pack("<I", size) + bytes(size)
            try:
                device.refused(f"{command.name} with a body of {length} of {size} bytes", command, body[:length])
            except (Lost, Hung) as error:
                raise type(error)(f"{command.name} with a body of {length} of {size} bytes: {error}") from None
    _still_answers(device, "short bodies")


@check("A DEVICE_FEATURE whose payload is shorter than its feature's is refused before anything is done with it.")
def short_feature(lab: Lab) -> None:
    """Set and get features whose payload is missing, with an argsz that claims that it is there."""
    device = lab.device()
    device.need_migration()
    for (number, operation), size in _FEATURE_PARTS.items():
        if number is not DeviceFeature.MIG_DEVICE_STATE and not device.logging:
            continue
        for length in (0, size - 4):
            request = Feature(FEATURE_SIZE + size + 64, number | operation).pack() + bytes(length)
            device.refused(f"{number.name} with a payload of {length} of {size} bytes", Command.DEVICE_FEATURE, request)
    _still_answers(device, "short payloads")


@check("A message whose size is below that of a header is refused, or ends the conversation, and nothing more.")
def size_below_header(lab: Lab) -> str:
    """Claim 8 bytes."""
    return _bad_header(lab, "a message that claims 8 bytes", Header(7, Command.DEVICE_GET_INFO, 8))


@check("A message whose size is beyond every limit is refused, or ends the conversation; it is not waited for.")
def size_above_limit(lab: Lab) -> str:
    """Claim 2 GiB."""
    return _bad_header(lab, "a message that claims 2 GiB", Header(7, Command.DEVICE_GET_INFO, 0x7FFF_FFFF))


@check("What is neither command nor reply is refused, or ends the conversation, and nothing more.")
def message_type(lab: Lab) -> str:
    """Send a message of type 2."""
    header = Header(7, Command.DEVICE_GET_INFO, HEADER_SIZE + len(_INFO), 0x2)
    return _bad_header(lab, "a message of type 2", header, _INFO)


def _bad_header(lab: Lab, what: str, header: Header, body: bytes = b"") -> str:
    device = lab.device()

    def answer() -> int:
        device.send_bytes(header.pack() + body)
        lab.transcript.sent = f"{what}: {header.pack().hex()}{body.hex()}"
        return device.receive().error

    return lab.refused_or_closed(what, answer)


@check("A connection is a stream of bytes: a message that comes in pieces is a message.")
def pieces(lab: Lab) -> None:
    """Send a header in two pieces, then the body in two."""
    device = lab.device()
    message = Header(7, Command.DEVICE_GET_INFO, HEADER_SIZE + len(_INFO)).pack() + _INFO
    lab.transcript.sent = "DEVICE_GET_INFO in pieces of 5, 11, 6 and 10 bytes"
    for piece in (message[:5], message[5:16], message[16:22], message[22:]):
        device.send_bytes(piece)
        time.sleep(0.02)
    reply = device.receive()
    if reply.error:
        raise Failure(f"a message in pieces is refused: {name_of_error(reply.error)}")
    _still_answers(device, "a message in pieces")


@check("A message may be as large as the server's max_data_xfer_size says, also if the socket gives it out in parts.")
def large_messages(lab: Lab) -> str:
    """Send as much data as is allowed, in a state in which it is refused: all of it has to be taken off the stream."""
    device = lab.device()
    size = device.max_transfer
    for number in range(_LARGE_ROUNDS):
        what = f"MIG_DATA_WRITE number {number + 1} of {size} bytes"
        try:
            device.ask(Command.MIG_DATA_WRITE, MigData(size).pack(), bytes(size))
        except Failure as error:
            raise Failure(f"{what}: {error}: its data are taken for messages") from None
        except (Lost, Hung) as error:
            raise type(error)(f"{what}: {error}") from None
        _still_answers(device, what)
    return f"{_LARGE_ROUNDS} messages of {size} bytes"


@check("Descriptors that a command has no use for do no harm.")
def surplus_descriptors(lab: Lab) -> str:
    """Send two with a command that takes none."""
    device = lab.device()
    read_end, write_end = os.pipe()
    try:
        error = device.ask(Command.DEVICE_GET_INFO, _INFO, fds=[read_end, write_end]).error
    finally:
        os.close(write_end)
    try:
        _still_answers(device, "surplus descriptors")
        os.set_blocking(read_end, False)
        # The end of the pipe comes when its last writer is closed: ours is.
        if _kept_open(read_end):
            raise Unknown("the server keeps the descriptors open, or closes them later")
    finally:
        os.close(read_end)
    return f"refused with {name_of_error(error)}" if error else "passed over and closed"


def _kept_open(read_end: int) -> bool:
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            return bool(os.read(read_end, 1))
        except BlockingIOError:
            time.sleep(0.01)
    return True
