"""What decodes bytes from outside, each with what it may do with them: the errors that it documents, and nothing else.

A decoder's `run` takes an input and fails by any exception; documented errors it keeps to itself. `bound` is the most
memory, in bytes, that one input may take; `spoil` makes new inputs of the valid ones in tests/data/fuzz.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import xxhash
from google.protobuf.message import DecodeError
from mutations import MAX_INPUT, Mutation
from switchover.v1 import migration_pb2

from common.devices.__main__ import build
from common.devices.base import EmulatedDevice
from common.guest.boot import parse as parse_boot
from common.guest.memory import GuestMemory
from common.guest.vcpu import Vcpu
from common.ipc import channel
from common.machine import config, record
from common.machine.attachments import read_attachments
from common.machine.fields import ConfigError
from common.machine.pci_config import guest_registers
from common.memory.layout import PAGE_SIZE
from common.memory.pages import Applier, Encoding, PageBatch
from common.memory.ram import GuestRam
from common.rpc.errors import RefusalError, status_of
from common.rpc.page_batch import parse as parse_batch
from common.vfio.feature import LoggingReport, LoggingStart, PrecopyInfo, Range
from common.vfio.migration import DeviceState
from common.vfio_user import codec, description, transcript
from common.vfio_user.client import DeviceError, VfioUserClient
from common.vfio_user.server import VfioUserServer
from destination import request as requests

__all__ = ["DECODERS", "KINDS", "KNOBS", "Decoder", "answers_of", "use_client"]

PATIENCE = 10.0  # seconds for a thread to end: only one that never would fails
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Decoder:
    """One decoder."""

    run: Callable[[bytes], None]
    spoil: Mutation
    bound: int


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


# Page batches: parsed, checked, applied to RAM of 4 MiB.


class Ram:
    """RAM that is filled with a pattern, so that what is written to it shows."""

    def __init__(self) -> None:
        self.ram = GuestRam.create(4 * MIB)
        self.before = np.empty_like(self.ram.bytes)
        self.reset()

    def reset(self) -> None:
        self.ram.words[:] = np.arange(self.ram.words.size, dtype=np.uint64).reshape(self.ram.words.shape) * 0x9E37
        self.before[:] = self.ram.bytes


@cache
def ram_of_batches() -> Ram:
    return Ram()


_spoil_batch = mutations.of_message(migration_pb2.SendPagesRequest, {})


def spoil_batch(data: bytes, rng: Any) -> bytes:
    """Spoil a batch, and half of the time make as many zero bits, and as much payload, as its runs want."""
    spoilt = _spoil_batch(data, rng)
    try:
        message = migration_pb2.SendPagesRequest.FromString(spoilt)
    except DecodeError:
        return spoilt
    pages = sum(message.run_pages)
    if rng.randrange(2) or pages > 1 << 20:
        return spoilt
    message.zero = (message.zero * pages)[: pages // 8] + bytes([(1 << pages % 8) - 1])[: bool(pages % 8)]
    loaded = pages - sum(byte.bit_count() for byte in message.zero)
    if message.encoding == Encoding.RAW and loaded <= MAX_INPUT // PAGE_SIZE // 2:
        message.payload = rng.randbytes(PAGE_SIZE) * loaded
    return message.SerializeToString()


def page_batch(data: bytes) -> None:
    try:
        batch = parse_batch(data)
    except ValueError:
        batch = None
    try:
        message = migration_pb2.SendPagesRequest.FromString(data)
    except DecodeError:
        message = None
    expect((batch is None) == (message is None), "protobuf and we disagree on whether this is a message")
    if batch is None or message is None:
        return
    expect(
        (batch.sequence, batch.round, batch.encoding, batch.zero, b"".join(batch.payload))
        == (message.sequence, message.round, message.encoding, message.zero, message.payload)
        and (batch.unchanged, batch.equal, batch.delta) == (message.unchanged, message.equal, message.delta)
        and (batch.equal_to.tolist(), batch.more) == (list(message.equal_to), message.more)
        and batch.run_first.tolist() == list(message.run_first)
        and batch.run_pages.tolist() == list(message.run_pages),
        "protobuf and we read different batches",
    )
    its = ram_of_batches()
    pages = its.ram.layout.pages
    named = np.zeros(pages, np.bool_)
    applier = Applier(its.ram)
    # Something to refer to.
    applier.apply(
        PageBatch(
            1, 0, Encoding.RAW, *np.array([[3], [1]], np.uint64), b"\0", [its.before[3 * PAGE_SIZE :][:PAGE_SIZE].data]
        )
    )
    try:
        applier.apply(batch)
    except ValueError:
        pass
    else:
        for first, count in zip(batch.run_first.tolist(), batch.run_pages.tolist(), strict=True):
            named[first : first + count] = True
    changed = (its.ram.words != its.before.view("<u8").reshape(its.ram.words.shape)).any(axis=1)
    if changed.any():
        its.reset()
    expect(not (changed & ~named).any(), "RAM was written outside the runs of a batch, or by one that is refused")


# vfio-user: bodies, whole conversations with a server, and answers to a client.

_HEADER = struct.Struct("<HHIII")
_UNPACK: tuple[Callable[[bytes], Any], ...] = (
    codec.Version.unpack,
    codec.DmaMap.unpack,
    codec.DmaUnmap.unpack,
    lambda body: codec.DmaUnmap.unpack(body).unpack_bitmap(body),
    codec.DmaAccess.unpack,
    codec.RegionAccess.unpack,
    codec.Feature.unpack,
    lambda body: codec.MigData.unpack(body).data(body),
    description.DeviceInfo.unpack,
    description.RegionInfo.unpack,
    description.RegionQuery.unpack_info,
    description.RegionQuery.unpack_io_fds,
    lambda body: description.unpack_io_fds(body, [0, 1]),
    description.IrqInfo.unpack,
    description.IrqSet.unpack,
    LoggingReport.unpack,
    PrecopyInfo.unpack,
    lambda body: codec.Header.unpack(body[:16].ljust(16, b"\0"), codec.MAX_COMMAND_SIZE),
    LoggingStart.unpack,
)


def vfio_user_body(data: bytes) -> None:
    unpack = _UNPACK[data[0] % len(_UNPACK)] if data else codec.Version.unpack
    errors = (ValueError, OSError) if unpack == LoggingStart.unpack else ValueError
    with suppress(errors):
        unpack(data[1:])


def messages_of(data: bytes) -> list[bytes]:
    """Cut a conversation into messages; what is no message is the last of them."""
    messages = []
    while len(data) >= _HEADER.size:
        size = _HEADER.unpack_from(data)[2]
        if not _HEADER.size <= size <= len(data):
            break
        messages.append(data[:size])
        data = data[size:]
    return [*messages, data] if data else messages


def spoil_message(message: bytes, rng: Any) -> bytes:
    """Spoil a header or a body, and most of the time correct the size."""
    if len(message) < _HEADER.size:
        return mutations.of_bytes(message, rng)
    head, body = message[: _HEADER.size], message[_HEADER.size :]
    if rng.randrange(4) == 0:
        return mutations.put(_HEADER, _HEADER.unpack(head), rng) + body
    if body[4:5] == b"{" and rng.randrange(2):
        body = body[:4] + mutations.of_json(body[4:].rstrip(b"\0"), rng) + b"\0"
    else:
        body = mutations.of_bytes(body, rng)
    number, command, _, flags, error = _HEADER.unpack(head)
    return _HEADER.pack(number, command, _HEADER.size + len(body), flags, error) + body


KINDS = ("nic", "nvme", "accelerator", "sample")
KNOBS: dict[str, dict[str, Any]] = {"nvme": {"blocks": 64}, "accelerator": {"memory": 64 << 10, "churn": 0}}


def device_of(data: bytes) -> tuple[EmulatedDevice, bytes]:
    """Return the device that the first byte of an input names, and the rest."""
    kind = KINDS[(data[0] if data else 0) % len(KINDS)]
    return build(kind, f"{kind}0", KNOBS.get(kind, {})), data[1:]


@contextmanager
def no_thread_fails() -> Iterator[None]:
    """Fail if a thread ends by an exception."""
    failed: list[BaseException] = []
    before = threading.excepthook
    threading.excepthook = lambda its: failed.append(its.exc_value or AssertionError("a thread has failed"))
    try:
        yield
    finally:
        threading.excepthook = before
    if failed:
        raise failed[0]


@cache
def memory_to_map() -> int:
    fd = os.memfd_create("mapped", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 64 << 10)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def vfio_user_server(data: bytes) -> None:
    """Say a conversation to a device, read all that it answers, and hang up."""
    device, conversation = device_of(data)
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    with no_thread_fails():
        server = threading.Thread(target=VfioUserServer(device, theirs).serve)
        talker = threading.Thread(target=talk, args=(ours, messages_of(conversation)))
        server.start()
        talker.start()
        answers = bytearray()
        with ours:
            while part := _read(ours):
                answers += part
            talker.join(PATIENCE)
        server.join(PATIENCE)
    expect(not server.is_alive() and not talker.is_alive(), "the server does not end when its client has gone")
    for answer in messages_of(bytes(answers)):
        header = codec.Header.unpack(answer[: _HEADER.size].ljust(16, b"\0"), codec.MAX_REPLY_SIZE)
        expect(len(answer) == header.size, "an answer is cut off")


def _read(sock: socket.socket) -> bytes:
    try:
        return sock.recv(MIB)
    except ConnectionResetError:
        return b""


def talk(sock: socket.socket, messages: list[bytes]) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        for message in messages:
            command = _HEADER.unpack_from(message)[1] if len(message) >= _HEADER.size else 0
            fds = [memory_to_map()] if command == codec.Command.DMA_MAP else []
            if command == codec.Command.DEVICE_SET_IRQS and len(message) >= 36:
                fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(min(struct.unpack_from("<I", message, 32)[0], 8))]
            socket.send_fds(sock, [message], fds)
            if command == codec.Command.DEVICE_SET_IRQS:
                for fd in fds:
                    os.close(fd)
        sock.shutdown(socket.SHUT_WR)


_ANSWER = struct.Struct("<BI")
KEEP_ID, WITH_FD, KEEP_SIZE = 1, 2, 4


def answers_of(data: bytes) -> list[tuple[int, bytes]]:
    """Read an input of `vfio_user_client`: how to send a message (KEEP_ID, …), and the message."""
    answers = []
    while len(data) >= _ANSWER.size:
        flags, size = _ANSWER.unpack_from(data)
        answers.append((flags, data[_ANSWER.size : _ANSWER.size + size]))
        data = data[_ANSWER.size + size :]
    return answers


def answer_parts(data: bytes) -> list[bytes]:
    return [_ANSWER.pack(flags, len(message)) + message for flags, message in answers_of(data)]


def spoil_answer(answer: bytes, rng: Any) -> bytes:
    flags, message = answers_of(answer)[0]
    if rng.randrange(8) == 0:
        flags ^= 1 << rng.randrange(3)
    else:
        message = spoil_message(message, rng)
    return _ANSWER.pack(flags, len(message)) + message


def vfio_user_client(data: bytes) -> None:
    """Answer a client's requests with what the input holds, and hang up when there is no more."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    with no_thread_fails():
        server = threading.Thread(target=answer, args=(theirs, answers_of(data)))
        server.start()
        try:
            with suppress(DeviceError), ExitStack() as held:
                client = held.enter_context(closing(VfioUserClient(ours, "device", timeout=PATIENCE)))
                use_client(client)
        finally:
            ours.close()
        server.join(PATIENCE)
    expect(not server.is_alive(), "the client does not hang up")


def use_client(client: VfioUserClient) -> None:
    """Ask for everything that a client can ask for, and pass over what is refused."""
    asked: tuple[Callable[[], Any], ...] = (
        lambda: client.region_read(7, 0, 256),
        lambda: client.region_write(0, 0, bytes(8)),
        client.get_state,
        lambda: [os.close(fd) for fd in {item.fd for item in client.get_region_io_fds(0)}],
        lambda: client.dma_map(0, 1 << 16, 3, memory_to_map(), 0),
        lambda: client.logging_start(4096, [Range(0, 1 << 16)]),
        lambda: client.logging_report(0, 1 << 16, 4096),
        client.logging_stop,
        lambda: client.dma_unmap(0, 1 << 16, bitmap=True),
        lambda: client.set_state(DeviceState.STOP_COPY),
        client.precopy_info,
        client.stop_copy_length,
        lambda: client.mig_data_read(4096),
        lambda: client.write_journal(0, 4096),
        client.reset,
    )
    for ask in asked:
        with suppress(DeviceError):
            ask()


def answer(sock: socket.socket, answers: list[tuple[int, bytes]]) -> None:
    with sock, suppress(ConnectionError, TimeoutError):
        for flags, message in answers:
            asked = _take(sock, _HEADER.size)
            number, command, size, _, _ = _HEADER.unpack(asked)
            _take(sock, size - _HEADER.size)
            if not flags & KEEP_ID and len(message) >= _HEADER.size:
                message = struct.pack("<HH", number, command) + message[4:]
            whole = len(message) >= _HEADER.size and _HEADER.unpack_from(message)[2] == len(message)
            if not whole and not flags & KEEP_SIZE and len(message) >= _HEADER.size:
                message = message[:4] + struct.pack("<I", len(message)) + message[8:]
                whole = True
            socket.send_fds(sock, [message], [memory_to_map()] if flags & WITH_FD else [])
            if not whole:
                return


def _take(sock: socket.socket, count: int) -> bytes:
    taken = b""
    while len(taken) < count:
        part = sock.recv(count - len(taken))
        if not part:
            raise ConnectionError
        taken += part
    return taken


# Device state: a stream into each of our devices, with what it carries spoilt and its digests made right again.

_RECORD = struct.Struct("<IHHQQQ")


def records_of(data: bytes) -> list[bytes]:
    """Cut a stream into its records; the first byte of the input, which names the device, goes with the first."""
    head, data = data[:1], data[1:]
    records = []
    while len(data) >= _RECORD.size:
        size = min(_RECORD.unpack_from(data)[4], len(data))
        records.append(data[: _RECORD.size + size])
        data = data[_RECORD.size + size :]
    records.append(data)
    return [head, *(record for record in records if record)]


def spoil_record(record_: bytes, rng: Any) -> bytes:
    if len(record_) < _RECORD.size:
        return mutations.of_bytes(record_, rng)
    values = _RECORD.unpack_from(record_)
    if rng.randrange(4) == 0:
        return mutations.put(_RECORD, values, rng) + record_[_RECORD.size :]
    body = mutations.of_bytes(record_[_RECORD.size :], rng)
    digest = xxhash.xxh3_64_intdigest(body) if values[2] != 2 else 0
    return _RECORD.pack(*values[:4], len(body), digest) + body


def device_state(data: bytes) -> None:
    """Load a state; a device that takes it saves one that it takes again, and one that does not can be reset."""
    device, stream = device_of(data)
    with no_thread_fails():
        try:
            device.set_state(DeviceState.RESUMING)
            step = 1 + len(stream) // 7
            for at in range(0, len(stream), step):
                device.mig_data_write(stream[at : at + step])
            try:
                device.set_state(DeviceState.STOP)
            except OSError:
                expect(device.get_state() is DeviceState.ERROR, "a state that is refused leaves a device in ERROR")
            else:
                saved = _save(device)
                device.set_state(DeviceState.RESUMING)
                device.mig_data_write(saved)
                device.set_state(DeviceState.STOP)
                expect(_save(device) == saved, "a state is not the same after it was loaded")
            device.reset()
            expect(device.get_state() is DeviceState.RUNNING, "a device is not RUNNING after a reset")
            device.connected(_NoDma())
            device.region_read(0, 0, 64)
        finally:
            device.disconnected()


def _save(device: EmulatedDevice) -> bytes:
    device.set_state(DeviceState.STOP_COPY)
    parts = []
    while part := bytes(device.mig_data_read(MIB)):
        parts.append(part)
    device.set_state(DeviceState.STOP)
    return b"".join(parts)


class _NoDma:
    def dma_read(self, iova: int, count: int) -> bytes:
        raise OSError(14, "nothing is mapped")

    def dma_write(self, iova: int, data: object) -> None:
        raise OSError(14, "nothing is mapped")


# Text: machine files, descriptions, records on disk, transcripts.


@cache
def scratch() -> Path:
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    import atexit
    import shutil

    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def in_file(read: Callable[[Path], Any], error: type[Exception]) -> Callable[[bytes], None]:
    """Make a decoder of what reads a file; its error is one line that names the file."""

    def run(data: bytes) -> None:
        path = scratch() / "input"
        path.write_bytes(data)
        try:
            read(path)
        except error as refusal:
            one_line(str(refusal))
            expect(str(path) in str(refusal), f"an error does not name the file: {refusal}")

    return run


def ownership_record(data: bytes) -> None:
    """As earlier versions wrote it, and as one of two, whole as it seems."""
    read = in_file(record.read, ValueError)
    read(data)
    read(record.slot(1, data.decode(errors="replace")))


def one_line(text: str) -> None:
    expect(text.isprintable() and len(text) < 1000, f"an error is not one line for people: {text[:2000]!r}")


def machine_description(data: bytes) -> None:
    try:
        spec = config.from_json(data)
    except ConfigError as error:
        one_line(str(error))
    else:
        expect(config.from_json(config.to_json(spec)) == spec, "a description is another one when it comes back")


def a_transcript(data: bytes) -> None:
    try:
        transcript.read(data.splitlines(keepends=True))
    except transcript.TranscriptError as error:
        one_line(str(error))


_WORDS = (
    *("[[device]]", "[[guest]]", "[ram]", "[viommu]", "[[ram]]", "[a.b]", '["x".y]', "{a = 1, b = [1, {c = 2}]}"),
    *('"nic"', '"driver"', '"~nobody/x"', f'"{"/x" * 300}"', "'''\n'''", '"""a\n"""', "1979-05-27T07:32:00Z", "nan"),
    *("inf", "-1", "0x7f", "9" * 400, "1e400", '"64MiB"', '"\\u0000"', '"1e9GiB"', "true", "[]", "[[[[]]]]", "#", '"'),
    *("kind", "name", "size", "socket", "command", "device", "image", "a.b", "[" * 200 + "]" * 200),
)


# What a source sends beside streams.


def prepare_request(data: bytes) -> None:
    try:
        requests.describe(migration_pb2.PrepareRequest.FromString(data))
    except DecodeError:
        pass
    except RefusalError as error:
        one_line(status_of(error).details)


@cache
def a_vcpu() -> tuple[Vcpu, socket.socket]:
    """Return a vCPU that stands still, and the other end of its traps."""
    ours, theirs = socket.socketpair()
    ram = GuestRam.create(64 * MIB)
    vcpu = Vcpu(GuestMemory(ram), channel.Client(ours))
    clock = {"program": "clock", "name": "clock0", "area_gpa": 0x10_0000, "area_size": 4 * MIB, "period_us": 1000}
    vcpu.attach(parse_boot({"programs": [clock], "devices": [], "fresh": False}, 0), [])
    return vcpu, theirs


def finish_request(data: bytes) -> None:
    """Check and unpack a request for a machine with one lane and a nic, and give the vCPU its state."""
    try:
        request = migration_pb2.FinishRequest.FromString(data)
    except DecodeError:
        return
    try:
        vcpu, devices = requests.rest(request, {"nic0"}, lanes=1)
    except RefusalError as error:
        one_line(status_of(error).details)
        return
    with suppress(TypeError, ValueError):
        a_vcpu()[0].state_in(vcpu)
    for device in devices:
        for register in guest_registers(device.config_space):
            expect(register.offset + register.size <= len(device.config_space), "a register outside config space")


# The channel between processes of a host.


def ipc_server(data: bytes) -> None:
    """Send requests to a server and read what it answers; what is no request ends the connection."""
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    ours.sendall(data[:60_000])
    ours.shutdown(socket.SHUT_WR)
    with ours, theirs, suppress(ValueError, channel.ClosedError):
        channel.serve(theirs, {"echo": lambda request: request, "length": lambda request: {"is": len(request.payload)}})


def ipc_client(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    with theirs, closing(channel.Client(ours)) as client:
        theirs.sendall(data[:60_000])
        theirs.shutdown(socket.SHUT_WR)
        with suppress(channel.RequestError, channel.ClosedError):
            for _ in range(8):
                client.call("echo", b"payload", key=1)


_PREFIX = struct.Struct("<II")


def ipc_parts(data: bytes) -> list[bytes]:
    parts = []
    while len(data) >= _PREFIX.size:
        header, payload = _PREFIX.unpack_from(data)
        end = min(_PREFIX.size + header + payload, len(data))
        parts.append(data[:end])
        data = data[end:]
    return [*parts, data] if data else parts


def spoil_ipc(message: bytes, rng: Any) -> bytes:
    if len(message) < _PREFIX.size or rng.randrange(4) == 0:
        return mutations.of_bytes(message, rng)
    size, _ = _PREFIX.unpack_from(message)
    header = mutations.of_json(message[8 : 8 + size], rng)
    payload = message[8 + size :]
    return _PREFIX.pack(len(header), len(payload)) + header + payload


_VCPU = {"vcpu_json": mutations.of_json}

DECODERS: dict[str, Decoder] = {
    "page_batch": Decoder(page_batch, spoil_batch, bound=8 * MAX_INPUT + 8 * MIB),
    "vfio_user_body": Decoder(vfio_user_body, mutations.of_bytes, bound=16 * MAX_INPUT),
    "vfio_user_server": Decoder(
        vfio_user_server, mutations.of_records(messages_of, spoil_message), bound=3 * codec.MAX_BITMAP
    ),
    "vfio_user_client": Decoder(
        vfio_user_client, mutations.of_records(answer_parts, spoil_answer), bound=2 * codec.MAX_REPLY_SIZE
    ),
    "device_state": Decoder(
        device_state, mutations.of_records(records_of, spoil_record), bound=65 * MIB + 8 * MAX_INPUT
    ),
    "machine_file": Decoder(in_file(config.parse, ConfigError), mutations.of_text(_WORDS), bound=128 * MAX_INPUT),
    "device_file": Decoder(in_file(read_attachments, ConfigError), mutations.of_text(_WORDS), bound=128 * MAX_INPUT),
    "machine_description": Decoder(machine_description, mutations.of_json, bound=128 * MAX_INPUT),
    "ownership_record": Decoder(ownership_record, mutations.of_json, bound=64 * MAX_INPUT),
    "transcript": Decoder(
        a_transcript,
        mutations.of_records(
            lambda data: data.splitlines(keepends=True), lambda line, rng: mutations.of_json(line, rng) + b"\n"
        ),
        bound=64 * MAX_INPUT,
    ),
    "prepare_request": Decoder(
        prepare_request,
        mutations.of_message(migration_pb2.PrepareRequest, {"machine_json": mutations.of_json}),
        bound=128 * MAX_INPUT,
    ),
    "finish_request": Decoder(
        finish_request, mutations.of_message(migration_pb2.FinishRequest, _VCPU), bound=128 * MAX_INPUT
    ),
    "ipc_server": Decoder(
        ipc_server, mutations.of_records(ipc_parts, spoil_ipc), bound=channel.MAX_HEADER + channel.MAX_PAYLOAD
    ),
    "ipc_client": Decoder(
        ipc_client, mutations.of_records(ipc_parts, spoil_ipc), bound=channel.MAX_HEADER + channel.MAX_PAYLOAD
    ),
}
