"""The commands `capture` and `replay`: transcripts of vfio-user conversations (docs/transcripts.md)."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from common.signals import ending_signals
from common.vfio_user.difference import Difference
from common.vfio_user.proxy import ProxyError, relay
from common.vfio_user.replay import replay as play
from common.vfio_user.server import listen
from common.vfio_user.transcript import Recorded, TranscriptError, read, write
from console.daemon import printable
from console.errors import CommandError
from console.exit_codes import ExitCode

__all__ = ["capture", "replay"]


def capture(listen_at: Path, connect_to: Path, file: Path, *, as_json: bool) -> None:
    """Record what a client that connects to one socket says to the server behind the other, until either has gone."""
    with ExitStack() as stack:
        ended = stack.enter_context(ending_signals())
        server = stack.enter_context(closing(_connect(connect_to)))
        try:
            if file.exists() and file.stat().st_size:
                raise CommandError(f"{file}: is there already, and not empty", ExitCode.USAGE)
            out = stack.enter_context(file.open("wb"))
        except OSError as error:
            raise CommandError(f"{file}: {error.strerror}", ExitCode.USAGE) from error
        recorder = _Recorder(out)
        how = "told to end"
        with _listening(listen_at) as listener:
            print(f"switchover capture: listening on {listen_at}", file=sys.stderr, flush=True)
            client = _accept(listener, ended)
        if client is not None:
            stack.enter_context(closing(client))
            try:
                how = relay(client, server, recorder.record, ended)
            except ProxyError as error:
                raise CommandError(f"{file}: {recorder.messages} messages, then {error}", ExitCode.FAILED) from error
    if as_json:
        summary = {"messages": recorder.messages, "commands": recorder.commands, "ended": how}
        print(json.dumps({**summary, "twin_socket": recorder.twin_socket}, indent=2))
        return
    print(f"{file}: {recorder.messages} messages, {recorder.commands} of them commands; {how}")
    if recorder.twin_socket:
        print("The server had a socket of its own for its commands (twin socket): they are not recorded.")


def replay(side: str, file: Path, path: Path, timeout: float, *, data: bool, as_json: bool) -> ExitCode:
    """Play the client of a transcript against the server at `path`, or its server for the client that comes there."""
    try:
        with file.open("rb") as lines:
            messages = read(lines)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", ExitCode.USAGE) from error
    except TranscriptError as error:
        raise CommandError(f"{file}: {error}", ExitCode.USAGE) from error
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if side == "client":
        differences = play("client", _connect(path), messages, timeout)
    else:
        with _listening(path) as listener:
            print(f"switchover replay: listening on {path}", file=sys.stderr, flush=True)
            client, _ = listener.accept()
        differences = play("server", client, messages, timeout)
    counted = [difference for difference in differences if data or difference.kind != "data"]
    result = "different" if counted else "equal"
    if as_json:
        rows = [{"line": its.line, "command": its.command, "kind": its.kind, "text": its.text} for its in differences]
        print(json.dumps({"result": result, "messages": len(messages), "differences": rows}, indent=2))
    else:
        for its in counted:
            print(f"{file}:{its.line}: {its.command}: {printable(its.text)}")
        print(f"{file}: {result}{_told(differences)}")
    return ExitCode.FAILED if counted else ExitCode.COMPLETED


def _told(differences: Sequence[Difference]) -> str:
    counts = Counter(difference.kind for difference in differences)
    return f" ({', '.join(f'{kind}: {counts[kind]}' for kind in sorted(counts))})" if counts else ""


class _Recorder:
    """Writes messages to a file, and counts them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.messages = 0
        self.commands = 0
        self.twin_socket = False

    def record(self, message: Recorded) -> None:
        write(self._file, message)
        self.messages += 1
        self.commands += not message.header.is_reply
        self.twin_socket |= message.opens_twin_socket


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        raise CommandError(f"{path}: cannot connect: {error.strerror or error}", ExitCode.UNREACHABLE) from error
    return sock


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """Listen for one client; the path is gone afterwards."""
    if path.exists() and not path.is_socket():
        raise CommandError(f"{path}: there is something else", ExitCode.USAGE)
    try:
        listener = listen(path)
    except OSError as error:
        raise CommandError(f"{path}: cannot listen: {error.strerror or error}", ExitCode.USAGE) from error
    try:
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def _accept(listener: socket.socket, ended: int) -> socket.socket | None:
    """Return the client that comes, or None when told to end."""
    poller = select.poll()
    for source in (listener.fileno(), ended):
        poller.register(source, select.POLLIN)
    if ended in dict(poller.poll()):
        return None
    return listener.accept()[0]
