"""The connection to the destination, across losses of the network.

All streams of a migration are of one generation. Whoever finds that his is lost asks for the next one (`Link.restore`):
the first to come lets all others fail too, and asks the destination until it answers or the time is over; the rest wait
and get what he got. Each then opens his own stream anew, and goes on behind what the destination has applied. That is
safe because the destination answers only when nothing of an earlier generation is served there any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from switchover.v1 import migration_pb2, migration_pb2_grpc

from common.rpc.errors import PeerError, peer_error

__all__ = ["Connection", "Link", "is_loss"]

ATTEMPT_SECONDS = 10.0
RETRY_SECONDS = 0.2
# A connection that was lost again sooner than this was none: the time that was allowed goes on.
LASTING_SECONDS = 2.0


def is_loss(failure: Exception) -> bool:
    """Return whether this is the network's failure, and nobody's decision."""
    return isinstance(failure, PeerError) and failure.code is grpc.StatusCode.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Connection:
    """One generation: its number, and for each stream where it begins."""

    generation: int
    begins: migration_pb2.ReconnectResponse

    @property
    def metadata(self) -> tuple[str, str]:
        """What tells the destination to which generation a stream belongs."""
        return "generation", str(self.generation)


class Link:
    """Any thread may call any method."""

    def __init__(
        self,
        stub: migration_pb2_grpc.MigrationServiceStub,
        session_id: str,
        say: Callable[[str], None],
        on_loss: Callable[[Exception], None],
    ) -> None:
        """`say` is told what happens, `on_loss` lets everything fail that is open."""
        self._stub = stub
        self._session_id = session_id
        self._say = say
        self._on_loss = on_loss
        self._restoring = threading.Lock()
        self._interrupted = threading.Event()
        self._failure: Exception | None = None
        self._loss: Exception | None = None
        self._call: grpc.Future[Any] | None = None
        self._patience_s = 0.0
        self._end = float("inf")
        self._lost_at = 0.0
        self._first_lost_at = 0.0
        self._restored_at = float("-inf")
        self._without_s = 0.0
        self.reconnects = 0
        self.current = Connection(0, migration_pb2.ReconnectResponse())

    def open(self, begins: migration_pb2.ReconnectResponse, patience_s: float) -> None:
        """Begin with the first generation; wait up to `patience_s` seconds for each next one, 0: not at all."""
        self.current = Connection(0, begins)
        self._patience_s = patience_s

    def wait_no_longer_than(self, end: float) -> None:
        """Wait for no connection after this moment of the monotonic clock."""
        self._end = end

    @property
    def lost_s(self) -> float:
        """For how long the connection has been lost now, in seconds; 0: it is there."""
        return time.monotonic() - self._lost_at if self._loss is not None else 0.0

    @property
    def without_s(self) -> float:
        """For how many seconds in all there was none."""
        return self._without_s + self.lost_s

    def check(self, connection: Connection) -> None:
        """Raise what has ended the connection, if anything has: to be asked when a stream of it was just opened."""
        failure = self._failure or (self._loss if connection is self.current else None)
        if failure is not None:
            raise failure

    def notice(self, connection: Connection, failure: Exception) -> None:
        """Let all fail that is open on a connection that is lost: of those who use it nobody may have found out."""
        if connection is self.current and self._loss is None and is_loss(failure):
            self._on_loss(failure)

    def interrupt(self, failure: Exception) -> None:
        """Let whoever waits for a connection, now or later, fail with this; the first one counts."""
        self._failure = self._failure or failure
        self._interrupted.set()
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Let go of what has ended it: failures know the frames that they came through, and what is in these."""
        self._failure = ConnectionError("the migration has ended")

    def restore(self, connection: Connection, failure: Exception) -> Connection:
        """Return the connection that follows one that has failed.

        Raise `failure` if the network is not to blame, or must not be waited for; what ends the waiting; `PeerError` if
        the destination does not answer in time, or refuses.
        """
        with self._restoring:
            if self._failure is not None:
                raise self._failure
            if connection is not self.current:
                return self.current
            if not is_loss(failure):
                raise failure
            now = time.monotonic()
            if now - self._restored_at > LASTING_SECONDS:
                self._first_lost_at = now
            end = min(self._first_lost_at + self._patience_s, self._end)
            if end <= now:
                raise failure
            self._lost_at, self._loss = now, failure
            try:
                self._on_loss(failure)
                self._say(f"the connection is lost, and waited for up to {end - now:.2g} s: {failure}")
                self.current = self._ask(end)
                self.reconnects += 1
                self._say(f"connected again after {self.lost_s:.2g} s")
            except Exception as error:
                self.interrupt(error)
                raise
            finally:
                self._restored_at = time.monotonic()
                self._without_s += self._restored_at - now
                self._loss = None
            return self.current

    def _ask(self, end: float) -> Connection:
        """Ask until the destination answers."""
        generation = self.current.generation
        # A connection that did not last is not asked for again at once.
        pause = RETRY_SECONDS if self._lost_at != self._first_lost_at else 0.0
        while True:
            self._interrupted.wait(pause)
            if self._failure is not None:
                raise self._failure
            pause = RETRY_SECONDS
            generation += 1
            seconds = min(end - time.monotonic(), ATTEMPT_SECONDS)
            if seconds <= 0:
                raise PeerError(
                    "UNREACHABLE", f"{self._loss}; it was not there again in time", grpc.StatusCode.UNAVAILABLE
                )
            request = migration_pb2.ReconnectRequest(session_id=self._session_id, generation=generation)
            self._call = call = self._stub.Reconnect.future(request, timeout=seconds, wait_for_ready=True)
            if self._failure is not None:
                call.cancel()
            try:
                answer = call.result()
            except grpc.FutureCancelledError:
                continue
            except grpc.RpcError as error:
                failure = peer_error(error)
                if not is_loss(failure) and failure.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise failure from error
                continue
            if len(answer.lanes) != len(self.current.begins.lanes):
                raise ConnectionError(f"the destination goes on with {len(answer.lanes)} page lanes")
            return Connection(generation, answer)
