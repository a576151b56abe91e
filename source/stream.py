"""One stream to the destination: requests numbered from 1, acks that mean applied, an end that waits for the last.

Page lanes, device data and mapping changes are all this. Our thread sends into a short queue, gRPC's takes from it,
and a third takes the acks. Many requests are one iterator in that queue, and gRPC's thread runs it: two threads that
meet for each of them cost a fifth of a lane's speed. Whatever ends the stream early is kept, and raised by every later
call.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import grpc

from common.rpc.errors import peer_error

__all__ = ["Ack", "AckedStream"]

QUEUED_REQUESTS = 4


class Ack(Protocol):
    """Says that everything up to a number is applied."""

    @property
    def applied_sequence(self) -> int:
        """The number."""


Request = TypeVar("Request")
Response = TypeVar("Response", bound=Ack)


class AckedStream(Generic[Request, Response]):
    """Failures are `PeerError`, ConnectionError, or what `interrupt` was given."""

    def __init__(
        self,
        call: Callable[[Iterator[Request]], Any],
        on_ack: Callable[[Response], None] = lambda _: None,
        applied: int = 0,
        sequence: int = 0,
        on_end: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """`call` opens the gRPC stream for an iterator of requests; `on_ack` sees each ack, in the thread of acks.

        `on_end` is told there too what has ended the stream, which may be while nobody uses it. `applied` and
        `sequence`: the last request that was applied, and the last one that has a number, so far.
        """
        self._queue: queue.Queue[Iterator[Request] | None] = queue.Queue(QUEUED_REQUESTS)
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._on_ack = on_ack
        self._on_end = on_end
        self._applied = applied
        self.sequence = sequence
        self._responses = call(self._requests())
        self._acks = threading.Thread(target=self._take_acks, name="acks", daemon=True)
        self._acks.start()

    def _requests(self) -> Iterator[Request]:
        for requests in iter(self._queue.get, None):
            yield from requests

    def _take_acks(self) -> None:
        failure: Exception = ConnectionError("the destination has ended a stream")
        try:
            for response in self._responses:
                if not self._applied <= response.applied_sequence <= self.sequence:
                    failure = ConnectionError(f"the destination acknowledges {response.applied_sequence}, never sent")
                    break
                self._on_ack(response)
                with self._changed:
                    self._applied = response.applied_sequence
                    self._changed.notify_all()
        except grpc.RpcError as error:
            failure = peer_error(error)
        finally:
            self.interrupt(failure)
            self._on_end(failure)

    def next_sequence(self) -> int:
        """Return the number for the next request."""
        self.sequence += 1
        return self.sequence

    def send(self, request: Request) -> None:
        """Hand a request over; wait while the destination does not keep up."""
        self._put(iter((request,)))

    def _put(self, requests: Iterator[Request]) -> None:
        while True:
            self.check()
            with suppress(queue.Full):
                self._queue.put(requests, timeout=0.1)
                return

    def send_all(self, requests: Generator[Request]) -> None:
        """Hand over many, which gRPC's thread takes out of `requests`; return when it has taken all.

        If that fails, in `requests` or in the stream, nothing more is taken out of them when this raises.
        """
        handed_over = _HandedOver(requests, self._changed, self.interrupt)
        try:
            self._put(handed_over)
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None or handed_over.all_taken)
            self.check()
        finally:
            handed_over.close()

    def check(self) -> None:
        """Raise what has ended the stream, if anything has."""
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Wait until everything that was sent is applied."""
        self.wait_for(self.sequence)

    def wait_for(self, sequence: int) -> None:
        """Wait until everything up to this number is applied."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._applied >= sequence)
        self.check()

    def interrupt(self, failure: Exception) -> None:
        """End it with a failure, for all who wait and all who come; the first one counts."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def close(self, *, abort: bool) -> None:
        """End the stream: in good order, or at once."""
        if abort or self._failure is not None:
            self._responses.cancel()
            with suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
        self._queue.put(None)
        self._acks.join()


class _HandedOver(Generic[Request]):
    """Requests that gRPC's thread takes, until they are taken back."""

    def __init__(
        self, requests: Generator[Request], changed: threading.Condition, on_failure: Callable[[Exception], None]
    ) -> None:
        self._requests = requests
        self._changed = changed
        self._on_failure = on_failure
        self._taking = threading.Lock()
        self._closed = False
        self.all_taken = False

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        with self._taking:
            if not self._closed:
                try:
                    return next(self._requests)
                except StopIteration:
                    with self._changed:
                        self.all_taken = True
                        self._changed.notify_all()
                except Exception as error:  # noqa: BLE001  # gRPC would log it, and tell nobody
                    self._on_failure(error)
            raise StopIteration

    def close(self) -> None:
        """Take them back; whoever is just being given one gets that."""
        with self._taking:
            self._closed = True
            self._requests.close()
