"""Servers that are right but for one thing, on threads: what a check has to find."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.conformance.target import Instance, UnreachableError
from common.devices.__main__ import build
from common.devices.base import EmulatedDevice
from common.vfio.feature import Buffer
from common.vfio_user.server import VfioUserServer
from common.vfio_user.transport import Message

Reply = tuple[Sequence[Buffer], Sequence[int]]
Proceed = Callable[[Message], Reply]
Answer = Callable[["WrongServer", Message, Proceed], Reply]


@dataclass(frozen=True)
class Defect:
    """One way to be wrong.

    `answer` stands in the way of every command, and may let it pass (`proceed`). `install` changes a server before it
    begins to serve, `device` a device. `wedged` tells, when a connection has ended, whether the server serves no more.
    `detail`: what the check has to say about it.
    """

    detail: str
    answer: Answer | None = None
    install: Callable[[WrongServer], None] | None = None
    device: Callable[[EmulatedDevice], None] | None = None
    wedged: Callable[[WrongServer], bool] = lambda _server: False
    knobs: dict[str, Any] = field(default_factory=dict)
    patience: float = 10.0


class WrongServer(VfioUserServer):
    """A server with a defect; `number`: which connection to the same instance it serves, from 0."""

    def __init__(self, device: EmulatedDevice, sock: socket.socket, defect: Defect, number: int) -> None:
        super().__init__(device, sock)
        self.sock = sock
        self.device = device
        self.number = number
        self.connection = self._connection
        self.memory: dict[str, Any] = {}
        self.released = threading.Event()
        self.fds: list[int] = []
        self._defect = defect
        if defect.device is not None:
            defect.device(device)
        if defect.install is not None:
            defect.install(self)

    @property
    def negotiated(self) -> bool:
        return self._client is not None

    def hang(self) -> None:
        """Answer no more, until the test is over."""
        self.released.wait(30)

    def hang_up(self) -> Reply:
        """Close the connection instead of answering."""
        self.connection.shutdown()
        return (), ()

    def _handler(self, command: Message) -> Proceed:
        if self._defect.answer is None:
            return super()._handler(command)

        def proceed(message: Message) -> Reply:
            return super(WrongServer, self)._handler(message)(message)

        answer = self._defect.answer
        return lambda message: answer(self, message, proceed)


class ThreadTarget:
    """Instances of a device on threads, each behind socketpairs."""

    restarts = True

    def __init__(self, kind: str, defect: Defect) -> None:
        self._kind = kind
        self._defect = defect

    def start(self) -> Instance:
        return _Thread(self._kind, self._defect)


class _Thread:
    def __init__(self, kind: str, defect: Defect) -> None:
        self._kind = kind
        self._defect = defect
        self._served: list[tuple[WrongServer, threading.Thread]] = []

    def connect(self, seconds: float) -> socket.socket:
        for _, thread in self._served:
            thread.join(10)
        ours, theirs = socket.socketpair()
        if any(self._defect.wedged(server) for server, _ in self._served):
            self._kept = theirs  # connected, and nobody reads
            return ours
        server = WrongServer(
            build(self._kind, f"{self._kind}0", self._defect.knobs), theirs, self._defect, len(self._served)
        )
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        self._served.append((server, thread))
        return ours

    def fate(self, seconds: float) -> str | None:
        return None

    def crashed(self) -> bool:
        return False

    def stop(self) -> None:
        for server, thread in self._served:
            server.released.set()
            thread.join(10)
            assert not thread.is_alive()
            for fd in server.fds:
                os.close(fd)
        if hasattr(self, "_kept"):
            self._kept.close()


class NoTarget:
    """Nobody."""

    restarts = False

    def start(self) -> Instance:
        raise UnreachableError("nobody")
