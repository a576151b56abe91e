"""Transcripts played as client against our server, and as server against our client."""

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from captures import DATA, DESTINATION, QEMU, SOURCE, answered, load
from fake_device import READ_WRITE, FakeDevice, serving
from twin_server import served

from common.vfio.feature import Range
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.client import VfioUserClient
from common.vfio_user.codec import Command
from common.vfio_user.description import IrqInfo, RegionFlags, RegionInfo
from common.vfio_user.difference import Difference
from common.vfio_user.proxy import relay
from common.vfio_user.replay import replay
from common.vfio_user.transcript import Recorded, pair
from common.vfio_user.transport import Connection

CAPTURED = pytest.mark.parametrize("path", [SOURCE, DESTINATION, QEMU], ids=lambda path: path.stem)
OUR_SOURCE, OUR_DESTINATION = DATA / "switchover-source.jsonl", DATA / "switchover-destination.jsonl"
SAMPLE_BYTES = b"".join(letter * 1024 for letter in (b"A", b"B", b"C", b"D"))
PAGE = 4096
WROTE = bytes(range(256)) * 48  # to BAR 1 of the sample
YEAR_2100 = struct.pack("<Q", 4_102_444_800)  # when the sample's timer ends: it refuses the past


def _is(message: Recorded, command: Command) -> bool:
    return message.header.command == command and not message.header.is_reply


class SampleDevice(FakeDevice):
    """What libvfio-user's sample is as a device; its answers that no rule gives are those of the conversation."""

    def __init__(self, conversation: Path) -> None:
        super().__init__()
        messages = load(conversation)
        self.dma_iova = next(
            (int.from_bytes(m.body[:8], "little") for m in messages if _is(m, Command.DMA_WRITE)), None
        )
        self.dma_answer = b""
        self.engine = threading.Thread(target=self._copy)
        self.migration_flags = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
        self.regions = [RegionInfo(index) for index in range(9)]
        self.regions[0] = RegionInfo(0, READ_WRITE, 8)
        self.fd = os.memfd_create("bar1")
        pairs = answered(conversation)
        described = [
            reply.body
            for command, reply in answered(QEMU if conversation == QEMU else SOURCE)
            if command.header.command == Command.DEVICE_GET_REGION_INFO
        ]
        for body in described:
            region, argsz = RegionInfo.unpack(body)
            if argsz == len(body):
                flags = region.flags & ~RegionFlags.CAPS
                fd = self.fd if region.areas else None
                self.regions[region.index] = RegionInfo(
                    region.index, flags, region.size, region.offset, region.areas, fd
                )
        self.irqs = [IrqInfo(index, 1, int(index in (0, 3, 4))) for index in range(5)]
        reads = [
            reply.body
            for command, reply in pairs
            if command.header.command == Command.REGION_READ and not reply.header.error
        ]
        self.reads = iter([body[16:] for body in reads])
        self.chunks = iter(
            [reply.body[8 : 8 + int.from_bytes(reply.body[4:8], "little")]
             for command, reply in pairs if command.header.command == Command.MIG_DATA_READ]
        )  # fmt: skip

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        return next(self.reads)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        pass

    def mig_data_read(self, size: int) -> bytes:
        return next(self.chunks)

    def set_irqs(self, index: int, flags: int, start: int, count: int, data: bytes, fds: Sequence[int]) -> None:
        super().set_irqs(index, flags, start, count, data, fds)
        if self.dma_iova is not None:
            self.engine.start()

    def _copy(self) -> None:
        assert self.dma is not None and self.dma_iova is not None
        self.dma.dma_write(self.dma_iova, SAMPLE_BYTES)
        self.dma_answer = self.dma.dma_read(self.dma_iova, len(SAMPLE_BYTES))

    def logging_start(self, page_size: int, ranges: object) -> int:
        # The sample's client names no range, and its library logs everything.
        used = self.log.start(page_size, [Range(0, 1 << 32)])
        self.log.mark(PAGE, 1)
        return used


def kinds(differences: Sequence[Difference]) -> list[tuple[int, str, str]]:
    return [(its.line, its.command, its.kind) for its in differences]


def against_our_server(conversation: Path, messages: Sequence[Recorded]) -> tuple[SampleDevice, list[Difference]]:
    """Play the client of `messages` against a device that answers as in `conversation`."""
    device = SampleDevice(conversation)
    try:
        with serving(device) as sock:
            differences = replay("client", sock, messages, 10)
            if device.engine.ident is not None:
                device.engine.join(10)
        return device, differences
    finally:
        os.close(device.fd)


@CAPTURED
def test_our_server_answers_as_the_captured_one(path: Path) -> None:
    device, differences = against_our_server(path, load(path))
    # Ours takes 16 descriptors with a message, not 8, and offers our extension: other capabilities, and longer ones.
    assert kinds(differences) == [(2, "VERSION", "fields")]
    assert device.dma_answer == (b"" if path == QEMU else SAMPLE_BYTES)
    if path == DESTINATION:
        written = [c.body[8:] for c, _ in answered(path) if c.header.command == Command.MIG_DATA_WRITE]
        assert device.written == b"".join(written)
        assert not device.mappings
    if path == QEMU:
        assert device.resets
        assert device.mappings


@CAPTURED
def test_one_byte_of_a_captured_reply_that_is_not_so_is_told(path: Path) -> None:
    messages = load(path)
    seen = set()
    for index, message in enumerate(messages):
        key = (message.sender, message.header.command, bool(message.body))
        if not message.header.is_reply or message.sender == "client" or key in seen or key[1] == Command.VERSION:
            continue
        seen.add(key)
        if message.body:
            last = bytes([message.body[-1] ^ 0x80])
            other = replace(message, body=message.body[:-1] + last)
        else:
            other = replace(message, header=message.header._replace(flags=0x21 ^ message.header.flags & 0x20))
        _, differences = against_our_server(path, [*messages[:index], other, *messages[index + 1 :]])
        assert [its.line for its in differences] == [2, index + 1], message.header
    assert len(seen) >= 7


@contextmanager
def playing_the_server(path: Path, found: list[Difference], *, edit: Callable[[list[Recorded]], None] | None = None):
    """Give the client's end of a connection to a server that answers from a transcript."""
    messages = load(path)
    if edit is not None:
        edit(messages)
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        played = pool.submit(replay, "server", theirs, messages, 10)
        try:
            yield ours
        finally:
            ours.close()
            found += played.result(20)


@CAPTURED
def test_the_replies_of_a_captured_server_reach_a_client_that_asks_the_same(path: Path) -> None:
    """The captured clients ask in an order of their own, so what asks here is the layer below our client."""
    found: list[Difference] = []
    messages = load(path)
    pairs = [(messages[command], messages[reply]) for command, reply in sorted(pair(messages).items())]
    served = iter([(command, reply) for command, reply in pairs if command.sender == "server"])
    with playing_the_server(path, found) as sock:
        connection = Connection(sock, limit=1 << 22, timeout=10)

        def answer() -> None:
            while (command := connection.next_command()) is not None:
                recorded, reply = next(served)
                assert command.body == recorded.body
                connection.reply(command, [reply.body])

        with ThreadPoolExecutor(1) as pool:
            answering = pool.submit(answer)
            for message, recorded in pairs:
                if message.sender == "server":
                    continue
                fds = [os.eventfd(0) for _ in range(message.fds)]
                reply = connection.request(message.header.command, [message.body], fds)
                for fd in fds:
                    os.close(fd)
                assert (reply.error, reply.body, len(reply.fds)) == (
                    recorded.header.refusal,
                    recorded.body,
                    recorded.fds,
                )
                if reply.fds:  # a BAR of 12 KiB, as the message says
                    assert os.fstat(reply.fds[0]).st_size == 0x3000
                reply.close_fds()
            connection.shutdown()
            answering.result(10)
        connection.close()
    assert found == []


def save_the_sample(client: VfioUserClient) -> tuple[list[bytes], list[bytes]]:
    """Be the source of a migration of libvfio-user's sample; return what it gave in PRE_COPY and in STOP_COPY."""
    memory, interrupt = os.memfd_create("ram"), os.eventfd(0)
    for page in range(4):
        client.dma_map(page * PAGE, PAGE, 3, memory, page * PAGE)
    client.set_irqs(0, 0x24, 0, 1, fds=[interrupt])
    os.close(memory)
    os.close(interrupt)
    assert len(client.region_read(7, 0, 64)) == 64
    client.region_write(0, 0, YEAR_2100)
    client.region_write(1, 0, WROTE)
    assert client.logging_start(PAGE, []) == PAGE
    assert [client.logging_report(page * PAGE, PAGE, PAGE).tolist() for page in range(4)] == [[0]] * 4
    bitmap = client.dma_unmap(3 * PAGE, PAGE, bitmap=True)
    assert bitmap is not None and bitmap.tolist() == [0]
    client.set_state(DeviceState.PRE_COPY)
    early = [bytes(client.mig_data_read(PAGE)) for _ in range(3)]
    client.set_state(DeviceState.STOP_COPY)
    state = []
    while data := client.mig_data_read(PAGE):
        state.append(bytes(data))
    client.set_state(DeviceState.STOP)
    client.logging_stop()
    return early, state


def load_the_sample(client: VfioUserClient, state: Sequence[bytes]) -> bytes:
    """Be the destination, and return BAR 1."""
    client.set_state(DeviceState.RESUMING)
    for part in state:
        client.mig_data_write(part)
    client.set_state(DeviceState.STOP)
    client.set_state(DeviceState.RUNNING)
    return client.region_read(1, 0, len(WROTE))


def _beside_version(found: Sequence[Difference]) -> list[Difference]:
    """Return the differences but those of VERSION, in which a client of today offers more than it did."""
    return [its for its in found if its.command != "VERSION"]


def test_our_client_still_migrates_a_foreign_server_s_device_as_it_was_captured() -> None:
    """To the byte: what our client says, in its order, is what it said to that server, but for what it can do."""
    found: list[Difference] = []
    with playing_the_server(OUR_SOURCE, found) as sock, VfioUserClient(sock, "sample", timeout=10) as client:
        early, state = save_the_sample(client)
    assert _beside_version(found) == []
    assert b"".join(early) == WROTE
    assert b"".join(state) == WROTE + YEAR_2100
    with playing_the_server(OUR_DESTINATION, found) as sock, VfioUserClient(sock, "sample", timeout=10) as client:
        assert load_the_sample(client, state) == WROTE
    assert _beside_version(found) == []


def test_a_foreign_server_that_answered_one_byte_differently_breaks_that() -> None:
    def change(messages: list[Recorded]) -> None:
        index = next(i for i, m in enumerate(messages) if m.header.command == 17 and m.header.is_reply)
        body = messages[index].body
        messages[index] = replace(messages[index], body=body[:100] + bytes([body[100] ^ 1]) + body[101:])

    found: list[Difference] = []
    with playing_the_server(OUR_SOURCE, found, edit=change) as sock, VfioUserClient(sock, "s", timeout=10) as client:
        early, _ = save_the_sample(client)
    assert b"".join(early) != WROTE


def test_where_a_client_departs_is_told() -> None:
    found: list[Difference] = []
    with playing_the_server(OUR_SOURCE, found) as sock, VfioUserClient(sock, "sample", timeout=10) as client:
        with pytest.raises(OSError, match="Invalid argument"):
            client.reset()
        client.dma_map(0, PAGE, 1)
    line = next(n for n, m in enumerate(load(OUR_SOURCE), start=1) if _is(m, Command.DMA_MAP))
    told = [(its.line, its.command, its.kind, its.text) for its in _beside_version(found)]
    # A reset of a device that refuses is tried again, from RUNNING.
    assert told[0] == (line, "DEVICE_RESET", "order", "asked instead of DMA_MAP")
    assert (line, "DEVICE_FEATURE", "order", "asked instead of DMA_MAP") in told
    assert (line, "DMA_MAP", "descriptors", "0 instead of 1") in told
    assert (line, "DMA_MAP", "fields", "flags 0x1 instead of 0x3") in told
    assert told[-1] == (line + 2, "DMA_MAP", "order", "the client has closed the connection before it")


def test_a_conversation_of_ours_through_the_proxy_replays_equal_on_both_sides(tmp_path: Path) -> None:
    """DMA by message in both directions, a state, a refusal."""
    ram = bytearray(b"guest" * 1000)

    def write_ram(iova: int, data: memoryview) -> None:
        ram[iova : iova + len(data)] = data

    def new_device() -> FakeDevice:
        class Copying(FakeDevice):
            def region_write(self, index: int, offset: int, data: bytes) -> None:
                super().region_write(index, offset, data)
                assert self.dma is not None
                self.dma.dma_write(100, self.dma.dma_read(0, 50))

        device = Copying()
        device.stream = bytes(range(256)) * 5000
        return device

    def converse(sock: socket.socket) -> None:
        client = VfioUserClient(
            sock, "f", timeout=10, on_dma_read=lambda iova, n: bytes(ram[iova : iova + n]), on_dma_write=write_ram
        )
        with client:
            memory = os.memfd_create("ram")
            client.dma_map(1 << 20, PAGE, 3, memory)
            os.close(memory)
            client.region_write(0, 8, b"go on")
            client.set_state(DeviceState.STOP_COPY)
            while client.mig_data_read(1 << 20):
                pass
            with pytest.raises(OSError, match="Invalid argument"):
                client.region_read(0, 0, 4)

    messages: list[Recorded] = []
    client, to_client = socket.socketpair()
    ended = os.eventfd(0)
    with serving(new_device()) as server, ThreadPoolExecutor(1) as pool:
        relaying = pool.submit(relay, to_client, server, messages.append, ended)
        converse(client)
        assert relaying.result(10) == "the client has closed the connection"
        to_client.close()
    os.close(ended)
    assert {m.header.command for m in messages if m.sender == "server" and not m.header.is_reply} == {11, 12}
    with serving(new_device()) as server:
        assert replay("client", server, messages, 10) == []
    ours, theirs = socket.socketpair()
    ram[:] = b"guest" * 1000
    with ThreadPoolExecutor(1) as pool:
        played = pool.submit(replay, "server", theirs, messages, 10)
        converse(ours)
        assert played.result(10) == []
    assert ram[100:150] == b"guest" * 10


def test_a_twin_socket_stays_open_and_silent_until_the_end() -> None:
    messages: list[Recorded] = []
    client, to_client = socket.socketpair()
    ended = os.eventfd(0)
    with served() as (server, _, _), ThreadPoolExecutor(1) as pool:
        relaying = pool.submit(relay, to_client, server, messages.append, ended)
        VfioUserClient(client, "far0", timeout=10).close()
        relaying.result(10)
        to_client.close()
        server.close()
    os.close(ended)
    assert messages[1].opens_twin_socket
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        played = pool.submit(replay, "server", theirs, messages, 10)
        with closing(Connection(ours, limit=1 << 22, timeout=10)) as connection:
            version = connection.request(Command.VERSION, [messages[0].body])
            with socket.socket(fileno=version.fds[0]) as twin:
                with pytest.raises(BlockingIOError):
                    twin.recv(1, socket.MSG_DONTWAIT)
                connection.close()
                assert played.result(10)
                assert twin.recv(1, socket.MSG_DONTWAIT) == b""
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        played = pool.submit(replay, "server", theirs, messages, 10)
        VfioUserClient(ours, "far0", timeout=10).close()
        assert played.result(10) == []


def test_a_server_that_does_not_ask_or_goes_or_asks_too_much_is_told() -> None:
    messages = load(SOURCE)
    first = next(n for n, m in enumerate(messages) if m.sender == "server" and not m.header.is_reply)

    class Silent(SampleDevice):
        def set_irqs(self, *arguments: object) -> None:
            pass

    device = Silent(SOURCE)
    began = time.monotonic()
    with serving(device) as sock:
        found = replay("client", sock, messages, 0.2)
    os.close(device.fd)
    missing = [its for its in found if its.kind == "order"]
    assert [its.command for its in missing] == ["DMA_WRITE"] * 4 + ["DMA_READ"] * 4
    assert missing[0] == Difference(first + 1, "DMA_WRITE", "order", "did not come within 0.2 s")
    assert time.monotonic() - began < 5

    class Greedy(SampleDevice):
        def _copy(self) -> None:
            super()._copy()
            assert self.dma is not None
            try:
                self.dma.dma_write(0, b"x")
            except OSError as error:
                self.refused = error.errno

    device = Greedy(SOURCE)
    with serving(device) as sock:
        found = replay("client", sock, messages, 10)
        device.engine.join(10)
    os.close(device.fd)
    assert device.refused == errno.EINVAL
    assert [its.text for its in found if its.kind == "order"] == ["the server asks for it, and the record does not"]

    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        played = pool.submit(replay, "client", ours, messages, 10)
        theirs.recv(1 << 16)
        theirs.close()
        assert [(its.line, its.command, its.kind) for its in played.result(10)] == [(1, "VERSION", "order")]


def test_commands_that_want_no_reply_are_played_as_such() -> None:
    messages = load(OUR_SOURCE)
    write = next(n for n, m in enumerate(messages) if _is(m, Command.REGION_WRITE))
    quiet = replace(messages[write], header=messages[write].header._replace(flags=0x10))
    messages[write : write + 2] = [quiet]
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        played = pool.submit(replay, "server", theirs, messages, 10)
        assert replay("client", ours, messages, 10) == []
        assert played.result(10) == []
