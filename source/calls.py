"""Requests to the destination that answer at once: each is bounded in time, and can be ended from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from common.rpc.errors import PeerError, peer_error
from source.failures import CancelledError
from source.reconnect import Link

__all__ = ["Calls"]

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Calls:
    """What one thread asks, and any thread may `end`.

    `may_end`: whether the migration can still be undone. From COMMIT on nothing is ended or asked again.
    """

    def __init__(self, link: Link, may_end: Callable[[], bool]) -> None:
        self.ended_by: Exception | None = None
        self.ending = threading.Event()
        self._link = link
        self._may_end = may_end
        self._call: grpc.Future[Any] | None = None

    def end(self, failure: Exception) -> bool:
        """Let `check` and every further request raise the first failure given; return whether that is possible."""
        if not self._may_end():
            return False
        self.ended_by = self.ended_by or failure
        self.ending.set()
        return True

    def interrupt(self) -> None:
        """Let the request that is under way fail."""
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Let go of what has ended it: failures know the frames that they came through, and what is in these."""
        self.ended_by = None

    def check(self) -> None:
        """Raise what it was ended with."""
        if self.ended_by is not None:
            raise self.ended_by

    def ask(self, call: grpc.UnaryUnaryMultiCallable[Request, Answer], request: Request, seconds: float) -> Answer:
        """Ask what may be asked again, and do so once a lost connection is back; wait for as long, or until `end`."""
        while True:
            connection = self._link.current
            try:
                return self.ask_once(call, request, seconds)
            except PeerError as failure:
                if not self._may_end():
                    raise
                self._link.restore(connection, failure)

    def ask_once(self, call: grpc.UnaryUnaryMultiCallable[Request, Answer], request: Request, seconds: float) -> Answer:
        """Ask once; whatever the call fails with is a `PeerError`."""
        self._call = future = call.future(request, timeout=seconds)
        if self._may_end():
            self.check()
        try:
            answer = future.result()
        except grpc.RpcError as error:
            raise peer_error(error) from error
        except grpc.FutureCancelledError:
            raise (self.ended_by or CancelledError("cancelled")) from None
        self._call = None
        return answer
