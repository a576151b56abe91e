"""Our client in the place of a captured one, with the answers that the captured one got."""

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from captures import DESTINATION, SOURCE, answered

from common.vfio.feature import (
    FEATURE_GET,
    FEATURE_PROBE,
    DeviceFeature,
    LoggingReport,
    pack_device_state,
    pack_migration_flags,
)
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.client import DeviceError, VfioUserClient
from common.vfio_user.codec import Command, Feature, Header, MigData
from common.vfio_user.description import Area, DeviceInfo, RegionInfo
from common.vfio_user.transcript import Recorded

SAMPLE_BYTES = b"".join(letter * 1024 for letter in (b"A", b"B", b"C", b"D"))
PAGE = 4096


def receive(sock: socket.socket) -> tuple[Header, bytes, int]:
    data, fds, _, _ = socket.recv_fds(sock, 16, 8)
    if not data:
        raise EOFError
    header = Header.unpack(data, 1 << 20)
    body = b""
    while len(body) < header.size - 16:
        body += sock.recv(header.size - 16 - len(body))
    for fd in fds:
        os.close(fd)
    return header, body, len(fds)


def send(sock: socket.socket, header: Header, body: bytes, number_of_fds: int) -> None:
    fds = [os.eventfd(0) for _ in range(number_of_fds)]
    socket.send_fds(sock, [header.pack() + body], fds)
    for fd in fds:
        os.close(fd)


class CapturedServer:
    """Answers a command with what the captured server answered to the same bytes, and others as that one would."""

    def __init__(self, path: Path, changed: dict[int, bytes] | None = None) -> None:
        """`changed`: commands, or features that are got, with the body that answers all of them."""
        self._answers: dict[tuple[int, bytes], list[Recorded]] = {}
        for command, reply in answered(path):
            # VERSION is ours; the rest has to be what that client sent.
            number = command.header.command
            key = (number, b"" if number == Command.VERSION else command.body)
            self._answers.setdefault(key, []).append(reply)
        self._changed = changed or {}
        self._running = pack_device_state(DeviceState.RUNNING)
        self.captured: list[Command] = []
        self.others: list[Command] = []
        self.sizes: list[int] = []

    @contextmanager
    def client(self) -> Iterator[VfioUserClient]:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self._serve, args=(theirs,))
        thread.start()
        try:
            with VfioUserClient(ours, "sample", timeout=10) as client:
                self.others.clear()
                self.sizes.clear()
                yield client
        finally:
            thread.join(10)
            assert not thread.is_alive()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(EOFError):
            while True:
                header, body, _ = receive(sock)
                self.sizes.append(header.size)
                error, fds, answer = self._answer(Command(header.command), body)
                flags = 0x21 if error else 0x01
                reply = Header(header.message_id, header.command, 16 + len(answer), flags, error)
                send(sock, reply, answer, fds)

    def _answer(self, command: Command, body: bytes) -> tuple[int, int, bytes]:
        number = Feature.unpack(body).flags if command == Command.DEVICE_FEATURE else 0
        for key in (command, number & ~FEATURE_GET if number & FEATURE_GET else -1):
            if key in self._changed:
                return 0, 0, self._changed[key]
        replies = self._answers.get((command, b"" if command == Command.VERSION else body))
        if replies:
            self.captured.append(command)
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            return reply.header.error, reply.fds, reply.body
        self.others.append(command)
        match number:
            case _ if number == DeviceFeature.MIGRATION | FEATURE_GET:
                return 0, 0, Feature(16, number).pack() + pack_migration_flags(5)
            case _ if number == DeviceFeature.MIG_DEVICE_STATE | FEATURE_GET:
                return 0, 0, Feature(16, number).pack() + self._running
            case _ if number & FEATURE_PROBE or body[8:] == self._running:
                return 0, 0, body
        return errno.EINVAL, 0, b""


def test_our_client_asks_as_the_captured_source() -> None:
    server = CapturedServer(SOURCE)
    with server.client() as client:
        assert client.extension is None
        assert client.migration_flags == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
        assert client.dma_logging
        assert [region.size for region in client.regions] == [8, 0x3000, 0, 0, 0, 0, 0, 0x100, 0]
        assert client.regions[1].fd is not None
        assert client.regions[1].areas == (Area(0, 0x1000), Area(0x2000, 0x1000))
        assert [irq.count for irq in client.irqs] == [1, 0, 0, 1, 1]
        # The description went over in the captured client's bytes.
        assert server.captured.count(Command.DEVICE_GET_REGION_INFO) == 10
        assert server.captured.count(Command.DEVICE_GET_IRQ_INFO) == 5
        assert len(client.region_read(7, 0, 64)) == 64
        client.reset()
        server.others.clear()  # it looks at the state afterwards
        memory = os.memfd_create("ram")
        client.dma_map(0x3000, PAGE, 3, memory, 0x3000)
        os.close(memory)
        interrupt = os.eventfd(0)
        client.set_irqs(0, 0x24, 0, 1, fds=[interrupt])
        os.close(interrupt)
        assert client.logging_start(PAGE, []) == PAGE
        pages = [client.logging_report(page * PAGE, PAGE, PAGE).tolist() for page in range(16)]
        assert pages == [[0], [1]] + [[0]] * 14
        client.logging_stop()
        client.dma_unmap(0x7000, PAGE)
        client.set_state(DeviceState.PRE_COPY)
        assert len(client.mig_data_read(1024)) == 1024
        client.set_state(DeviceState.STOP_COPY)
        sizes = []
        while data := client.mig_data_read(1024):
            sizes.append(len(data))
            if len(data) < 1024:
                break
        assert sizes[-1] == 8
        client.set_state(DeviceState.STOP)
        assert server.others == []
        assert client.precopy_info() is None and client.stop_copy_length() is None
        with pytest.raises(DeviceError, match="region 3735928559"):
            client.region_read(0xDEADBEEF, 0, 4)


def test_our_client_asks_as_the_captured_destination() -> None:
    state = [c.body[8:] for c, _ in answered(DESTINATION) if c.header.command == Command.MIG_DATA_WRITE]
    # This conversation does not describe the device: one without regions and interrupts.
    server = CapturedServer(DESTINATION, {Command.DEVICE_GET_INFO: DeviceInfo(3, 0, 0).pack()})
    with server.client() as client:
        client.set_state(DeviceState.RESUMING)
        for part in state:
            client.mig_data_write(part)
        client.set_state(DeviceState.STOP)
        assert len(client.region_read(1, 0, 0x3000)) == 0x3000
        client.set_state(DeviceState.RUNNING)
        assert server.others == []
        assert server.captured.count(Command.MIG_DATA_WRITE) == len(state) == 13


def test_data_for_others_go_in_pieces_that_they_can_read() -> None:
    server = CapturedServer(SOURCE, {Command.MIG_DATA_WRITE: b"", Command.REGION_WRITE: bytes(16)})
    with server.client() as client:
        client.mig_data_write(bytes(100_000))
        client.region_write(1, 0, bytes(40_000))
    assert server.sizes == [32768 + 24] * 3 + [100_000 - 3 * 32768 + 24, 32768 + 32, 40_000 - 32768 + 32]


# Answers that no server should give.


def nonsense(changed: dict[int, bytes], call: Callable[[VfioUserClient], object]) -> str:
    with CapturedServer(SOURCE, changed).client() as client, pytest.raises(DeviceError) as caught:
        call(client)
    assert caught.value.errno == errno.EPROTO
    return str(caught.value)


def test_success_without_a_bitmap_is_no_report() -> None:
    """libvfio-user answers so to a report over two mappings."""
    report = {int(DeviceFeature.DMA_LOGGING_REPORT): b""}
    assert "without the bitmap" in nonsense(report, lambda client: client.logging_report(0, 2 * PAGE, PAGE))


def test_a_report_about_something_else_is_no_report() -> None:
    answer = Feature(40, 0).pack() + LoggingReport(PAGE, PAGE, PAGE).pack() + bytes(8)
    report = {int(DeviceFeature.DMA_LOGGING_REPORT): answer}
    nonsense(report, lambda client: client.logging_report(0, PAGE, PAGE))


def test_bits_beyond_the_range_are_no_pages() -> None:
    answer = Feature(40, 0).pack() + LoggingReport(0, 3 * PAGE, PAGE).pack() + b"\xff" * 8
    with CapturedServer(SOURCE, {int(DeviceFeature.DMA_LOGGING_REPORT): answer}).client() as client:
        assert client.logging_report(0, 3 * PAGE, PAGE).tolist() == [7]


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (Command.MIG_DATA_READ, b""),
        (Command.MIG_DATA_READ, MigData(8).pack() + bytes(7)),
        (Command.MIG_DATA_READ, MigData(1025).pack() + bytes(1025)),
        (DeviceFeature.MIG_DEVICE_STATE, Feature(16, 0).pack() + pack_device_state(8)),
        (DeviceFeature.MIG_DEVICE_STATE, Feature(16, 0).pack()),
        (Command.REGION_READ, bytes(16 + 3)),
        (Command.DEVICE_GET_REGION_IO_FDS, bytes(15)),
        (Command.DEVICE_GET_REGION_IO_FDS, b"\xff" * 16),
    ],
)
def test_answers_that_make_no_sense(command: int, answer: bytes) -> None:
    calls: dict[int, Callable[[VfioUserClient], object]] = {
        Command.MIG_DATA_READ: lambda client: client.mig_data_read(1024),
        DeviceFeature.MIG_DEVICE_STATE: lambda client: client.get_state(),
        Command.REGION_READ: lambda client: client.region_read(0, 0, 4),
        Command.DEVICE_GET_REGION_IO_FDS: lambda client: client.get_region_io_fds(0),
    }
    server = CapturedServer(SOURCE)
    with server.client() as client:
        server._changed[command] = answer
        with pytest.raises(DeviceError) as caught:
            calls[command](client)
        assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (Command.VERSION, b"\1\0\0\0"),
        (Command.VERSION, b"\0\0\0\0{"),
        (Command.DEVICE_GET_INFO, DeviceInfo(3, 2**32 - 1, 0).pack()),
        (Command.DEVICE_GET_INFO, DeviceInfo(3, 0, 257).pack()),
        (Command.DEVICE_GET_REGION_INFO, RegionInfo(0).pack(32)[:31]),
        (Command.DEVICE_GET_REGION_INFO, b"\xff\xff\xff\x7f" + bytes(28)),
    ],
)
def test_devices_that_describe_themselves_as_nonsense(command: int, answer: bytes) -> None:
    with pytest.raises(DeviceError) as caught, CapturedServer(SOURCE, {command: answer}).client():
        pass
    assert caught.value.errno == errno.EPROTO


def test_descriptors_that_nobody_asked_for_are_closed() -> None:
    class Generous(CapturedServer):
        def _answer(self, command: Command, body: bytes) -> tuple[int, int, bytes]:
            error, fds, answer = super()._answer(command, body)
            return error, fds + 1, answer

    before = len(os.listdir("/proc/self/fd"))
    with Generous(SOURCE).client() as client:
        client.region_read(7, 0, 64)
        with pytest.raises(DeviceError):
            client.region_read(8, 0, 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_enomsg_is_nothing_now_in_pre_copy_and_an_error_in_stop_copy() -> None:
    class Silent(CapturedServer):
        def _answer(self, command: Command, body: bytes) -> tuple[int, int, bytes]:
            return (errno.ENOMSG, 0, b"") if command == Command.MIG_DATA_READ else super()._answer(command, body)

    server = Silent(SOURCE)
    with server.client() as client:
        server._running = pack_device_state(DeviceState.PRE_COPY)
        assert len(client.mig_data_read(64)) == 0
        server._running = pack_device_state(DeviceState.STOP_COPY)
        with pytest.raises(DeviceError) as caught:
            client.mig_data_read(64)
        assert caught.value.errno == errno.ENOMSG
