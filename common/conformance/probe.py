"""A conversation with a server in which anything can be said, and nothing is waited for without limit.

Unlike the client of `common.vfio_user` a probe sends messages that are wrong, and judges what comes back itself.
Commands of the server (DMA by message) are answered while a reply is waited for.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.conformance.check import Failure
from common.vfio.feature import Buffer
from common.vfio_user.codec import (
    FLAG_ERROR,
    FLAG_REPLY,
    HEADER_SIZE,
    MAX_REPLY_SIZE,
    Command,
    Header,
)
from common.vfio_user.transport import Message

__all__ = ["Hung", "Limits", "Lost", "Probe", "Transcript"]

_MAX_FDS = 64
_ANCILLARY = socket.CMSG_SPACE(_MAX_FDS * 4)
_SHOWN = 40  # bytes of a body that a report shows
_MAX_COMMANDS = 100_000  # of the server during one conversation: more is a loop


class Lost(Exception):  # noqa: N818 - what happened
    """The server has closed the connection, or is gone."""


class Hung(Exception):  # noqa: N818 - what happened
    """The server did not answer, or did not read, in time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds: an answer, a whole check, a server's start."""

    answer: float = 5.0
    check: float = 60.0
    start: float = 15.0


@dataclass(slots=True)
class Transcript:
    """The last messages, in words, of all probes of a check."""

    sent: str = ""
    received: str = ""


class Probe:
    """One connection; takes the socket over. `deadline`: when, on the monotonic clock, the check must have ended.

    `on_command` carries out a command of the server and returns the body of the reply, or raises OSError.
    """

    def __init__(self, sock: socket.socket, limits: Limits, deadline: float, transcript: Transcript) -> None:
        self.on_command: Callable[[Message], Buffer] | None = None
        self._sock = sock
        self._limits = limits
        self._deadline = deadline
        self._transcript = transcript
        self._inbox: deque[Message] = deque()
        self._message_id = 0x4000
        self._commands = 0
        self._header: Header | None = None
        self._data = bytearray()
        self._fds: list[int] = []
        sock.settimeout(0)

    def close(self) -> None:
        """Close the connection and the descriptors that came and nobody took."""
        self._sock.close()
        for message in self._inbox:
            message.close_fds()
        self._inbox.clear()
        self._drop_fds()

    # Sending

    def send(
        self,
        command: int,
        *parts: Buffer,
        fds: Sequence[int] = (),
        message_id: int | None = None,
        flags: int = 0,
        size: int | None = None,
    ) -> int:
        """Send a command, or what looks like one, and return its id; `size` is what its header claims."""
        self._message_id = (self._message_id + 1) & 0xFFFF if message_id is None else message_id
        body = b"".join(bytes(part) for part in parts)
        header = Header(self._message_id, command, HEADER_SIZE + len(body) if size is None else size, flags)
        self._transcript.sent = _describe(header, body, len(fds))
        self._transcript.received = ""
        self.send_bytes(header.pack() + body, fds)
        return self._message_id

    def send_bytes(self, data: Buffer, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        view = memoryview(data)
        end = self._end()
        while view:
            try:
                view = view[self._sock.sendmsg([view], rights, socket.MSG_NOSIGNAL) :]
                rights = []
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT, end, "it reads nothing")
                self._read_on()
            except OSError as error:
                raise self._lost(error) from None

    # Receiving

    def receive(self, seconds: float | None = None) -> Message:
        """Return the next reply; raise `Hung` if none comes in time."""
        end = self._end(seconds)
        while True:
            while self._inbox:
                message = self._inbox.popleft()
                if message.header.is_reply:
                    self._transcript.received = _describe(message.header, message.body, len(message.fds))
                    return message
                self._answer(message)
            self._wait(select.POLLIN, end, "no answer")
            self._read_on()

    def ask(
        self,
        command: int,
        *parts: Buffer,
        fds: Sequence[int] = (),
        keep_fds: bool = False,
        seconds: float | None = None,
    ) -> Message:
        """Send a command and return its reply, be it a refusal; `Failure` if it answers another command."""
        message_id = self.send(command, *parts, fds=fds)
        reply = self.receive(seconds)
        if not keep_fds:
            reply.close_fds()
        if (reply.header.message_id, reply.header.command) != (message_id, command):
            reply.close_fds()
            raise Failure(
                f"the reply carries id {reply.header.message_id} and command {reply.header.command}, "
                f"the command had {message_id} and {command}"
            )
        return reply

    def accepted(self, command: int, *parts: Buffer, fds: Sequence[int] = (), keep_fds: bool = False) -> Message:
        """Send a command that has to be carried out, and return the reply."""
        reply = self.ask(command, *parts, fds=fds, keep_fds=keep_fds)
        if reply.error:
            raise Failure(f"{name_of(command)} is refused: {name_of_error(reply.error)}")
        return reply

    def refused(self, what: str, command: int, *parts: Buffer, fds: Sequence[int] = ()) -> int:
        """Send a command that has to be refused, and return the errno; `what` says what is wrong with it."""
        reply = self.ask(command, *parts, fds=fds)
        if not reply.error:
            raise Failure(f"{what} is not refused")
        return reply.error

    def pump(self, seconds: float) -> None:
        """Answer the server's commands for so long, or return after the first one; `Failure` if a reply comes."""
        end = time.monotonic() + seconds
        while not self._inbox:
            try:
                self._wait(select.POLLIN, min(end, self._deadline), "")
            except Hung:
                if time.monotonic() >= self._deadline:
                    raise
                return
            self._read_on()
        message = self._inbox.popleft()
        if message.header.is_reply:
            message.close_fds()
            self._transcript.received = _describe(message.header, message.body, 0)
            raise Failure("a reply came to no command")
        self._answer(message)

    def closed_by_server(self, seconds: float) -> bool:
        """Wait until the server closes the connection; tell whether it has."""
        end = time.monotonic() + seconds
        try:
            while True:
                self._wait(select.POLLIN, end, "")
                self._read_on()
        except Lost:
            return True
        except Hung:
            return False

    def _answer(self, command: Message) -> None:
        self._commands += 1
        if self._commands > _MAX_COMMANDS:
            raise Hung(f"it loops: {self._commands} commands of its own in one conversation")
        header = command.header
        self._transcript.received = _describe(header, command.body, len(command.fds))
        command.close_fds()
        body: Buffer = b""
        error = 0
        try:
            if self.on_command is None:
                raise OSError(errno.EINVAL, "nothing of that is served")
            body = self.on_command(command)
        except OSError as refusal:
            error = refusal.errno or errno.EINVAL
        flags = FLAG_REPLY | FLAG_ERROR if error else FLAG_REPLY
        answer = Header(header.message_id, header.command, HEADER_SIZE + len(body), flags, error)
        self.send_bytes(answer.pack() + bytes(body))

    def _read_on(self) -> None:
        """Take what is there, up to one message."""
        wanted = (HEADER_SIZE if self._header is None else self._header.size - HEADER_SIZE) - len(self._data)
        if wanted:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(wanted, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(error) from None
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._fds += array.array("i", payload[: len(payload) - len(payload) % 4])
            if not data:
                rest = " in the middle of a message" if self._data or self._header else ""
                raise Lost(f"the server closed the connection{rest}")
            self._data += data
            if len(data) < wanted:
                return
        if self._header is None:
            try:
                self._header = Header.unpack(self._data, MAX_REPLY_SIZE)
            except ValueError as error:
                raise Failure(f"what came is no message: {error} ({bytes(self._data).hex()})") from None
            self._data = bytearray()
            if self._header.size > HEADER_SIZE:
                return
        self._inbox.append(Message(self._header, bytes(self._data), self._fds))
        self._header, self._data, self._fds = None, bytearray(), []

    def _wait(self, events: int, end: float, problem: str) -> None:
        poller = select.poll()
        poller.register(self._sock, events)
        if not poller.poll(max(end - time.monotonic(), 0) * 1000):
            raise Hung(f"{problem} within {self._limits.answer:g} s")

    def _end(self, seconds: float | None = None) -> float:
        return min(time.monotonic() + (seconds or self._limits.answer), self._deadline)

    def _lost(self, error: OSError) -> Lost:
        return Lost(f"the server closed the connection ({os.strerror(error.errno or errno.EIO)})")

    def _drop_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def name_of(command: int) -> str:
    """Return a command's name, or its number where it has none."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def name_of_error(error: int) -> str:
    """Return an errno's name."""
    return errno.errorcode.get(error, f"errno {error}")


def _describe(header: Header, body: Buffer, fds: int) -> str:
    flags = f", flags 0x{header.flags:x}" if header.flags & ~FLAG_REPLY else ""
    error = f", {name_of_error(header.error)}" if header.flags & FLAG_ERROR else ""
    rights = f", {fds} descriptors" if fds else ""
    shown = bytes(body[:_SHOWN]).hex() + ("…" if len(body) > _SHOWN else "")
    data = f": {shown}" if shown else ""
    return f"{name_of(header.command)} id {header.message_id}, {header.size} bytes{flags}{error}{rights}{data}"
