"""The socket of a TCP page lane, with or without TLS: whole buffers, from and into guest RAM.

It blocks, so that the kernel moves a batch in one call with the interpreter unlocked; with TLS it is a call for each
part that is sent and for each record that is received. One thread sends and receives, others may only `shutdown` it:
OpenSSL's connections are not for two threads at once. A peer that is gone is found by TCP itself, as by gRPC's pings
(`common.rpc.channel`), within 9 s.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Sequence
from typing import TypeVar

from common.ipc.channel import Buffer

__all__ = ["LaneSocket"]

Received = TypeVar("Received", bytes, int)

_IDLE_S, _INTERVAL_S, _PROBES = 5, 2, 2
# Bytes that wait in the kernel to be sent. What is more is out of the processor's caches when it is sent: over loopback
# that costs a fifth of the speed. What is on its way is not limited by it.
_UNSENT = 128 << 10
# With TLS a part is a record and a system call at least: more parts than this are put together.
_FEW = 64
_DEAD_MS = (_IDLE_S + _INTERVAL_S * _PROBES) * 1000


class LaneSocket:
    """A connection. Every failure is OSError; ConnectionError if the other side has closed it."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext | None, server: str | None) -> None:
        """Take over a connection, `server` is the name of the other side if that is one; with TLS `begin` comes first.

        The connection is closed if that fails.
        """
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_MS)
            if context is None:
                self._socket = connection
            else:
                self._socket = context.wrap_socket(
                    connection, server_side=server is None, server_hostname=server, do_handshake_on_connect=False
                )
        except BaseException:
            connection.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def begin(self, seconds: float, *, send: bytes = b"", receive: int = 0) -> bytes:
        """Shake hands, send and receive these few bytes, all of it within a time however slowly they come."""
        deadline = time.monotonic() + seconds
        received = b""
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                self._socket.settimeout(seconds)
                self._socket.do_handshake()
            self._limit(deadline)
            self._socket.sendall(send)
            while len(received) < receive:
                self._limit(deadline)
                received += _some(self._socket.recv(receive - len(received)))
        finally:
            self._socket.settimeout(None)
        return received

    def _limit(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long to begin")
        self._socket.settimeout(left)

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send all of the parts, which are not copied."""
        if isinstance(self._socket, ssl.SSLSocket):
            for part in parts if len(parts) <= _FEW else [b"".join(parts)]:
                self._socket.sendall(part)
            return
        left = _after(parts, self._socket.sendmsg(parts))
        while left:
            left = _after(left, self._socket.sendmsg(left))

    def receive(self, parts: Sequence[memoryview]) -> None:
        """Fill all of the parts."""
        if isinstance(self._socket, ssl.SSLSocket):
            for part in parts:
                missing = part
                while missing:
                    missing = missing[_some(self._socket.recv_into(missing)) :]
            return
        left = parts
        while left:
            left = _after(left, _some(self._socket.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]))

    def receive_some(self, size: int) -> bytes:
        """Wait for bytes, and return what there is."""
        return _some(self._socket.recv(size))

    def is_readable(self) -> bool:
        """Return whether something has come; with TLS it may be nothing for us yet."""
        return bool(self._poll.poll(0))

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """End it for whoever waits for it, from any thread."""
        # Not SSLSocket's own, which makes a plain socket of it.
        try:
            socket.socket.shutdown(self._socket, how)
        except OSError:
            return  # it is not connected any more

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()


def _some(received: Received) -> Received:
    if not received:
        raise ConnectionError("the connection was closed")
    return received


def _after(parts: Sequence[Buffer], done: int) -> list[memoryview]:
    """Return what is left of the parts after so many bytes."""
    for index, part in enumerate(parts):
        if done < len(part):
            return [memoryview(part)[done:], *(memoryview(later) for later in parts[index + 1 :])]
        done -= len(part)
    return []
