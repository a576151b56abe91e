"""A page lane that is a gRPC stream, with a connection of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import grpc
from switchover.v1 import migration_pb2

from common.memory.pages import PageBatch
from common.rpc.page_batch import serialize
from source.lanes import OnApplied, OnSent, Unacked
from source.limiter import Limiter
from source.reconnect import Connection
from source.stream import AckedStream

__all__ = ["GrpcLane"]

SEND_PAGES = "/switchover.v1.MigrationService/SendPages"


class GrpcLane:
    """See `PageLane`."""

    def __init__(
        self,
        open_channel: Callable[[], grpc.Channel],
        session_id: str,
        number: int,
        connection: Connection,
        limiter: Limiter,
        on_applied: OnApplied,
    ) -> None:
        """Open lane `number` of a session."""
        self._limiter = limiter
        self._unacked = Unacked(on_applied)
        self._channel = open_channel()
        call = self._channel.stream_stream(
            SEND_PAGES,
            request_serializer=lambda message: message,
            response_deserializer=migration_pb2.SendPagesResponse.FromString,
        )
        metadata = (("session-id", session_id), ("lane", str(number)), connection.metadata)
        applied = connection.begins.lanes[number].applied_sequence
        self._stream: AckedStream[bytes, migration_pb2.SendPagesResponse] = AckedStream(
            lambda requests: call(requests, metadata=metadata),
            lambda response: self._unacked.applied(response.applied_sequence),
            applied,
            applied,
        )

    @property
    def sequence(self) -> int:
        """Number of the last batch."""
        return self._stream.sequence

    def send_all(self, batches: Iterator[PageBatch], sent: OnSent) -> None:
        """Number batches and send them."""
        self._stream.send_all(self._messages(batches, sent))

    def _messages(self, batches: Iterator[PageBatch], sent: OnSent) -> Generator[bytes]:
        for batch in batches:
            batch.sequence = self._stream.next_sequence()
            message = serialize(batch)
            self._unacked.add(batch, len(message))
            self._limiter.take(len(message))
            sent(batch, len(message))
            yield message

    def drain(self) -> None:
        """Wait until everything that was sent is applied."""
        self._stream.drain()

    def settle(self, sequence: int) -> int:
        """Note which batch was applied last; return how many pages were lost."""
        return self._unacked.settle(sequence, self._stream.sequence)

    def interrupt(self, failure: Exception) -> None:
        """Let every call fail with `failure`."""
        self._stream.interrupt(failure)

    def close(self, *, abort: bool) -> None:
        """End the stream and its connection."""
        self._stream.close(abort=abort)
        self._channel.close()
