"""An acknowledged stream that outlives its connections: what was not applied is sent again, under its number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from switchover.v1 import migration_pb2

from common.rpc.errors import PeerError
from source.reconnect import Connection, Link
from source.stream import Ack, AckedStream

__all__ = ["ResumingStream"]

MAX_KEPT = 16  # requests that are on their way, each of up to 1 MiB


class _Numbered(Protocol):
    @property
    def sequence(self) -> int: ...


Request = TypeVar("Request", bound=_Numbered)
Response = TypeVar("Response", bound=Ack)


class ResumingStream(Generic[Request, Response]):
    """See `AckedStream`; one thread at a time sends, drains and checks. A loss is its failure only if it stays one."""

    def __init__(
        self,
        link: Link,
        call: Callable[[Iterator[Request], Connection], Any],
        last_ack: Callable[[migration_pb2.ReconnectResponse], Response],
        on_ack: Callable[[Response], None] = lambda _: None,
    ) -> None:
        """`call` opens the gRPC stream of a connection; `last_ack` finds what the destination had last acknowledged."""
        self._link = link
        self._call = call
        self._last_ack = last_ack
        self._on_ack = on_ack
        self._kept: deque[Request] = deque()
        self._connection = link.current
        self._stream = self._open(0, 0)

    def _open(self, applied: int, sequence: int) -> AckedStream[Request, Response]:
        connection = self._connection
        return AckedStream(
            lambda requests: self._call(requests, connection),
            self._take_ack,
            applied,
            sequence,
            lambda failure: self._link.notice(connection, failure),
        )

    def _take_ack(self, ack: Response) -> None:
        while self._kept and self._kept[0].sequence <= ack.applied_sequence:
            self._kept.popleft()
        self._on_ack(ack)

    @property
    def sequence(self) -> int:
        """Number of the last request."""
        return self._stream.sequence

    def next_sequence(self) -> int:
        """Return the number for the next request, which is then sent."""
        return self._stream.next_sequence()

    def send(self, request: Request) -> None:
        """Hand a request over; wait while the destination does not keep up, or cannot be reached."""
        self._kept.append(request)
        try:
            self._stream.send(request)
        except PeerError as failure:
            self._resume(failure)
        self._go_on(lambda: self._stream.wait_for(self.sequence - MAX_KEPT))

    def check(self) -> None:
        """Raise what has ended the stream, if anything has."""
        self._go_on(lambda: self._stream.check())

    def drain(self) -> None:
        """Wait until everything that was sent is applied."""
        self._go_on(lambda: self._stream.drain())

    def _go_on(self, act: Callable[[], None]) -> None:
        while True:
            try:
                return act()
            except PeerError as failure:
                self._resume(failure)

    def _resume(self, failure: PeerError) -> None:
        """Send on the next connection what is not applied; raise what ends the migration."""
        while True:
            self._stream.close(abort=True)
            self._connection = self._link.restore(self._connection, failure)
            last = self._last_ack(self._connection.begins)
            sequence = self.sequence
            if not 0 <= sequence - last.applied_sequence <= len(self._kept):
                raise ConnectionError(f"the destination goes on behind {last.applied_sequence} of {sequence}")
            self._take_ack(last)
            again = list(self._kept)
            self._stream = self._open(last.applied_sequence, sequence)
            try:
                self._link.check(self._connection)
                for request in again:
                    self._stream.send(request)
            except PeerError as error:
                failure = error
            except BaseException:
                self._stream.close(abort=True)
                raise
            else:
                return

    def interrupt(self, failure: Exception) -> None:
        """End it with a failure, for all who wait and all who come; the first one counts."""
        self._stream.interrupt(failure)

    def close(self, *, abort: bool) -> None:
        """End the stream: in good order, or at once."""
        self._stream.close(abort=abort)
