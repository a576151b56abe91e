"""A connection on which both sides ask: messages with descriptors over a unix stream socket.

Client and server send commands and answer the other's, on one socket, and a reply may come behind a command of the
other side. A dispatcher thread would cost two switches of threads for each reply, so there is none: **whoever asks
reads the socket himself** until his reply is there, and puts aside what he finds on the way. Only while nobody asks,
the one thread that answers commands (`next_command`) waits for the socket, in epoll; whoever asks takes the socket out
of epoll for that time, which costs little, and wakes that thread when he finds a command for it.

* `_turn` is the right to read and to ask. It is never held while a command is carried out: a command may need an answer
  that waits for this very thread, even through other connections.
* Whoever asks a side that has just answered within 0.1 ms looks for the reply so long before he sleeps, as KVM polls
  before it halts a vCPU: to sleep and to be woken takes as long as a brisk answer. So does whoever answers, until once
  nothing comes in that time; then he sleeps at once the next few times, so that looking costs nothing to speak of where
  requests are rare or processors are busy.
* What is there is read, small messages several at once. A message is read in pieces if it comes in pieces, by whoever
  has the turn then. So nobody who wants to send waits for the rest of somebody's message: two sides that send each
  other more than the socket buffers hold would stop for ever.
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

import numpy as np

from common.vfio.feature import Buffer
from common.vfio_user.codec import FLAG_ERROR, FLAG_NO_REPLY, FLAG_REPLY, HEADER, HEADER_SIZE, Header

__all__ = ["Connection", "ConnectionLostError", "Message"]

# As plain numbers: the enumerations of `socket` and `select` would cost more than the system calls.
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_DONTWAIT = int(socket.MSG_DONTWAIT)
_NOSIGNAL = int(socket.MSG_NOSIGNAL)
_TRUNCATED = int(socket.MSG_CTRUNC)
_WAITALL = int(socket.MSG_WAITALL)
_MAX_FDS = 64
_ANCILLARY = socket.CMSG_SPACE(_MAX_FDS * 4)
# Most messages are smaller, and read at once.
_ROOM = 512
_MAX_QUEUED = 64 << 20
_QUEUED_OVERHEAD = 1 << 10
_BRISK_SECONDS = 100e-6
_NAPS = 32


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
    `commands_bring_fds`: whether the other side's commands may; otherwise the kernel drops those that do.
    `timeout`: seconds to wait for a reply, or until a message is taken, None for ever (a side that drips bytes may take
    up to twice that); whoever waited in vain loses the connection, for its replies could no longer be told from each
    other.
    """

    def __init__(
        self, sock: socket.socket, *, limit: int, timeout: float | None = None, commands_bring_fds: bool = True
    ) -> None:
        self.closed = threading.Event()
        self._sock = sock
        self._fd = sock.fileno()
        self._limit = limit
        self._timeout = timeout
        self._commands_bring_fds = self._takes_fds = commands_bring_fds
        self._turn = threading.Lock()
        self._sending = threading.Lock()
        self._last_id = 0
        self._queue: deque[Message] = deque()
        # Bytes put aside so far, written with the turn, and taken from there, written by the thread that answers.
        self._put = 0
        self._taken = 0
        self._reason: str | None = None
        # What has been read of a message that is not complete.
        self._room = memoryview(bytearray(_ROOM))
        self._large: Header | None = None  # of a message that does not fit into the room: it goes into `_body`
        self._body = self._room
        self._filled = 0
        self._fds: list[int] = []
        sock.settimeout(None)
        if timeout is not None:
            seconds = struct.pack("@ll", int(timeout), max(int(timeout % 1 * 1_000_000), 1))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        self._brisk = False
        self._naps = 0
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._epoll.register(sock, select.EPOLLIN)

    def request(
        self, command: int, parts: Sequence[Buffer] = (), fds: Sequence[int] = (), *, keep_fds: bool = True
    ) -> Message:
        """Send a command, its body in parts, and return the reply, be it a refusal.

        `keep_fds` False: the reply has no business to bring descriptors, which costs a tenth of a small request.

        Raise `ConnectionLostError`.
        """
        with self._turn:
            if self._reason is not None:
                raise ConnectionLostError(errno.ENOTCONN, self._reason)
            self._epoll.modify(self._fd, 0)
            self._takes_fds = keep_fds or self._commands_bring_fds
            try:
                self._last_id = number = (self._last_id + 1) & 0xFFFF
                reply = self._send(number, command, 0, 0, parts, fds)
                began = time.perf_counter()
                if self._brisk:
                    while not self._readable.poll(0) and time.perf_counter() - began < _BRISK_SECONDS:
                        pass
                while reply is None:
                    if self._timeout is not None and time.perf_counter() - began > self._timeout:
                        raise self._lose(f"no reply within {self._timeout} seconds")
                    reply = self._read_reply()
                self._brisk = time.perf_counter() - began < _BRISK_SECONDS
                if reply.header.message_id != number or reply.header.command != command:
                    reply.close_fds()
                    raise self._lose("the reply is to another command")
                return reply
            finally:
                self._takes_fds = self._commands_bring_fds
                if self._reason is None:
                    self._epoll.modify(self._fd, select.EPOLLIN)

    def post(self, command: int, parts: Sequence[Buffer] = (), fds: Sequence[int] = ()) -> None:
        """Send a command that wants no reply. Raise `ConnectionLostError`."""
        with self._turn:
            if self._reason is not None:
                raise ConnectionLostError(errno.ENOTCONN, self._reason)
            self._last_id = (self._last_id + 1) & 0xFFFF
            if self._send(self._last_id, command, FLAG_NO_REPLY, 0, parts, fds) is not None:
                raise self._lose("a reply to no command came")

    def reply(self, command: Message, parts: Sequence[Buffer] = (), fds: Sequence[int] = (), *, error: int = 0) -> None:
        """Answer a command, or refuse it with an errno; nothing is sent if it wants no reply.

        Raise `ConnectionLostError`.
        """
        if not command.wants_reply:
            return
        flags = FLAG_REPLY | FLAG_ERROR if error else FLAG_REPLY
        self._send(command.header.message_id, command.header.command, flags, error, parts, fds)

    def next_command(self) -> Message | None:
        """Wait for the other side's next command; None when the connection is lost. For one thread only."""
        while True:
            if self._queue:
                command = self._queue.popleft()
                self._taken += len(command.body) + _QUEUED_OVERHEAD
                return command
            if self._reason is not None:
                return None
            for fd, _ in self._wait():
                if fd == self._wake:
                    os.eventfd_read(fd)
                # Somebody who asks may have taken the turn in between: then he reads, and wakes this thread.
                elif self._turn.acquire(blocking=False):
                    try:
                        self._read_commands()
                    finally:
                        self._turn.release()

    def _wait(self) -> list[tuple[int, int]]:
        """Wait for the socket, or to be woken."""
        if self._naps:
            self._naps -= 1
            return self._epoll.poll()
        began = time.perf_counter()
        while not (found := self._epoll.poll(0)):
            if time.perf_counter() - began > _BRISK_SECONDS:
                self._naps = _NAPS
                return self._epoll.poll()
        return found

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

    # Reading: only with the turn. What has come is looked through at once, so that only the start of a message is left
    # where epoll does not see it.

    def _read_commands(self) -> None:
        """Read what is there; for the thread that answers commands."""
        try:
            reply = self._read(_DONTWAIT)
            if reply is not None:
                reply.close_fds()
                self._lose("a reply to no command came")
        except ConnectionLostError:
            pass  # next_command sees it

    def _read_reply(self, flags: int = 0) -> Message | None:
        """Read on; return the reply once it is there, and wake whoever answers the commands that came before it."""
        put = self._put
        reply = self._read(flags)
        if self._put != put:
            # At once: the reply may have to wait until such a command is answered.
            os.eventfd_write(self._wake, 1)
        return reply

    def _read(self, flags: int) -> Message | None:
        """Read once: put commands that are complete aside, return the reply if it is."""
        large = self._large
        try:
            if large is not None:
                count = self._sock.recv_into(self._body[self._filled :], 0, flags | _WAITALL)
            else:
                room = self._room[self._filled :] if self._filled else self._room
                if self._takes_fds:
                    count, ancillary, status, _ = self._sock.recvmsg_into((room,), _ANCILLARY, flags | _CLOEXEC)
                    if ancillary or status & _TRUNCATED:
                        self._take_fds(ancillary, status)
                else:
                    count = self._sock.recv_into(room, 0, flags)
        except BlockingIOError:
            if not flags & _DONTWAIT:
                raise self._lose(f"no reply within {self._timeout} seconds") from None
            return None
        except (ConnectionResetError, BrokenPipeError):
            raise self._lose("the other side has closed the connection") from None
        if not count:
            raise self._lose("the other side has closed the connection")
        self._filled += count
        if large is None:
            return self._look_through()
        if self._filled < len(self._body):
            return None
        self._large, self._filled = None, 0
        return self._came(Message(large, self._body))

    def _look_through(self) -> Message | None:
        """Take the messages out of `_room`; what is left in it, or in `_body` if it is large, is the start of one."""
        room, end = self._room, self._filled
        at, reply = 0, None
        while end - at >= HEADER_SIZE:
            try:
                header = Header.unpack(room[at:], self._limit)
            except ValueError as error:
                raise self._lose(f"what came is no message: {error}") from None
            begin, following = at + HEADER_SIZE, at + header.size
            if following > end:
                if header.size > _ROOM:
                    self._large, self._filled = header, end - begin
                    self._body = np.empty(header.size - HEADER_SIZE, np.uint8).data
                    self._body[: end - begin] = room[begin:end]
                    return reply
                break
            message = Message(header, bytes(room[begin:following]))
            at = following
            reply = self._came(message, reply, last=at == end)
        if at < end:
            room[: end - at] = bytes(room[at:end])
        self._filled = end - at
        return reply

    def _came(self, message: Message, reply: Message | None = None, *, last: bool = True) -> Message | None:
        """Put a command aside, return a reply; `reply` is the one that came before.

        The descriptors that came are those of the `last` message of a read: the kernel ends a read behind bytes that
        have some.
        """
        if last and self._fds:
            message.fds, self._fds = self._fds, []
        if message.header.is_reply:
            if reply is None:
                return message
            message.close_fds()
            reply.close_fds()
            raise self._lose("two replies to one command came")
        self._put += len(message.body) + _QUEUED_OVERHEAD
        self._queue.append(message)
        if self._put - self._taken > _MAX_QUEUED:
            raise self._lose("too many commands came while one was waited for")
        return reply

    def _take_fds(self, ancillary: Sequence[tuple[int, int, bytes]], status: int) -> None:
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights = array.array("i")
                rights.frombytes(payload[: len(payload) - len(payload) % rights.itemsize])
                self._fds += rights
        if status & _TRUNCATED or len(self._fds) > _MAX_FDS:
            raise self._lose(f"a message with more than {_MAX_FDS} descriptors came")

    # Sending: whoever asks must go on reading while he cannot send.

    def _send(
        self, number: int, command: int, flags: int, error: int, parts: Sequence[Buffer], fds: Sequence[int]
    ) -> Message | None:
        """Send a message; return the reply to a command if it came before the command was sent to its end."""
        size = HEADER_SIZE
        for part in parts:
            size += len(part)
        buffers: Sequence[Buffer] = [HEADER.pack(number, command, size, flags, error), *parts]
        if size <= _ROOM:
            buffers = [b"".join(buffers)]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else ()
        reading = not flags & FLAG_REPLY
        options = _NOSIGNAL | _DONTWAIT if reading else _NOSIGNAL
        early = None
        with self._sending:
            sent = 0
            began = None
            try:
                while True:
                    try:
                        if size <= _ROOM and not rights and not sent:
                            sent = self._sock.send(buffers[0], options)
                        else:
                            sent += self._sock.sendmsg(_rest(buffers, sent) if sent else buffers, rights, options)
                        if sent == size:
                            return early
                        rights = ()
                    except BlockingIOError:
                        pass
                    began = began or time.monotonic()
                    left = None if self._timeout is None else began + self._timeout - time.monotonic()
                    if left is not None and left < 0:
                        raise self._lose(f"a message was not taken within {self._timeout} seconds")
                    if reading:
                        early = self._wait_to_send(left) or early
            except (BrokenPipeError, ConnectionResetError):
                raise self._lose("the other side has closed the connection") from None
            except OSError as cause:
                if self._sock.fileno() < 0:
                    raise ConnectionLostError(errno.ENOTCONN, self._reason) from None
                if sent:
                    raise self._lose(f"a message could not be sent to its end: {cause.strerror}") from None
                raise

    def _wait_to_send(self, seconds: float | None) -> Message | None:
        """Wait until some more can be sent, or a reply has come early."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN | select.POLLOUT)
        for _, events in poller.poll(None if seconds is None else seconds * 1000):
            if events & select.POLLIN:
                return self._read_reply(_DONTWAIT)
        return None


def _rest(buffers: Sequence[Buffer], sent: int) -> Sequence[Buffer]:
    """Return what is left of `buffers` after their first `sent` bytes."""
    rest = []
    for buffer in buffers:
        if sent < len(buffer):
            rest.append(memoryview(buffer)[sent:])
        sent = max(sent - len(buffer), 0)
    return rest
