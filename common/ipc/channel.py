"""Request and reply over a stream socket: a JSON header, a binary payload, file descriptors.

A message is ``<II`` (header bytes, payload bytes), the header as JSON, the payload as it is. Descriptors ride on the
first bytes. A connection goes one way: one side asks (`Client`), the other answers (`serve`), strictly in turn; where
both sides ask, there are two connections. So no request ever crosses another, and nobody needs a dispatcher.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "MAX_FDS",
    "Buffer",
    "Client",
    "ClosedError",
    "Handler",
    "Message",
    "RequestError",
    "answer_one",
    "receive",
    "send",
    "serve",
]

Buffer = bytes | bytearray | memoryview
_PREFIX = struct.Struct("<II")
MAX_HEADER = 16 << 20
MAX_PAYLOAD = 256 << 20
MAX_FDS = 253  # what the kernel takes in one message (SCM_MAX_FD)


class ClosedError(ConnectionError):
    """The other side is gone."""


class RequestError(Exception):
    """A request was refused; `reason` is for programs (for example EINVAL), the text for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class Message:
    """One message: whoever receives descriptors owns them."""

    header: dict[str, Any] = field(default_factory=dict)
    payload: Buffer = b""
    fds: list[int] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        """Return a member of the header."""
        return self.header[key]


Handler = Callable[[Message], Message | Mapping[str, Any] | None]


def send(sock: socket.socket, header: Mapping[str, Any], payload: Buffer = b"", fds: Sequence[int] = ()) -> None:
    """Send one message; raise `ClosedError` if the other side is gone, ValueError for too many descriptors."""
    if len(fds) > MAX_FDS:
        raise ValueError(f"{len(fds)} descriptors in one message, at most {MAX_FDS} are possible")
    encoded = json.dumps(header, separators=(",", ":")).encode()
    body = memoryview(payload).cast("B")
    first = _PREFIX.pack(len(encoded), len(body)) + encoded
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sent = sock.sendmsg([first, body], rights)
        if sent < len(first):
            sock.sendall(first[sent:])
            sent = len(first)
        if sent < len(first) + len(body):
            sock.sendall(body[sent - len(first) :])
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ClosedError("the other side has closed the connection") from error


def receive(sock: socket.socket) -> Message:
    """Receive one message; raise `ClosedError` at its end and `ValueError` if what comes is no message."""
    fds: list[int] = []
    try:
        header_size, payload_size = _PREFIX.unpack(_receive_prefix(sock, fds))
        if header_size > MAX_HEADER or payload_size > MAX_PAYLOAD:
            raise ValueError(f"message of {header_size} + {payload_size} bytes exceeds the limit")
        try:
            header = json.loads(bytes(_receive_exactly(sock, header_size)))
        except RecursionError:
            raise ValueError("header is nested too deep") from None
        if not isinstance(header, dict):
            raise ValueError("header is not an object")  # noqa: TRY004  # one error for all that is no message
        return Message(header, _receive_exactly(sock, payload_size) if payload_size else b"", fds)
    except BaseException:
        _close(fds)
        raise


def _receive_prefix(sock: socket.socket, fds: list[int]) -> bytes:
    data = b""
    while len(data) < _PREFIX.size:
        try:
            chunk, rights, flags, _ = socket.recv_fds(sock, _PREFIX.size - len(data), MAX_FDS)
        except ConnectionResetError as error:
            raise ClosedError("the other side has closed the connection") from error
        fds += rights
        if flags & socket.MSG_CTRUNC:
            raise ValueError("not all descriptors of a message have arrived")
        if not chunk:
            raise ClosedError("the other side has closed the connection")
        data += chunk
    return data


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _receive_exactly(sock: socket.socket, size: int) -> memoryview:
    view = memoryview(bytearray(size))
    done = 0
    while done < size:
        try:
            count = sock.recv_into(view[done:], size - done)
        except ConnectionResetError as error:
            raise ClosedError("the other side has closed the connection") from error
        if count == 0:
            raise ClosedError("the other side has closed the connection")
        done += count
    return view.toreadonly()


class Client:
    """The asking side. Calls from several threads take turns."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout: float | None = None) -> Client:
        """Connect to a unix socket; `timeout` in seconds is the limit of each later call too."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def call(self, method: str, /, payload: Buffer = b"", fds: Sequence[int] = (), **params: Any) -> Message:
        """Ask and wait for the answer.

        Raise `RequestError` if it is refused, `ClosedError` if the other side goes or answers what is no answer,
        `TimeoutError` after the socket's timeout (the connection is of no use then).
        """
        with self._lock:
            try:
                send(self._sock, {"method": method, "params": params}, payload, fds)
                reply = receive(self._sock)
            except OSError as error:
                # The answer may still come: nobody may take it for that of a later request.
                closed_here = self._sock.fileno() < 0
                self._sock.close()
                if closed_here and not isinstance(error, ClosedError):
                    raise ClosedError("the connection was closed here") from error
                raise
            except ValueError as error:
                self._sock.close()
                raise ClosedError(f"what the other side answers is no message: {error}") from error
        match reply.header:
            case {"error": {"reason": str(reason), "message": str(message)}}:
                refusal: Exception = RequestError(reason, message)
            case {"result": dict(result)}:
                reply.header = result
                return reply
            case _:
                refusal = ClosedError("the other side answers neither with a result nor with an error")
        _close(reply.fds)
        raise refusal

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; a call that waits ends with `ClosedError`."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def serve(sock: socket.socket, handlers: Mapping[str, Handler]) -> None:
    """Answer requests until the other side closes.

    A handler gets the request with its parameters as header, and returns the result (a mapping, or a message with
    payload and descriptors) or raises `RequestError` or `OSError`, which go back as refusals. Anything else is a defect
    of ours: the asker learns that much, and it is raised here.
    """
    while True:
        try:
            request = receive(sock)
        except ClosedError:
            return
        answer_one(sock, request, handlers)


def answer_one(sock: socket.socket, request: Message, handlers: Mapping[str, Handler]) -> None:
    """Answer one request that was received already."""
    method = str(request.header.get("method"))
    request.header = request.header.get("params", {})
    try:
        handler = handlers.get(method)
        if handler is None or not isinstance(request.header, dict):
            _close(request.fds)
            raise RequestError("ENOSYS", f"no such request: {method}")
        result = handler(request)
    except RequestError as error:
        reply = Message({"error": {"reason": error.reason, "message": str(error)}})
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "EIO")
        reply = Message({"error": {"reason": reason, "message": str(error)}})
    except BaseException as error:
        send(sock, {"error": {"reason": "INTERNAL", "message": f"{method}: {type(error).__name__}: {error}"}})
        raise
    else:
        if isinstance(result, Message):
            reply = Message({"result": result.header}, result.payload, result.fds)
        else:
            reply = Message({"result": result or {}})
    send(sock, reply.header, reply.payload, reply.fds)
