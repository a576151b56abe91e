"""A proxy between real sockets: everything passes unchanged, is recorded, and nothing is left behind."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from fake_device import FakeDevice, serving

from common.vfio.migration import DeviceState
from common.vfio_user.client import DeviceError, VfioUserClient
from common.vfio_user.codec import MAX_REPLY_SIZE, Command, Header
from common.vfio_user.proxy import ProxyError, relay
from common.vfio_user.transcript import Recorded


class Relaying:
    """A relay on a thread; `client` and `server` are the outer ends of its two connections."""

    def __init__(self, server: socket.socket | None = None) -> None:
        self.messages: list[Recorded] = []
        self.client, self._to_client = socket.socketpair()
        self.server, self._to_server = (None, server) if server else socket.socketpair()
        for sock in filter(None, (self.client, self.server)):
            sock.settimeout(10)
        self.ended = os.eventfd(0)
        self.how: str | BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.how = relay(self._to_client, self._to_server, self.messages.append, self.ended)
        except ProxyError as error:
            self.how = error
        finally:
            self._to_client.close()
            self._to_server.close()

    def wait(self) -> str:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return str(self.how)

    def close(self) -> None:
        os.eventfd_write(self.ended, 1)
        self.wait()
        os.close(self.ended)
        for sock in filter(None, (self.client, self.server)):
            sock.close()


@contextlib.contextmanager
def relaying(server: socket.socket | None = None) -> Iterator[Relaying]:
    before = len(os.listdir("/proc/self/fd"))
    proxy = Relaying(server)
    try:
        yield proxy
    finally:
        proxy.close()
    if server is None:
        assert len(os.listdir("/proc/self/fd")) == before


def packed(body: bytes, *, command: int = 9, flags: int = 0, message_id: int = 1) -> bytes:
    return Header(message_id, command, 16 + len(body), flags).pack() + body


def receive(sock: socket.socket, count: int) -> tuple[bytes, list[int]]:
    """As servers do: descriptors are taken while the header is read."""
    data, fds, _, _ = socket.recv_fds(sock, 16, 64)
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part
        data += part
    return data, fds


def test_our_client_and_our_device_do_not_notice_it() -> None:
    device = FakeDevice()
    device.stream = state = os.urandom(3 << 20)
    device.memory[0][:4] = b"abcd"
    with serving(device) as server, relaying(server) as proxy:
        with VfioUserClient(proxy.client, "fake0", timeout=10) as client:
            memory = os.memfd_create("ram")
            os.pwrite(memory, b"here", 4096)
            client.dma_map(0x10000, 4096, 3, memory, 4096)
            os.close(memory)
            interrupts = [os.eventfd(0) for _ in range(20)]
            client.set_irqs(2, 0x24, 3, 20, fds=interrupts)
            assert [os.eventfd_read(fd) for fd in interrupts] == [start + 1 for start in [3] * 8 + [11] * 8 + [19] * 4]
            assert client.region_read(0, 0, 4) == b"abcd"
            client.set_state(DeviceState.STOP_COPY)
            assert b"".join(iter(lambda: bytes(client.mig_data_read(1 << 20)), b"")) == state
        assert proxy.wait() == "the client has closed the connection"
    assert device.mappings == {0x10000: (4096, 3, 4096, b"here")}
    commands = [message for message in proxy.messages if not message.header.is_reply]
    assert len(commands) * 2 == len(proxy.messages)
    irqs = [message.fds for message in commands if message.header.command == Command.DEVICE_SET_IRQS]
    assert irqs == [8, 8, 4]
    assert sum(m.fds for m in commands) == 21


def test_descriptors_stay_with_their_message() -> None:
    with relaying() as proxy:
        files = [os.memfd_create(name) for name in ("first", "second", "third")]
        for number, fd in enumerate(files):
            os.pwrite(fd, bytes([number]), 0)
        socket.send_fds(proxy.client, [packed(b"none")], [])
        socket.send_fds(proxy.client, [packed(b"one")], files[:1])
        socket.send_fds(proxy.client, [packed(b"two")], files[1:])
        # In pieces, the descriptor with the first byte.
        message = packed(b"pieces")
        socket.send_fds(proxy.client, [message[:1]], files[2:])
        for at in range(1, len(message)):
            proxy.client.sendall(message[at : at + 1])
        for fd in files:
            os.close(fd)
        found = []
        for size in (20, 19, 19, 22):
            _, fds = receive(proxy.server, size)
            found.append([os.pread(fd, 1, 0)[0] for fd in fds])
            for fd in fds:
                os.close(fd)
        assert found == [[], [0], [1, 2], [2]]
        assert [message.fds for message in proxy.messages] == [0, 1, 2, 1]
        assert [message.body for message in proxy.messages] == [b"none", b"one", b"two", b"pieces"]


def test_bytes_pass_unchanged_both_ways_while_nobody_reads_for_a_while() -> None:
    sizes = [0, 1, 70_000, 1 << 20, 3, 4 << 20, 17]
    sent = {
        side: [packed(os.urandom(size), message_id=number) for number, size in enumerate(sizes)]
        for side in ("client", "server")
    }
    with relaying() as proxy:
        senders = []
        for side, messages in sent.items():
            sock = getattr(proxy, side)
            senders.append(threading.Thread(target=sock.sendall, args=(b"".join(messages),)))
            senders[-1].start()
        senders[0].join(0.3)
        assert senders[0].is_alive()  # the proxy holds one message a way, no more
        total = sum(map(len, sent["client"]))
        for side, other in (("client", "server"), ("server", "client")):
            data = b""
            while len(data) < total:
                data += getattr(proxy, other).recv(1 << 20)
            assert data == b"".join(sent[side])
            assert [m.header.pack() + m.body for m in proxy.messages if m.sender == side] == sent[side]
        for sender in senders:
            sender.join(10)


def test_a_command_is_recorded_before_its_reply() -> None:
    with relaying() as proxy:
        for number in range(300):
            proxy.client.sendall(packed(b"ask", message_id=number))
            receive(proxy.server, 19)
            proxy.server.sendall(packed(b"told", flags=1, message_id=number))
            receive(proxy.client, 20)
        assert [m.sender for m in proxy.messages] == ["client", "server"] * 300


@pytest.mark.parametrize("side", ["client", "server"])
def test_it_ends_when_a_side_ends_and_passes_on_what_was_sent(side: str) -> None:
    with relaying() as proxy:
        ends, stays = (proxy.client, proxy.server) if side == "client" else (proxy.server, proxy.client)
        whole = packed(b"last words")
        ends.sendall(whole + packed(b"and")[:18])
        ends.close()
        assert proxy.wait() == f"the {side} has closed the connection within a message"
        assert stays.recv(100, socket.MSG_WAITALL) == whole + packed(b"and")[:18]
        assert [message.body for message in proxy.messages] == [b"last words"]


def test_the_last_reply_arrives_though_the_server_has_gone_and_nobody_hears_the_client() -> None:
    with relaying() as proxy:
        reply = packed(bytes(1 << 20), flags=1)
        sender = threading.Thread(target=proxy.server.sendall, args=(reply * 2,))
        sender.start()
        proxy.client.sendall(packed(b"x"))
        receive(proxy.server, 17)
        data = b""
        while len(data) < len(reply):
            data += proxy.client.recv(1 << 20)
        sender.join(10)
        proxy.server.close()
        with contextlib.suppress(OSError):
            proxy.client.sendall(packed(b"too late"))
        while len(data) < 2 * len(reply):
            part = proxy.client.recv(1 << 20)
            assert part
            data += part
        assert data == reply * 2
        assert "closed the connection" in proxy.wait()


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (Header(1, 1, 15), "a message of 15 bytes"),
        (Header(1, 1, MAX_REPLY_SIZE + 1), f"a message of {MAX_REPLY_SIZE + 1} bytes"),
        (Header(1, 1, 16, 3), "a message of type 3"),
    ],
)
def test_what_is_no_message_ends_it(header: Header, text: str) -> None:
    with relaying() as proxy:
        fd = os.eventfd(0)
        socket.send_fds(proxy.client, [header.pack()], [fd])
        os.close(fd)
        assert f"the client: what came is no message: {text}" in proxy.wait()
        assert proxy.server.recv(1) == b""
        assert proxy.messages == []


def test_a_twin_socket_passes_and_is_noticed() -> None:
    with relaying() as proxy:
        proxy.client.sendall(packed(b"\0\0\2\0", command=Command.VERSION))
        receive(proxy.server, 20)
        ours, theirs = socket.socketpair()
        socket.send_fds(proxy.server, [packed(b"\0\0\2\0", command=Command.VERSION, flags=1)], [theirs.fileno()])
        theirs.close()
        _, (fd,) = receive(proxy.client, 20)
        with ours, socket.socket(fileno=fd) as twin:
            twin.sendall(b"beside")
            assert ours.recv(6) == b"beside"
        assert [message.opens_twin_socket for message in proxy.messages] == [False, True]


def test_what_the_client_meets_is_what_the_server_does() -> None:
    device = FakeDevice()
    with serving(device) as server, relaying(server) as proxy, VfioUserClient(proxy.client, "f", timeout=10) as client:
        device.refuse = 5
        with pytest.raises(DeviceError, match="Input/output error"):
            client.region_read(0, 0, 1)
        assert proxy.messages[-1].header.refusal == 5
