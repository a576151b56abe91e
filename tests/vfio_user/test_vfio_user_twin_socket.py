"""A server that sends its own commands on a socket of their own, as libvfio-user does where a client offers that."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from common.vfio_user import codec
from common.vfio_user.capabilities import Capabilities, TwinSocket
from common.vfio_user.client import DeviceError, VfioUserClient
from common.vfio_user.codec import Command, DmaAccess, Version
from common.vfio_user.description import DeviceInfo
from common.vfio_user.transport import Connection


class TwinServer:
    """Answers what a client asks when it connects, and knows what it offered; `fds` come with the answer to VERSION."""

    def __init__(self, sock: socket.socket, fd_index: int, fds: list[int]) -> None:
        self._connection = Connection(sock, limit=codec.MAX_COMMAND_SIZE)
        self._fd_index = fd_index
        self._fds = fds
        self.offered: Capabilities | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while (command := self._connection.next_command()) is not None:
            match command.header.command:
                case Command.VERSION:
                    self.offered = Version.unpack(command.body).capabilities
                    answer = Version(0, 2, Capabilities(twin_socket=TwinSocket(self._fd_index)))
                    self._connection.reply(command, [answer.pack()], self._fds)
                case Command.DEVICE_GET_INFO:
                    self._connection.reply(command, [DeviceInfo(3, 0, 0).pack()])
                case _:
                    self._connection.reply(command, error=errno.EINVAL)
        self._connection.close()


@contextmanager
def served(fd_index: int = 0) -> Iterator[tuple[socket.socket, TwinServer, Connection]]:
    ours, theirs = socket.socketpair()
    twin, their_twin = socket.socketpair()
    server = TwinServer(theirs, fd_index, [their_twin.fileno()])
    commands = Connection(twin, limit=codec.MAX_REPLY_SIZE, timeout=5)
    try:
        yield ours, server, commands
    finally:
        server.thread.join(5)
        commands.close()
        their_twin.close()


def test_dma_by_message_comes_on_the_twin_socket() -> None:
    written: list[tuple[int, bytes]] = []
    with served() as (sock, server, commands):
        with VfioUserClient(
            sock,
            "far0",
            on_dma_read=lambda iova, count: bytes([iova & 0xFF]) * count,
            on_dma_write=lambda iova, data: written.append((iova, bytes(data))),
        ):
            assert server.offered is not None
            assert server.offered.twin_socket == TwinSocket()
            reply = commands.request(Command.DMA_WRITE, [DmaAccess(0x1000, 4).pack(), b"data"])
            assert not reply.error
            reply = commands.request(Command.DMA_READ, [DmaAccess(0x2007, 3).pack()])
            assert bytes(reply.body[codec.DMA_ACCESS_SIZE :]) == b"\x07\x07\x07"
        assert written == [(0x1000, b"data")]


def test_the_device_is_gone_with_either_socket() -> None:
    gone = threading.Event()
    with served() as (sock, _, commands):
        client = VfioUserClient(sock, "far0", on_close=gone.set)
        commands.shutdown()
        assert gone.wait(5)
        with pytest.raises(DeviceError, match="far0"):
            client.get_irq_info(0)
        client.close()


def test_a_twin_socket_that_did_not_come() -> None:
    with served(fd_index=1) as (sock, _, _), pytest.raises(DeviceError, match="twin socket") as refused:
        VfioUserClient(sock, "far0")
    assert refused.value.errno == errno.EPROTO
