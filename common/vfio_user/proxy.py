"""A proxy between a vfio-user client and a server: it passes everything on unchanged, and records what it has passed.

A message goes on as a whole, with its descriptors, in one piece where the socket takes it: some servers lose bodies
that come in pieces, and descriptors must stay with the message that they came with. So each direction holds at most one
message, and reads no further until that is gone: who does not read slows down who sends, as without a proxy.

If the server offers a twin socket, it passes as any descriptor, and what is said on it is not seen here.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import Final

from common.vfio_user.codec import HEADER_SIZE, MAX_REPLY_SIZE, Header
from common.vfio_user.transcript import MAX_FDS, Recorded, Sender

__all__ = ["ProxyError", "relay"]

_ANCILLARY: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class ProxyError(Exception):
    """What came cannot be passed on: one line that says why."""


def relay(client: socket.socket, server: socket.socket, record: Callable[[Recorded], None], ended: int) -> str:
    """Pass messages on until either side closes, or the descriptor `ended` can be read; return what ended it.

    `record` gets each message when it is whole, before it goes on: no reply comes before its command. Raise ProxyError
    for what is no message, and whatever `record` raises. The sockets stay open.
    """
    ways = (_Way("client", client, server, record), _Way("server", server, client, record))
    for sock in (client, server):
        sock.settimeout(0)
    try:
        while True:
            for way in ways:
                if way.closed and not way.waits:
                    return f"the {way.sender} has closed the connection{' within a message' if way.cut else ''}"
            if all(way.dead for way in ways):
                return "both sides have closed the connection"
            # Anew each time: a socket that is polled for nothing still says, over and over, that it was closed.
            poller = select.poll()
            poller.register(ended, select.POLLIN)
            wanted = {client: 0, server: 0}
            for way in (way for way in ways if not way.dead):
                wanted[way.target if way.waits else way.source] |= select.POLLOUT if way.waits else select.POLLIN
            for sock, events in wanted.items():
                if events:
                    poller.register(sock, events)
            if ended in dict(poller.poll()):
                return "told to end"
            for way in ways:
                way.go_on()
    finally:
        for way in ways:
            way.close_fds()


class _Way:
    """One direction: the message that is being read, or waits to be sent."""

    def __init__(
        self, sender: Sender, source: socket.socket, target: socket.socket, record: Callable[[Recorded], None]
    ) -> None:
        self.sender = sender
        self.source = source
        self.target = target
        self.closed = False
        self.cut = False
        self.waits = False
        self.dead = False  # nobody is there to read; what the other way still brings is passed on
        self._record = record
        self._header: Header | None = None
        self._buffer = bytearray(HEADER_SIZE)
        self._at = 0  # bytes read, or, while it waits, sent
        self._fds: list[int] = []

    def close_fds(self) -> None:
        """Close what has not been passed on."""
        while self._fds:
            os.close(self._fds.pop())

    def go_on(self) -> None:
        """Read and send as far as both sockets allow now, at most a message."""
        with contextlib.suppress(BlockingIOError):
            while not (self.waits or self.closed or self.dead):
                self._read()
            while self.waits:
                self._send()

    def _read(self) -> None:
        with memoryview(self._buffer) as view:
            try:
                count, ancillary, flags, _ = self.source.recvmsg_into(
                    [view[self._at :]], _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError:
                count, ancillary, flags = 0, [], 0
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights = array.array("i")
                rights.frombytes(payload[: len(payload) - len(payload) % rights.itemsize])
                self._fds += rights
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise ProxyError(f"the {self.sender}: descriptors cannot be passed on (limit of open files?)")
        self._at += count
        if not count:
            self.closed = True
            self.cut = bool(self._at)
            if self.cut:
                del self._buffer[self._at :]
                self._wait()
        elif self._at == len(self._buffer):
            self._whole()

    def _whole(self) -> None:
        if self._header is None:
            try:
                self._header = Header.unpack(self._buffer, MAX_REPLY_SIZE)
            except ValueError as error:
                raise ProxyError(f"the {self.sender}: what came is no message: {error}") from None
            self._buffer.extend(bytes(self._header.size - HEADER_SIZE))
            if len(self._buffer) > HEADER_SIZE:
                return
        with memoryview(self._buffer)[HEADER_SIZE:] as view:
            body = bytes(view)
        self._record(Recorded(self.sender, self._header, len(self._fds), body))
        self._wait()

    def _wait(self) -> None:
        self.waits = True
        self._at = 0

    def _send(self) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._fds))] if self._fds else []
        try:
            with memoryview(self._buffer) as view:
                self._at += self.target.sendmsg([view[self._at :]], rights, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            self._at = len(self._buffer)
            self.dead = True
        self.close_fds()
        if self._at == len(self._buffer):
            self.waits = False
            self._header, self._buffer, self._at = None, bytearray(HEADER_SIZE), 0
