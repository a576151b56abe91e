"""A server that sends its own commands on a socket of their own, as libvfio-user does where a client offers that."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.vfio_user import codec
from common.vfio_user.capabilities import Capabilities, TwinSocket
from common.vfio_user.codec import Command, Version
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
