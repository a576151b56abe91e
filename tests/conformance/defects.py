"""A wrong server for every check, by the check's name, and further ones for sentences that say several things."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace

from wrong_server import Answer, Defect, Proceed, Reply, WrongServer

from common.conformance.memory import AREA, FIRST, PAGE, SECOND
from common.datasheets import pci
from common.devices.base import EmulatedDevice
from common.vfio import feature as vfio
from common.vfio.feature import DeviceFeature, LoggingReport
from common.vfio.migration import DeviceState
from common.vfio_user import codec
from common.vfio_user.capabilities import MAX_TRANSFER
from common.vfio_user.codec import Command, Header, MigData
from common.vfio_user.description import IoEventFd, RegionFlags, RegionInfo, pack_io_fds
from common.vfio_user.transport import Message

Test = Callable[[WrongServer, Message], bool]
S = DeviceState


# Which commands


def command(number: int) -> Test:
    return lambda _server, message: message.header.command == number


def all_of(*tests: Test) -> Test:
    return lambda server, message: all(test(server, message) for test in tests)


def word(offset: int, value: int) -> Test:
    """The 32-bit word at an offset of the body has a value."""
    return lambda _server, message: bytes(message.body[offset : offset + 4]) == struct.pack("<I", value)


def qword(offset: int, value: int) -> Test:
    return lambda _server, message: bytes(message.body[offset : offset + 8]) == struct.pack("<Q", value)


def longer(size: int) -> Test:
    return lambda _server, message: len(message.body) > size


def in_state(*states: DeviceState) -> Test:
    return lambda server, _message: server.device.get_state() in states


def feature(number: int, operation: int) -> Test:
    return all_of(command(Command.DEVICE_FEATURE), word(4, number | operation))


def sets(state: int) -> Test:
    return all_of(feature(DeviceFeature.MIG_DEVICE_STATE, vfio.FEATURE_SET), word(8, state))


REPORT = feature(DeviceFeature.DMA_LOGGING_REPORT, vfio.FEATURE_GET)
START = feature(DeviceFeature.DMA_LOGGING_START, vfio.FEATURE_SET)


# What is done with them


def obliging(test: Test, body: bytes | None = b"") -> Answer:
    """Answer with a body, None for the request's own, what should be refused."""

    def answer(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
        chosen = test(server, message)
        try:
            return proceed(message)
        except (OSError, ValueError):
            if not chosen:
                raise
            return [message.body if body is None else body], ()

    return answer


def pretending(test: Test, body: bytes = b"") -> Answer:
    """Answer with a body, and do nothing."""
    return lambda server, message, proceed: ([body], ()) if test(server, message) else proceed(message)


def refusing(test: Test, error: int = errno.EINVAL) -> Answer:
    def answer(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
        if test(server, message):
            raise OSError(error, "told to")
        return proceed(message)

    return answer


def hanging(test: Test) -> Answer:
    def answer(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
        if test(server, message):
            server.hang()
        return proceed(message)

    return answer


def hanging_up(test: Test) -> Answer:
    return lambda server, message, proceed: server.hang_up() if test(server, message) else proceed(message)


def mangling(test: Test, change: Callable[[bytes], bytes]) -> Answer:
    """Change the body of the answer."""

    def answer(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
        chosen = test(server, message)
        parts, fds = proceed(message)
        return ([change(b"".join(map(bytes, parts)))], fds) if chosen else (parts, fds)

    return answer


def first(act: Callable[[WrongServer], None], test: Test) -> Answer:
    """Do something to the server before a command is carried out."""

    def answer(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
        if test(server, message):
            act(server)
        return proceed(message)

    return answer


def then(act: Callable[[WrongServer], None], test: Test) -> Answer:
    """Do something to the server after a command was carried out."""

    def answer(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
        chosen = test(server, message)
        reply = proceed(message)
        if chosen:
            act(server)
        return reply

    return answer


def patched(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda body: body[:offset] + data + body[offset + len(data) :]


def bitmap_of(byte: bytes, start: int) -> Callable[[bytes], bytes]:
    """Fill the bitmap that begins at `start`."""
    return lambda body: body[:start] + byte * (len(body) - start)


REPORTED = codec.FEATURE_SIZE + LoggingReport.SIZE
UNMAPPED = 40


# Below the commands: how a server reads and writes


def replies(change: Callable[[WrongServer, Message], Message]) -> Callable[[WrongServer], None]:
    def install(server: WrongServer) -> None:
        reply = server.connection.reply

        def wrong(message: Message, parts=(), fds=(), *, error: int = 0) -> None:  # type: ignore[no-untyped-def]
            reply(change(server, message), parts, fds, error=error)

        server.connection.reply = wrong  # type: ignore[method-assign]

    return install


def with_header(**fields: int) -> Callable[[WrongServer, Message], Message]:
    return lambda _server, message: Message(message.header._replace(**fields), message.body)


def reversed_pairs(server: WrongServer) -> None:
    """Answer the commands 0 and 1 in the other order."""
    reply = server.connection.reply
    held: list[tuple[Message, object]] = []

    def wrong(message: Message, parts=(), fds=(), *, error: int = 0) -> None:  # type: ignore[no-untyped-def]
        if message.header.message_id == 0:
            held.append((message, parts))
            return
        reply(message, parts, fds, error=error)
        while held:
            earlier, body = held.pop()
            reply(earlier, body)  # type: ignore[arg-type]

    server.connection.reply = wrong  # type: ignore[method-assign]


def impatient(server: WrongServer) -> None:
    """Take what comes first for the whole header."""
    connection = server.connection
    look_through = connection._look_through

    def wrong() -> Message | None:
        if connection._filled < 16:
            raise connection._lose("short read")
        return look_through()

    connection._look_through = wrong  # type: ignore[method-assign]


def short_sighted(server: WrongServer) -> None:
    """Take no more of a body than 64 KiB, and the rest for messages."""
    connection = server.connection
    look_through = connection._look_through

    def wrong() -> Message | None:
        reply = look_through()
        if connection._large is not None:
            connection._body = connection._body[:65536]
        return reply

    connection._look_through = wrong  # type: ignore[method-assign]


def easy_going(test: Callable[[Header], bool], *, hang: bool = False) -> Callable[[WrongServer], None]:
    """Answer messages with such headers as if they were right, or wait for what they promise."""

    def install(server: WrongServer) -> None:
        connection = server.connection
        read = connection._read

        def wrong(flags: int) -> Message | None:
            peeked = b"" if connection._filled else server.sock.recv(16, socket.MSG_PEEK)
            if len(peeked) == 16 and test(header := Header(*struct.unpack("<HHIII", peeked))):
                server.sock.recv(max(16, min(header.size, 4096)))
                if hang:
                    server.hang()
                with contextlib.suppress(BrokenPipeError):
                    server.sock.sendall(Header(header.message_id, header.command, 16, 1).pack())
                return None
            return read(flags)

        connection._read = wrong  # type: ignore[method-assign]

    return install


def taking_no_commands(server: WrongServer) -> None:
    """Take whatever comes for the reply that is waited for."""
    connection = server.connection
    read = connection._read_reply

    def wrong(flags: int = 0) -> Message | None:
        reply = read(flags)
        if connection._queue:  # also if the reply came right behind it
            raise connection._lose("a command came instead of a reply")
        return reply

    connection._read_reply = wrong  # type: ignore[method-assign]


# Single ones


def region_with_file(size: int, content: bytes = b"") -> Callable[[WrongServer], None]:
    """Give region 2 a file of its contents, which begin otherwise where `content` is given."""

    def install(server: WrongServer) -> None:
        fd = os.memfd_create("bar")
        os.pwrite(fd, server.device.region_read(2, 0, size), 0)
        os.pwrite(fd, content, 0)
        server.fds.append(fd)
        flags = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
        server.device.regions[2] = RegionInfo(2, flags, 0x1000, fd=fd)  # type: ignore[index]

    return install


def stray_eventfd(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
    if message.header.command != Command.DEVICE_GET_REGION_IO_FDS:
        return proceed(message)
    body, fds = pack_io_fds(0, 4096, [IoEventFd(0x20000, 4, server.sock.fileno())])
    return [body], fds


def without_offset(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
    """Read every region from its begin."""
    if message.header.command != Command.REGION_READ:
        return proceed(message)
    message.body = bytes(8) + bytes(message.body[8:])
    return proceed(message)


def few_mappings(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
    if message.header.command == Command.DMA_MAP:
        server.memory["mappings"] = server.memory.get("mappings", 0) + 1
        if server.memory["mappings"] > 32:
            raise OSError(errno.ENOSPC, "full")
    return proceed(message)


def large_transfers(server: WrongServer) -> None:
    if server._client is not None:
        server._client = replace(server._client, max_data_xfer_size=MAX_TRANSFER)


def never_ending(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
    parts, fds = proceed(message)
    if message.header.command != Command.MIG_DATA_READ:
        return parts, fds
    if MigData.unpack(parts[0]).size:
        return parts, fds
    if not server.memory.setdefault("ended", False):
        server.memory["ended"] = True
        return parts, fds
    return [MigData(1).pack(), b"x", bytes(len(parts[2]) - 1)], fds


def losing_odd_bytes(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
    """Give out words, and lose what was asked for beyond them."""
    parts, fds = proceed(message)
    if message.header.command != Command.MIG_DATA_READ:
        return parts, fds
    whole = MigData.unpack(parts[0]).size & ~3
    return [MigData(whole).pack(), *parts[1:]], fds


def begin_again(server: WrongServer) -> None:
    """Begin the stream again when pre-copy ends."""
    server.device.set_state(S.RUNNING)


def forget_report(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
    """Take the bits before looking whether there is room for them."""
    if REPORT(server, message):
        report = LoggingReport.unpack(message.body[8:])
        if struct.unpack("<I", message.body[:4])[0] < REPORTED + 8:
            server.device.logging_report(report.iova, report.length, report.page_size)
    return proceed(message)


def ignoring_stop(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
    if feature(DeviceFeature.DMA_LOGGING_STOP, vfio.FEATURE_SET)(server, message):
        return [message.body], ()
    return obliging(START, None)(server, message, proceed)


def forget(server: WrongServer) -> None:
    server.device._log.discard(FIRST, 2 * AREA)


def losing_the_log(server: WrongServer, message: Message, proceed: Proceed) -> Reply:
    """Stop the log when it is started twice."""
    if START(server, message) and server.device._log.active:
        server.device.logging_stop()
        raise OSError(errno.EINVAL, "started already")
    return proceed(message)


def log_no_more(server: WrongServer) -> None:
    server.device.dma.logging = False


def write_to_the_first_area(device: EmulatedDevice) -> None:
    write = device.dma.write
    device.dma.write = lambda iova, *rest, **named: write(  # type: ignore[method-assign]
        iova - AREA if iova >= SECOND else iova, *rest, **named
    )


def write_late(server: WrongServer) -> None:
    if server.device.get_state() is S.STOP:
        server.device.dma.write(SECOND, b"late")


def stop(server: WrongServer) -> None:
    server.device.set_state(S.STOP)


def reset(server: WrongServer) -> None:
    server.device.reset()


def lenient(device: EmulatedDevice) -> None:
    device._migration._load = lambda _loading: None  # type: ignore[method-assign]


def not_loading(device: EmulatedDevice) -> None:
    device.load_state = lambda _state: None  # type: ignore[method-assign]


def odd_write(_server: WrongServer, message: Message) -> bool:
    return message.header.command == Command.MIG_DATA_WRITE and (len(message.body) - 8) % 4 != 0


def later(server: WrongServer, _message: Message) -> bool:
    return server.number > 0


def probe_of(number: int, operation: int) -> Test:
    return feature(number, operation | vfio.FEATURE_PROBE)


def arc(start: DeviceState, target: DeviceState) -> Test:
    return all_of(in_state(start), sets(target))


VERSION = command(Command.VERSION)
NEGOTIATED = obliging(VERSION, struct.pack("<HH", 0, 2))
HUNG_S = 0.5

DEFECTS: dict[str, Defect] = {
    "negotiation.version": Defect("answered with 3", mangling(VERSION, patched(2, b"\x03"))),
    "negotiation.older-client": Defect("answered with 2", mangling(VERSION, patched(2, b"\x02"))),
    "negotiation.major-version": Defect("major version 1 is not refused", NEGOTIATED),
    "negotiation.no-capabilities": Defect(
        "VERSION is refused", refusing(all_of(VERSION, lambda _s, m: len(m.body) == 4))
    ),
    "negotiation.unknown-capability": Defect(
        "VERSION is refused", refusing(all_of(VERSION, lambda _s, m: b"perhaps" in bytes(m.body)))
    ),
    "negotiation.no-json": Defect("half a JSON object is not refused", NEGOTIATED),
    "negotiation.version-first": Defect("is not refused", obliging(command(Command.DEVICE_GET_INFO), bytes(16))),
    "messages.message-ids": Defect(
        "answered with id 65534",
        install=replies(
            lambda _s, m: m if m.header.message_id != 0xFFFF else Message(m.header._replace(message_id=0xFFFE), m.body)
        ),
    ),
    "messages.order": Defect("in the order [1, 0", install=reversed_pairs),
    "messages.no-reply": Defect("with NO_REPLY is answered", install=replies(with_header(flags=0))),
    "messages.unknown-command": Defect("command 99 is not refused", obliging(command(99))),
    "messages.short-body": Defect("DMA_MAP with a body of 4 of 32 bytes", obliging(command(Command.DMA_MAP))),
    "messages.short-feature": Defect(
        "MIG_DEVICE_STATE with a payload of 0 of 8 bytes",
        obliging(feature(DeviceFeature.MIG_DEVICE_STATE, vfio.FEATURE_SET), None),
    ),
    "messages.size-below-header": Defect("8 bytes is not refused", install=easy_going(lambda header: header.size < 16)),
    "messages.size-above-limit": Defect(
        "hangs", install=easy_going(lambda header: header.size > 1 << 30, hang=True), patience=HUNG_S
    ),
    "messages.message-type": Defect("of type 2 is not refused", install=easy_going(lambda header: header.flags == 2)),
    "messages.pieces": Defect("closed the connection", install=impatient),
    "messages.large-messages": Defect("MIG_DATA_WRITE number 1", install=short_sighted),
    "messages.surplus-descriptors": Defect("closed the connection", hanging_up(lambda _s, m: len(m.fds) > 1)),
    "description.device-info": Defect(
        "with 3 regions", mangling(command(Command.DEVICE_GET_INFO), patched(8, b"\x03"))
    ),
    "description.argsz": Defect("argsz 4 is not refused", obliging(command(Command.DEVICE_GET_IRQ_INFO), bytes(16))),
    "description.region-info": Defect(
        "region 3 is asked for, and 5 described",
        mangling(all_of(command(Command.DEVICE_GET_REGION_INFO), word(8, 3)), patched(8, b"\x05")),
    ),
    "description.region-files": Defect("has 2048 bytes", install=region_with_file(0x800)),
    "description.irq-info": Defect(
        "interrupt 2 is asked for, and 3 described",
        mangling(all_of(command(Command.DEVICE_GET_IRQ_INFO), word(8, 2)), patched(8, b"\x03")),
    ),
    "description.indices": Defect(
        "region 4294967295 of 9 is not refused",
        obliging(all_of(command(Command.DEVICE_GET_REGION_INFO), word(8, 0xFFFF_FFFF)), bytes(32)),
    ),
    "description.io-fds": Defect("outside of it", stray_eventfd),
    "regions.bounds": Defect(
        "across the end is not refused", obliging(all_of(command(Command.REGION_WRITE), qword(0, 254)))
    ),
    "regions.write-length": Defect("is not refused", obliging(command(Command.REGION_WRITE))),
    "regions.configuration": Defect(
        "1 bytes at 0x1", mangling(all_of(command(Command.REGION_READ), qword(0, 1)), patched(16, b"\x99"))
    ),
    "regions.parts-of-regions": Defect("its second half", without_offset),
    "interrupts.eventfd": Defect(
        "was not signalled",
        pretending(all_of(command(Command.DEVICE_SET_IRQS), word(4, 0x21), word(16, 1))),
        patience=HUNG_S,
    ),
    "interrupts.invalid": Defect(
        "two kinds of data is not refused", obliging(all_of(command(Command.DEVICE_SET_IRQS), word(4, 0x23)))
    ),
    "interrupts.reset": Defect("DEVICE_RESET is refused", refusing(command(Command.DEVICE_RESET))),
    "dma.map-and-unmap": Defect("does not repeat", mangling(command(Command.DMA_UNMAP), lambda _body: b"")),
    "dma.many-mappings": Defect("DMA_MAP is refused: ENOSPC", few_mappings),
    "dma.unmap-exactly": Defect(
        "the middle of a mapping", obliging(all_of(command(Command.DMA_UNMAP), qword(16, 4096)), None)
    ),
    "dma.unmap-all": Defect("still there", pretending(all_of(command(Command.DMA_UNMAP), word(4, 2), qword(16, 0)))),
    "dma.overlap": Defect("inside another is not refused", obliging(all_of(command(Command.DMA_MAP), qword(24, 4096)))),
    "dma.invalid-mappings": Defect(
        "beyond 2^64 is not refused", obliging(all_of(command(Command.DMA_MAP), qword(24, 8192)))
    ),
    "dma.by-message": Defect("the client takes 1024", then(large_transfers, VERSION)),
    "dma.crossing": Defect("closed the connection", install=taking_no_commands),
    "states.flags": Defect(
        "without STOP_COPY",
        mangling(feature(DeviceFeature.MIGRATION, vfio.FEATURE_GET), patched(8, b"\x06")),
    ),
    "states.probe": Defect(
        "to set is not refused", obliging(probe_of(DeviceFeature.MIGRATION, vfio.FEATURE_SET), None)
    ),
    "states.feature-requests": Defect(
        "GET and SET is not refused",
        obliging(feature(DeviceFeature.MIG_DEVICE_STATE, vfio.FEATURE_GET | vfio.FEATURE_SET), None),
    ),
    "states.initial": Defect("begins in STOP", then(stop, VERSION)),
    "states.no-such-state": Defect("state 8 is not refused", obliging(sets(8), None)),
    "states.from-stop": Defect("to RESUMING", refusing(arc(S.STOP, S.RESUMING))),
    "states.from-running": Defect("to RUNNING_P2P", refusing(arc(S.RUNNING, S.RUNNING_P2P))),
    "states.from-stop-copy": Defect(
        "STOP_COPY to PRE_COPY is not refused", obliging(arc(S.STOP_COPY, S.PRE_COPY), None)
    ),
    "states.from-resuming": Defect("to PRE_COPY", refusing(arc(S.RESUMING, S.PRE_COPY))),
    "states.from-running-p2p": Defect("to STOP_COPY", refusing(arc(S.RUNNING_P2P, S.STOP_COPY))),
    "states.from-pre-copy": Defect("to STOP", pretending(arc(S.PRE_COPY, S.STOP), bytes(16))),
    "states.from-pre-copy-p2p": Defect("closed the connection", hanging_up(arc(S.PRE_COPY_P2P, S.RUNNING))),
    "states.data-in-other-states": Defect(
        "MIG_DATA_READ in RUNNING", obliging(command(Command.MIG_DATA_READ), MigData(0).pack() + bytes(64))
    ),
    "states.stopped-access": Defect(
        "REGION_READ is refused", refusing(all_of(in_state(S.STOP), command(Command.REGION_READ)))
    ),
    "states.pre-copy-is-patient": Defect(
        "MIG_DATA_READ is refused: EAGAIN",
        refusing(
            all_of(
                in_state(S.PRE_COPY),
                command(Command.MIG_DATA_READ),
                lambda s, _m: not s.device.precopy_info().initial_bytes,
            ),
            errno.EAGAIN,
        ),
    ),
    "states.feature-answers": Defect(
        "for feature",
        mangling(all_of(feature(DeviceFeature.MIGRATION, vfio.FEATURE_GET), word(0, 72)), patched(4, b"\x09")),
    ),
    "migration-data.read-to-the-end": Defect("after the end 1 more", never_ending),
    "migration-data.read-limits": Defect(
        "2 GiB is not refused", obliging(command(Command.MIG_DATA_READ), MigData(0).pack())
    ),
    "migration-data.write-length": Defect("is not refused", obliging(command(Command.MIG_DATA_WRITE))),
    "migration-data.reload": Defect("region 0 differs at 0x", device=not_loading),
    "migration-data.move": Defect("region 0 differs at 0x", device=not_loading),
    "migration-data.move-with-pre-copy": Defect("STOP is refused", first(begin_again, arc(S.PRE_COPY, S.STOP_COPY))),
    "migration-data.other-pieces": Defect("MIG_DATA_WRITE is refused", refusing(odd_write)),
    "migration-data.read-in-pieces": Defect("STOP is refused", losing_odd_bytes),
    "migration-data.cancel-pre-copy": Defect("region 0 differs at 0x", then(reset, arc(S.PRE_COPY, S.RUNNING))),
    "migration-data.cancel-stop-copy": Defect("region 0 differs at 0x", then(reset, arc(S.STOP, S.RUNNING))),
    "migration-data.truncated-data": Defect("are taken for a state", device=lenient),
    "migration-data.truncated-pre-copy": Defect("are taken for a state", device=lenient),
    "migration-data.senseless-data": Defect("closed the connection", hanging_up(arc(S.RESUMING, S.STOP))),
    "dirty-logging.features": Defect(
        "DMA_LOGGING_REPORT is not there", refusing(probe_of(DeviceFeature.DMA_LOGGING_REPORT, vfio.FEATURE_GET))
    ),
    "dirty-logging.quiet": Defect("had nothing to write", mangling(REPORT, bitmap_of(b"\xff", REPORTED))),
    "dirty-logging.report-needs-start": Defect(
        "before DMA_LOGGING_START is not refused",
        lambda s, m, p: obliging(REPORT, bytes(m.body) + bytes(AREA >> 15))(s, m, p),
    ),
    "dirty-logging.start-page-size": Defect("page size 3000", obliging(all_of(START, qword(8, 3000)), None)),
    "dirty-logging.start-ranges": Defect("ranges that overlap", obliging(all_of(START, word(16, 2)), None)),
    "dirty-logging.start-twice": Defect("reports are refused", losing_the_log),
    "dirty-logging.report-page-size": Defect("hangs", hanging(all_of(REPORT, qword(24, 2048))), patience=HUNG_S),
    "dirty-logging.larger-pages": Defect(
        "had nothing to write", mangling(all_of(REPORT, qword(24, 8192)), bitmap_of(b"\x01", REPORTED))
    ),
    "dirty-logging.report-ranges": Defect(
        "lost without a word", mangling(all_of(REPORT, qword(8, FIRST + 8192)), lambda _b: b"")
    ),
    "dirty-logging.two-mappings": Defect(
        "lost without a word", mangling(all_of(REPORT, qword(16, 2 * AREA)), lambda _b: b"")
    ),
    "dirty-logging.large-report": Defect(
        "lost without a word", mangling(all_of(REPORT, qword(16, 4 << 30)), lambda body: body[: REPORTED + 65536])
    ),
    "dirty-logging.report-room": Defect("too little room is not refused", obliging(REPORT, None)),
    "dirty-logging.unmap-with-bitmap": Defect(
        "had nothing to write", mangling(all_of(command(Command.DMA_UNMAP), word(4, 1)), bitmap_of(b"\xff", UNMAPPED))
    ),
    "device-dma.logged": Defect("written, and not reported", knobs={"faults": ["unlogged"]}),
    "device-dma.parts": Defect("written, and not reported", then(forget, all_of(REPORT, qword(8, SECOND)))),
    "device-dma.by-larger-pages": Defect(
        "written, and not reported", mangling(all_of(REPORT, qword(24, 8192)), bitmap_of(b"\0", REPORTED))
    ),
    "device-dma.refused-report": Defect("written, and not reported", forget_report),
    "device-dma.unmapped": Defect(
        "written, and not reported",
        mangling(all_of(command(Command.DMA_UNMAP), word(4, 1)), bitmap_of(b"\0", UNMAPPED)),
    ),
    "device-dma.left-alone": Defect("written after the unmap", pretending(command(Command.DMA_UNMAP), bytes(24))),
    "device-dma.remapped": Defect("written, and not reported", then(log_no_more, command(Command.DMA_UNMAP))),
    "device-dma.stopped": Defect(
        "written in STOP", then(write_late, all_of(command(Command.REGION_WRITE), qword(0, pci.DOORBELL)))
    ),
    "device-dma.in-pre-copy": Defect("written, and not reported", then(log_no_more, sets(S.PRE_COPY))),
    "device-dma.started-again": Defect("a fresh log reports", ignoring_stop),
    "reconnecting.next-client": Defect("hangs", wedged=lambda _server: True, patience=HUNG_S),
    "reconnecting.half-a-message": Defect(
        "hangs", wedged=lambda server: server.connection._filled > 0, patience=HUNG_S
    ),
    "reconnecting.silent-client": Defect("hangs", wedged=lambda server: not server.negotiated, patience=HUNG_S),
    "reconnecting.state-of-the-next": Defect("finds the device in STOP", then(stop, all_of(later, VERSION))),
    "reconnecting.log-of-the-next": Defect("DMA_LOGGING_START is refused", refusing(all_of(later, START))),
    "reconnecting.mappings-of-the-next": Defect(
        "DMA_MAP is refused: EEXIST", refusing(all_of(later, command(Command.DMA_MAP)), errno.EEXIST)
    ),
}

FURTHER: list[tuple[str, Defect]] = [
    (
        "interrupts.eventfd",
        Defect(
            "taken away was signalled",
            pretending(all_of(command(Command.DEVICE_SET_IRQS), word(4, 0x21), word(16, 0))),
        ),
    ),
    (
        "states.data-in-other-states",
        Defect(
            "MIG_DATA_READ in RESUMING",
            obliging(all_of(in_state(S.RESUMING), command(Command.MIG_DATA_READ)), MigData(0).pack() + bytes(64)),
        ),
    ),
    (
        "states.data-in-other-states",
        Defect("MIG_DATA_WRITE in PRE_COPY", obliging(all_of(in_state(S.PRE_COPY), command(Command.MIG_DATA_WRITE)))),
    ),
    (
        "states.data-in-other-states",
        Defect(
            "refused with EIO, not EINVAL",
            refusing(all_of(in_state(S.STOP), command(Command.MIG_DATA_WRITE)), errno.EIO),
        ),
    ),
    (
        "dirty-logging.report-ranges",
        Defect(
            "has bits beyond them: 0x800000",
            mangling(all_of(REPORT, qword(16, PAGE)), patched(REPORTED, b"\x02")),
        ),
    ),
    (
        "description.device-info",
        Defect("the answer makes no sense", mangling(command(Command.DEVICE_GET_INFO), patched(0, b"\x08"))),
    ),
]

MOST_VECTORS = Defect("", mangling(command(Command.DEVICE_GET_IRQ_INFO), patched(12, b"\xff" * 4)))

UNJUDGED: list[tuple[str, Defect]] = [
    (
        "regions.bounds",
        Defect(
            "configuration space has 1 bytes",
            mangling(all_of(command(Command.DEVICE_GET_REGION_INFO), word(8, 7)), patched(16, bytes([1, 0]))),
        ),
    ),
    ("device-dma.parts", Defect("without writing to memory directly", device=write_to_the_first_area)),
]
"""Odd answers that the check is not about, and what it says then."""
