"""Where servers come from: one that listens already, or a command that starts as many as are needed.

Whatever a server does, it is waited for with a limit. Servers that a command starts are ended with whatever they have
started, whatever becomes of them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Protocol

from common.vfio_user.server_process import ServerProcess

__all__ = ["CommandTarget", "Instance", "SocketTarget", "Target", "UnreachableError"]

_PLACEHOLDER = "{socket}"


class UnreachableError(Exception):
    """There is no server to connect to."""


class Instance(Protocol):
    """A server."""

    def connect(self, seconds: float) -> socket.socket:
        """Return a new connection; raise `UnreachableError`."""

    def fate(self, seconds: float) -> str | None:
        """Wait so long for its end, and say how it ended; None if it lives, or nobody can tell."""

    def crashed(self) -> bool:
        """Tell whether it ended otherwise than by itself and with status 0."""

    def stop(self) -> None:
        """End it, if it was started here."""


class Target(Protocol):
    """What is to be checked."""

    restarts: bool
    """Whether `start` gives a new instance each time."""

    def start(self) -> Instance:
        """Return an instance; raise `UnreachableError`."""


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(1)
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return sock


class SocketTarget:
    """A server that somebody else has started; there is one of it."""

    restarts = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self) -> Instance:
        """Return the server."""
        return self

    def connect(self, seconds: float) -> socket.socket:  # noqa: ARG002 - a server that listens, listens now
        """Connect to it."""
        try:
            return _connect(self._path)
        except OSError as error:
            raise UnreachableError(f"{self._path}: {error.strerror or error}") from None

    def fate(self, seconds: float) -> str | None:  # noqa: ARG002 - it is somebody else's
        """Nobody can tell."""
        return None

    def crashed(self) -> bool:
        """Nobody can tell."""
        return False

    def stop(self) -> None:
        """Leave it alone."""


class CommandTarget:
    """A command line with {socket} where the path belongs; raise ValueError for any other. No shell reads it."""

    restarts = True

    def __init__(self, command: str) -> None:
        self._arguments = shlex.split(command)
        if not any(_PLACEHOLDER in argument for argument in self._arguments):
            raise ValueError(f"the command has no {_PLACEHOLDER} in it")

    def start(self) -> Instance:
        """Start a server."""
        return _Process(self._arguments)


class _Process:
    def __init__(self, arguments: list[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="switchover-check-"))
        self._path = self._folder / "device.sock"
        try:
            self._process = ServerProcess([argument.replace(_PLACEHOLDER, str(self._path)) for argument in arguments])
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise UnreachableError(f"{arguments[0]}: {error.strerror or error}") from None
        self._process.attend()

    def connect(self, seconds: float) -> socket.socket:
        end = time.monotonic() + seconds
        while True:
            try:
                return _connect(self._path)
            except OSError as error:
                problem = error.strerror or str(error)
            if fate := self.fate(0):
                raise UnreachableError(fate)
            if time.monotonic() > end:
                raise UnreachableError(f"it does not listen within {seconds:g} s: {problem}")
            time.sleep(0.005)

    def fate(self, seconds: float) -> str | None:
        status = self._process.wait(seconds)
        if status is None:
            return None
        words = self._process.last_words()
        last = f'; its last words: "{words}"' if words else ""
        if status < 0:
            return f"the server died of {_name_of_signal(-status)}{last}"
        return f"the server ended with status {status}{last}"

    def crashed(self) -> bool:
        return self._process.wait(0) not in {None, 0}

    def stop(self) -> None:
        self._process.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _name_of_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of the real-time ones only the first and the last have a name
        return f"signal {number}"
