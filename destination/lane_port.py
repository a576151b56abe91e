"""The port that takes the TCP page lanes of one session.

Whoever connects is a stranger until he has shown one of the session's tokens, which only the source has been told, in
the answer to its Prepare. A stranger has a few seconds for that, is told nothing, and is allowed no more memory than a
hello needs. If too many come, the oldest is sent away, so that those who dawdle do not keep out those who do not.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

import structlog

from common.rpc.lane_frame import HELLO_SIZE, TOKEN_SIZE, parse_hello
from common.rpc.lane_socket import LaneSocket

__all__ = ["LanePort"]

MAX_STRANGERS = 16
HELLO_SECONDS = 5.0
END_SECONDS = 2.0
PAUSE_SECONDS = 0.1  # after an error that may pass: no descriptors are left, or a peer was too quick

_log = structlog.get_logger()


class LanePort:
    """Listens, and serves every lane in a thread of its own, until `close`. Each token opens its lane once."""

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        lanes: int,
        serve: Callable[[int, int, LaneSocket], None],
    ) -> None:
        """Listen; `serve` gets each lane's generation, number and connection.

        Raise OSError if the port cannot be had.
        """
        self._context = context
        self._serve = serve
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lane_count = lanes
        self._generation = -1
        self._unused: dict[int, bytes] = {}
        self.tokens = self.renew(0)
        self._strangers: dict[threading.Thread, LaneSocket] = {}
        self._lanes: dict[threading.Thread, LaneSocket] = {}
        self._listener = _listen(host, port)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="lane port", daemon=True)
        self._thread.start()

    def renew(self, generation: int) -> list[bytes]:
        """Take lanes of a generation from now on, and of no other; return their tokens."""
        tokens = [secrets.token_bytes(TOKEN_SIZE) for _ in range(self._lane_count)]
        with self._lock:
            if generation > self._generation:  # else somebody else was faster, and newer
                self._generation = generation
                self._unused = dict(enumerate(tokens))
        return tokens

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._ended.wait(PAUSE_SECONDS):
                    return
                _log.warning("page lanes cannot be accepted", message=str(error))
                continue
            with self._lock:
                oldest = next(iter(self._strangers.items())) if len(self._strangers) >= MAX_STRANGERS else None
            if oldest is not None:
                thread, dawdler = oldest
                dawdler.shutdown()
                thread.join()
            try:
                stranger = LaneSocket(connection, self._context, None)
            except OSError:
                continue  # it is gone already
            thread = threading.Thread(target=self._meet, args=(stranger,), name="lane", daemon=True)
            with self._lock:
                self._strangers[thread] = stranger
            thread.start()

    def _meet(self, stranger: LaneSocket) -> None:
        thread = threading.current_thread()
        try:
            generation, lane = self._admit(thread, stranger.begin(HELLO_SECONDS, receive=HELLO_SIZE))
            self._serve(generation, lane, stranger)
        except (OSError, ValueError) as error:
            _log.warning("not a page lane of ours", message=str(error))
        except Exception:  # noqa: BLE001  # the edge: a defect of ours ends this lane, which its source notices
            _log.exception("defect", lane=thread.name)
        finally:
            with self._lock:
                self._strangers.pop(thread, None)
                self._lanes.pop(thread, None)
            stranger.close()

    def _admit(self, thread: threading.Thread, hello: bytes) -> tuple[int, int]:
        """Return generation and number of the lane that a hello is for, whose token nobody else can use.

        Raise ValueError if there is none.
        """
        token = parse_hello(hello)
        with self._lock:
            found = [lane for lane, known in self._unused.items() if hmac.compare_digest(known, token)]
            if not found:
                raise ValueError("its token is none, or was used")
            (lane,) = found
            del self._unused[lane]
            self._lanes[thread] = self._strangers.pop(thread)
            return self._generation, lane

    def close(self) -> None:
        """End it: nobody is listened to any more, and no lane is served when this returns."""
        self._stop()
        self._thread.join()
        self._listener.close()
        with self._lock:
            self._unused.clear()
            strangers, lanes = list(self._strangers.items()), list(self._lanes.items())
        for _, stranger in strangers:
            stranger.shutdown()
        for _, lane in lanes:
            lane.shutdown(socket.SHUT_RD)  # it may still tell its source why
        for thread, connection in (*strangers, *lanes):
            if thread is not threading.current_thread():
                thread.join(END_SECONDS)
                connection.shutdown()
                thread.join()

    def _stop(self) -> None:
        """Let nobody in any more: `accept` fails."""
        self._ended.set()
        with suppress(OSError):  # somebody else was quicker
            self._listener.shutdown(socket.SHUT_RDWR)


def _listen(host: str, port: int) -> socket.socket:
    if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():  # as gRPC listens there
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family)
