"""Playing one side of a recorded conversation against a real other side, which is compared with the recorded one.

Descriptors are not in a record, so stand-ins go: empty memory of the size that the message tells, eventfds that nobody
reads, a twin socket on which nothing is said. Commands go one after the other, whatever was on its way together when
they were recorded.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from typing import Final

from common.vfio_user.codec import FLAG_NO_REPLY, MAX_REPLY_SIZE, Command, DmaMap
from common.vfio_user.description import RegionInfo
from common.vfio_user.difference import Difference, compare
from common.vfio_user.transcript import Recorded, Sender, name_of, pair
from common.vfio_user.transport import Connection, ConnectionLostError, Message

__all__ = ["replay"]

_MAX_FILE: Final = 1 << 62  # bytes


def replay(side: Sender, sock: socket.socket, messages: Sequence[Recorded], timeout: float) -> list[Difference]:
    """Play a side of a transcript until its end, or until the other side has gone; return all differences, by line.

    As "client", send the recorded commands, and answer what the server asks as the record does. As "server", answer the
    client's commands with the recorded replies, in their order, ask what the server asked, and wait for the client to
    close. Takes the socket over. `timeout` in seconds: how long a reply is waited for, and, as client, a command of the
    server that the record has.
    """
    player = _Client if side == "client" else _Server
    connection = Connection(sock, limit=MAX_REPLY_SIZE, timeout=timeout)
    with ExitStack() as far_ends, closing(connection):
        played = player(connection, messages, timeout, far_ends)
        with suppress(ConnectionLostError):
            played.play()
    return sorted(played.differences, key=lambda difference: difference.line)


class _Player:
    """`far_ends` keeps the other ends of sockets that are given away: without them they are closed ones."""

    def __init__(
        self, connection: Connection, messages: Sequence[Recorded], timeout: float, far_ends: ExitStack
    ) -> None:
        self.differences: list[Difference] = []
        self._connection = connection
        self._messages = messages
        self._replies = pair(messages)
        self._timeout = timeout
        self._far_ends = far_ends

    def play(self) -> None:
        """Play to the end; raise ConnectionLostError when the other side is gone, which is noted."""
        raise NotImplementedError

    def _note(self, index: int, command: int, text: str) -> None:
        self.differences.append(Difference(index + 1, name_of(command), "order", text))

    def _compare(self, index: int, came: Message) -> None:
        self.differences += compare(index + 1, self._messages[index], came.header, len(came.fds), came.body)

    def _ask(self, index: int) -> None:
        """Send the command at `index`, and compare the reply; one that the record does not answer is not sent."""
        message = self._messages[index]
        command = message.header.command
        fds = _stand_ins(message, self._far_ends)
        try:
            if message.header.flags & FLAG_NO_REPLY:
                self._connection.post(command, [message.body], fds)
            elif index in self._replies:
                reply = self._connection.request(command, [message.body], fds)
                self._compare(self._replies[index], reply)
                reply.close_fds()
        except ConnectionLostError as error:
            self._note(index, command, str(error.strerror))
            raise
        finally:
            _close(fds)


class _Client(_Player):
    """Asks in one thread and answers in another, for a reply may wait for an answer."""

    def play(self) -> None:
        # Indices of the server's commands that have not come yet.
        self._expected = [index for index, message in enumerate(self._messages) if _asks(message, "server")]
        self._came = threading.Condition()
        self._silent = False  # it did not ask for what was waited for, and not for anything since
        thread = threading.Thread(target=self._serve, name="replay", daemon=True)
        thread.start()
        try:
            for index, message in enumerate(self._messages):
                if _asks(message, "client"):
                    self._ask(index)
                elif _asks(message, "server"):
                    self._wait_for(index)
        finally:
            self._connection.shutdown()
            thread.join()

    def _wait_for(self, index: int) -> None:
        """Wait until as many commands have come as the record has up to `index`, in whatever order."""
        here = sum(1 for message in self._messages[: index + 1] if _asks(message, "server"))
        total = sum(1 for message in self._messages if _asks(message, "server"))
        with self._came:
            timeout = 0 if self._silent else self._timeout
            if not self._came.wait_for(lambda: total - len(self._expected) >= here, timeout):
                missing = self._expected.pop(0)
                command = self._messages[missing].header.command
                self._note(missing, command, f"did not come within {self._timeout:g} s")
                self._silent = True

    def _serve(self) -> None:
        with suppress(ConnectionLostError):
            while (command := self._connection.next_command()) is not None:
                self._answer(command)
                command.close_fds()

    def _answer(self, command: Message) -> None:
        with self._came:
            self._silent = False
            index = self._find(command)
            if index is not None:
                self._expected.remove(index)
                self._compare(index, command)
            else:
                at = self._expected[0] if self._expected else len(self._messages) - 1
                self._note(at, command.header.command, "the server asks for it, and the record does not")
            self._came.notify()
        reply = None if index is None else self._replies.get(index)
        if reply is None:
            self._connection.reply(command, error=errno.EINVAL)
        else:
            recorded = self._messages[reply]
            self._connection.reply(command, [recorded.body], error=recorded.header.refusal)

    def _find(self, command: Message) -> int | None:
        """Return the recorded command that this one is: the same, else the next of its kind."""
        fitting = [i for i in self._expected if self._messages[i].header.command == command.header.command]
        same = (index for index in fitting if self._messages[index].body == command.body)
        return next(same, fitting[0] if fitting else None)


class _Server(_Player):
    """Answers and asks in the record's order, except that no command waits for the client's next one."""

    def play(self) -> None:
        asked = set()
        for index, message in enumerate(self._messages):
            if _asks(message, "server") and index not in asked:
                self._ask(index)
            elif _asks(message, "client"):
                command = self._next_command(index)
                self._compare(index, command)
                command.close_fds()
                if index in self._replies:
                    reply = self._replies[index]
                    for between in range(index + 1, reply):
                        if _asks(self._messages[between], "server") and between not in asked:
                            asked.add(between)
                            self._ask(between)
                    self._answer(command, self._messages[reply])
        while (extra := self._connection.next_command()) is not None:
            self._refuse(len(self._messages) - 1, extra, "asked after the end of the record")

    def _answer(self, command: Message, reply: Recorded) -> None:
        fds = _stand_ins(reply, self._far_ends)
        try:
            self._connection.reply(command, [reply.body], fds, error=reply.header.refusal)
        finally:
            _close(fds)

    def _next_command(self, index: int) -> Message:
        """Wait for the command that is recorded at `index`; others are noted, and refused."""
        expected = self._messages[index].header.command
        while (command := self._connection.next_command()) is not None:
            if command.header.command == expected:
                return command
            self._refuse(index, command, f"asked instead of {name_of(expected)}")
        self._note(index, expected, "the client has closed the connection before it")
        raise ConnectionLostError

    def _refuse(self, index: int, command: Message, text: str) -> None:
        self._note(index, command.header.command, text)
        command.close_fds()
        self._connection.reply(command, error=errno.EINVAL)


def _asks(message: Recorded, side: Sender) -> bool:
    return message.sender == side and not message.header.is_reply


def _stand_ins(message: Recorded, far_ends: ExitStack) -> list[int]:
    """Return descriptors in the place of those that came with a message; the caller closes them."""
    command = message.header.command
    if command == Command.VERSION:
        # A twin socket, on which nothing is ever said: the record does not have what was.
        return [_twin_socket(far_ends) for _ in range(message.fds)]
    if command not in (Command.DMA_MAP, Command.DEVICE_GET_REGION_INFO):
        return [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(message.fds)]
    fds = [os.memfd_create("stand-in") for _ in range(message.fds)]
    with suppress(ValueError):  # a body that tells no size: empty files
        size = _end_of_file(message)
        for fd in fds:
            os.ftruncate(fd, min(size, _MAX_FILE))
    return fds


def _twin_socket(far_ends: ExitStack) -> int:
    near, far = socket.socketpair()
    far_ends.enter_context(far)
    return near.detach()


def _end_of_file(message: Recorded) -> int:
    if message.header.command == Command.DMA_MAP:
        mapping = DmaMap.unpack(message.body)
        return mapping.offset + mapping.size
    region, _ = RegionInfo.unpack(message.body)
    return region.offset + region.size


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
