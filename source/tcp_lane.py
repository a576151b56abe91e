"""A page lane that is a TCP connection: batches go from guest RAM to the socket, without a copy of ours.

The thread that sends takes the acks too, between two batches, so that nobody else touches the connection.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import grpc

from common.memory.pages import PageBatch
from common.rpc.errors import PeerError
from common.rpc.lane_frame import AckReader, LaneRefusedError, pack_ack, pack_batch, pack_end, pack_hello
from common.rpc.lane_socket import LaneSocket
from source.lanes import OnApplied, OnSent, Unacked
from source.limiter import Limiter

__all__ = ["LanePort", "TcpLane"]

BEGIN_SECONDS = 10.0
MAX_UNACKED = 4  # batches on their way, so that no ack has to wait for room
ACKS_SIZE = 4096


@dataclass(frozen=True, slots=True)
class LanePort:
    """Where a destination takes page lanes; `context` is None without TLS."""

    host: str
    port: int
    context: ssl.SSLContext | None

    def connect(self, token: bytes) -> LaneSocket:
        """Open a lane, which the destination has welcomed; OSError if it does not."""
        connection = socket.create_connection((self.host, self.port), BEGIN_SECONDS)
        lane = LaneSocket(connection, self.context, self.host)
        try:
            welcome = pack_ack(0)
            if lane.begin(BEGIN_SECONDS, send=pack_hello(token), receive=len(welcome)) != welcome:
                raise ConnectionError("it does not welcome the lane")
        except BaseException:
            lane.close()
            raise
        return lane


class TcpLane:
    """See `PageLane`."""

    def __init__(self, port: LanePort, token: bytes, applied: int, limiter: Limiter, on_applied: OnApplied) -> None:
        """Open the lane that a token is for, which goes on behind batch `applied`."""
        self._limiter = limiter
        self._unacked = Unacked(on_applied)
        self._acks = AckReader()
        self._failure: Exception | None = None
        self._applied = self.sequence = applied
        try:
            self._socket = port.connect(token)
        except OSError as error:
            raise _unreachable(f"no page lane to port {port.port}: {error}") from error

    def send_all(self, batches: Iterator[PageBatch], sent: OnSent) -> None:
        """Number batches and send them."""
        for batch in batches:
            sent(batch, self._send(batch))

    def _send(self, batch: PageBatch) -> int:
        self.sequence += 1
        batch.sequence = self.sequence
        parts = pack_batch(batch)
        size = sum(map(len, parts))
        self._unacked.add(batch, size)
        self._limiter.take(size)
        self._check()
        try:
            self._socket.send(parts)
        except OSError as error:
            self._broken(error)
        while len(self._unacked) >= MAX_UNACKED or self._socket.is_readable():
            self._take_acks()
        return size

    def drain(self) -> None:
        """Wait until everything that was sent is applied."""
        self._check()
        while self._applied < self.sequence:
            self._take_acks()

    def _take_acks(self) -> None:
        try:
            data = self._socket.receive_some(ACKS_SIZE)
        except OSError as error:
            self._broken(error)
        self._read(data)

    def _read(self, data: bytes) -> None:
        try:
            for sequence in self._acks.feed(data):
                if not self._applied <= sequence <= self.sequence:
                    self._fail(ConnectionError(f"the destination acknowledges {sequence}, never sent"))
                self._applied = sequence
                self._unacked.applied(sequence)
        except LaneRefusedError as refusal:
            self._fail(PeerError(refusal.reason, str(refusal), grpc.StatusCode.ABORTED))

    def _broken(self, error: OSError) -> NoReturn:
        """Raise what has ended the lane: the destination's word if it has said one."""
        with suppress(OSError):
            while self._failure is None and self._socket.is_readable():
                self._read(self._socket.receive_some(ACKS_SIZE))
        self._fail(_unreachable(f"a page lane has ended: {error}"))

    def _fail(self, failure: Exception) -> NoReturn:
        self.interrupt(failure)
        raise self._failure or failure

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def settle(self, sequence: int) -> int:
        """Note which batch was applied last; return how many pages were lost."""
        return self._unacked.settle(sequence, self.sequence)

    def interrupt(self, failure: Exception) -> None:
        """Let every call fail with `failure`."""
        self._failure = self._failure or failure
        self._socket.shutdown()

    def close(self, *, abort: bool) -> None:
        """End the lane: in good order if nothing has gone wrong."""
        if not abort and self._failure is None:
            with suppress(OSError):  # it has no word of ours to wait for
                self._socket.send([pack_end()])
        self._socket.close()


def _unreachable(message: str) -> PeerError:
    return PeerError("UNREACHABLE", message, grpc.StatusCode.UNAVAILABLE)
