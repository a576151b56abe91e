"""A connection on which both sides ask: messages with descriptors over a unix stream socket.

Client and server send commands and answer the other's, on one socket, and a reply may come behind a command of the
other side. A dispatcher thread would cost two switches of threads for each reply, so there is none: **whoever asks
reads the socket himself** until his reply is there, and puts aside what he finds on the way. Only while nobody asks,
the one thread that answers commands (`next_command`) waits for the socket, in epoll; whoever asks takes the socket out
of epoll for that time, which costs little, and wakes that thread when he finds a command for it.

* `_turn` is the right to read and to ask. It is never held while a command is carried out: a command may need an answer
  that waits for this very thread, even through other connections.
* A message is read in pieces if it comes in pieces, by whoever has the turn then. So nobody who wants to send waits for
  the rest of somebody's message: two sides that send each other more than the socket buffers hold would stop for ever.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.vfio.feature import Buffer
from common.vfio_user.codec import FLAG_ERROR, FLAG_NO_REPLY, FLAG_REPLY, HEADER_SIZE, Header

__all__ = ["Connection", "ConnectionLostError", "Message"]

# As plain numbers: the enumerations of `socket` and `select` would cost more than the system calls.
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_DONTWAIT = int(socket.MSG_DONTWAIT)
_NOSIGNAL = int(socket.MSG_NOSIGNAL)
_TRUNCATED = int(socket.MSG_CTRUNC)
_WAITALL = int(socket.MSG_WAITALL)
_MAX_FDS = 64
_ANCILLARY = socket.CMSG_SPACE(_MAX_FDS * 4)
_MAX_QUEUED = 64 << 20
_QUEUED_OVERHEAD = 1 << 10


class ConnectionLostError(ConnectionError):
    """The other side is gone, did not answer in time, or sent what cannot be read; the connection is of no use."""


@dataclass(slots=True)
class Message:
    """A message that came; whoever has it owns its descriptors, and closes those that he does not keep."""

    header: Header
    body: Buffer
    fds: list[int] = field(default_factory=list)

    @property
    def error(self) -> int:
        """The errno of a reply that refuses, or 0."""
        return self.header.refusal

    @property
    def wants_reply(self) -> bool:
        """Whether the command is to be answered."""
        return not self.header.flags & FLAG_NO_REPLY

    def close_fds(self) -> None:
        """Close the descriptors that came with the message."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


class Connection:
    """One side of a connection; it takes the socket over.

    Any number of threads may `request`, one may wait for commands. `limit`: bytes of the largest message that is read.
    `timeout`: seconds to wait for a reply, None for ever; whoever waited in vain loses the connection, for its replies
    could no longer be told from each other.
    """

    def __init__(self, sock: socket.socket, *, limit: int, timeout: float | None = None) -> None:
        self.closed = threading.Event()
        self._sock = sock
        self._fd = sock.fileno()
        self._limit = limit
        self._timeout = timeout
        self._turn = threading.Lock()
        self._sending = threading.Lock()
        self._last_id = 0
        self._queue: deque[Message] = deque()
        # Bytes put aside so far, written with the turn, and taken from there, written by the thread that answers.
        self._put = 0
        self._taken = 0
        self._reason: str | None = None
        # What has been read of a message that is not complete.
        self._start = b""
        self._header: Header | None = None
        self._body = bytearray()
        self._filled = 0
        self._fds: list[int] = []
        sock.settimeout(None)
        if timeout is not None:
            seconds = struct.pack("@ll", int(timeout), max(int(timeout % 1 * 1_000_000), 1))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._epoll.register(sock, select.EPOLLIN)

    def request(self, command: int, parts: Sequence[Buffer] = (), fds: Sequence[int] = ()) -> Message:
        """Send a command, its body in parts, and return the reply, be it a refusal.

        Raise `ConnectionLostError`.
        """
        with self._turn:
            if self._reason is not None:
                raise ConnectionLostError(errno.ENOTCONN, self._reason)
            self._epoll.modify(self._fd, 0)
            try:
                self._last_id = (self._last_id + 1) & 0xFFFF
                size = HEADER_SIZE + sum(map(len, parts))
                early = self._send(Header(self._last_id, command, size), parts, fds, reading=True)
                reply = early or self._read_reply()
                while reply is None:
                    reply = self._read_reply()
                if reply.header.message_id != self._last_id or reply.header.command != command:
                    reply.close_fds()
                    raise self._lose("the reply is to another command")
                return reply
            finally:
                if self._reason is None:
                    self._epoll.modify(self._fd, select.EPOLLIN)

    def post(self, command: int, parts: Sequence[Buffer] = (), fds: Sequence[int] = ()) -> None:
        """Send a command that wants no reply. Raise `ConnectionLostError`."""
        with self._turn:
            if self._reason is not None:
                raise ConnectionLostError(errno.ENOTCONN, self._reason)
            self._last_id = (self._last_id + 1) & 0xFFFF
            size = HEADER_SIZE + sum(map(len, parts))
            header = Header(self._last_id, command, size, FLAG_NO_REPLY)
            if self._send(header, parts, fds, reading=True) is not None:
                raise self._lose("a reply to no command came")

    def reply(self, command: Message, parts: Sequence[Buffer] = (), fds: Sequence[int] = (), *, error: int = 0) -> None:
        """Answer a command, or refuse it with an errno; nothing is sent if it wants no reply.

        Raise `ConnectionLostError`.
        """
        if not command.wants_reply:
            return
        flags = FLAG_REPLY | FLAG_ERROR if error else FLAG_REPLY
        size = HEADER_SIZE + sum(map(len, parts))
        header = Header(command.header.message_id, command.header.command, size, flags, error)
        self._send(header, parts, fds, reading=False)

    def next_command(self) -> Message | None:
        """Wait for the other side's next command; None when the connection is lost. For one thread only."""
        while True:
            if self._queue:
                command = self._queue.popleft()
                self._taken += len(command.body) + _QUEUED_OVERHEAD
                return command
            if self._reason is not None:
                return None
            for fd, _ in self._epoll.poll():
                if fd == self._wake:
                    os.eventfd_read(fd)
                # Somebody who asks may have taken the turn in between: then he reads, and wakes this thread.
                elif self._turn.acquire(blocking=False):
                    try:
                        self._read_command()
                    finally:
                        self._turn.release()

    def shutdown(self, reason: str = "the connection is closed") -> None:
        """End the connection; whoever waits on it ends with `ConnectionLostError` or None."""
        self._mark_lost(reason)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give back what the connection holds. Only when nobody waits in `next_command` any more."""
        self.shutdown()
        with self._turn:
            if self._sock.fileno() < 0:
                return
            self._sock.close()
            self._epoll.close()
            os.close(self._wake)
            for fd in self._fds:
                os.close(fd)
            self._fds.clear()
            while self._queue:
                self._queue.popleft().close_fds()

    def _mark_lost(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            self.closed.set()

    def _lose(self, reason: str) -> ConnectionLostError:
        self.shutdown(reason)
        return ConnectionLostError(errno.ENOTCONN, self._reason)

    # Reading: only with the turn.

    def _read_command(self) -> None:
        """Read what is there; for the thread that answers commands."""
        try:
            message = self._receive(_DONTWAIT)
            if message is not None and not self._put_aside(message):
                message.close_fds()
                self._lose("a reply to no command came")
        except ConnectionLostError:
            pass  # next_command sees it

    def _read_reply(self, flags: int = 0) -> Message | None:
        """Read one message: return it if it is a reply, put it aside if it is a command."""
        message = self._receive(flags)
        if message is not None and self._put_aside(message):
            # At once: the reply may have to wait until this command is answered.
            os.eventfd_write(self._wake, 1)
            return None
        return message

    def _put_aside(self, message: Message) -> bool:
        if message.header.is_reply:
            return False
        self._put += len(message.body) + _QUEUED_OVERHEAD
        self._queue.append(message)
        if self._put - self._taken > _MAX_QUEUED:
            raise self._lose("too many commands came while one was waited for")
        return True

    def _receive(self, flags: int) -> Message | None:
        """Read on; return the message once it is complete, or None if with MSG_DONTWAIT it is not."""
        try:
            header = self._header or self._receive_header(flags)
            size = header.size - HEADER_SIZE
            body = self._receive_body(size, flags) if size else b""
        except BlockingIOError:
            if not flags & _DONTWAIT:
                raise self._lose(f"no reply within {self._timeout} seconds") from None
            return None
        except (ConnectionResetError, BrokenPipeError):
            raise self._lose("the other side has closed the connection") from None
        message = Message(header, body, self._fds)
        self._header, self._fds = None, []
        return message

    def _receive_header(self, flags: int) -> Header:
        wanted = HEADER_SIZE - len(self._start)
        data, ancillary, status, _ = self._sock.recvmsg(wanted, _ANCILLARY, flags | _CLOEXEC)
        if ancillary or status & _TRUNCATED:
            self._take_fds(ancillary, status)
        if not data:
            raise self._lose("the other side has closed the connection")
        if len(data) < wanted:
            self._start += data
            return self._receive_header(flags)
        try:
            header = Header.unpack(self._start + data, self._limit)
        except ValueError as error:
            raise self._lose(f"what came is no message: {error}") from None
        self._header, self._start = header, b""
        return header

    def _take_fds(self, ancillary: Sequence[tuple[int, int, bytes]], status: int) -> None:
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights = array.array("i")
                rights.frombytes(payload[: len(payload) - len(payload) % rights.itemsize])
                self._fds += rights
        if status & _TRUNCATED or len(self._fds) > _MAX_FDS:
            raise self._lose(f"a message with more than {_MAX_FDS} descriptors came")

    def _receive_body(self, size: int, flags: int) -> Buffer:
        if not self._body:
            data = self._sock.recv(size, flags | _WAITALL)
            if len(data) == size:
                return data
            if not data:
                raise self._lose("the other side has closed the connection")
            self._body = bytearray(size)
            self._body[: len(data)] = data
            self._filled = len(data)
        with memoryview(self._body) as view:
            while self._filled < size:
                count = self._sock.recv_into(view[self._filled :], 0, flags)
                if not count:
                    raise self._lose("the other side has closed the connection")
                self._filled += count
        body, self._body = self._body, bytearray()
        return body

    # Sending: whoever asks must go on reading while he cannot send.

    def _send(self, header: Header, parts: Sequence[Buffer], fds: Sequence[int], *, reading: bool) -> Message | None:
        buffers = [header.pack(), *parts]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        flags = _NOSIGNAL | (_DONTWAIT if reading else 0)
        early = None
        with self._sending:
            sent = 0
            deadline = None
            try:
                while True:
                    try:
                        sent += self._sock.sendmsg(_rest(buffers, sent), () if sent else rights, flags)
                        if sent == header.size:
                            return early
                    except BlockingIOError:  # with `reading` only
                        deadline = deadline or (self._timeout and time.monotonic() + self._timeout)
                        early = self._wait_to_send(deadline) or early
            except (BrokenPipeError, ConnectionResetError):
                raise self._lose("the other side has closed the connection") from None
            except OSError as error:
                if self._sock.fileno() < 0:
                    raise ConnectionLostError(errno.ENOTCONN, self._reason) from None
                if sent:
                    raise self._lose(f"a message could not be sent to its end: {error.strerror}") from None
                raise

    def _wait_to_send(self, deadline: float | None) -> Message | None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN | select.POLLOUT)
        events = poller.poll(None if deadline is None else max(deadline - time.monotonic(), 0) * 1000)
        if not events:
            raise self._lose(f"nothing could be sent within {self._timeout} seconds")
        if events[0][1] & select.POLLIN:
            return self._read_reply(_DONTWAIT)
        return None


def _rest(buffers: Sequence[Buffer], sent: int) -> Sequence[Buffer]:
    """Return what is left of `buffers` after their first `sent` bytes."""
    if not sent:
        return buffers
    rest = []
    for buffer in buffers:
        if sent < len(buffer):
            rest.append(memoryview(buffer)[sent:])
        sent = max(sent - len(buffer), 0)
    return rest
