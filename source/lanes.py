"""Page lanes: streams that carry batches of pages to the destination, and acks that mean applied.

A 2 MiB chunk of RAM always travels on the same lane, so two versions of a page never race. Per lane one thread encodes
and waits for the bandwidth limit, gRPC's thread sends, and another takes the acks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from switchover.v1 import migration_pb2

from common.memory.pages import encode, split_lanes
from common.memory.ram import GuestRam
from common.memory.runs import Runs
from common.rpc.channel import open_bulk_channel
from common.rpc.errors import peer_error
from common.rpc.page_batch import serialize
from source.limiter import Limiter

__all__ = ["LaneStats", "PageLanes"]

SEND_PAGES = "/switchover.v1.MigrationService/SendPages"
QUEUED_BATCHES = 4


@dataclass(slots=True)
class LaneStats:
    """What was sent: pages, of those zero ones, and bytes on the wire."""

    pages: int = 0
    zero_pages: int = 0
    sent_bytes: int = 0


class _Lane:
    def __init__(
        self,
        address: str,
        metadata: tuple[tuple[str, str], ...],
        limiter: Limiter,
        on_applied: Callable[[int, int], None],
    ) -> None:
        self._limiter = limiter
        self._on_applied = on_applied
        self._channel = open_bulk_channel(address)
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUED_BATCHES)
        self._changed = threading.Condition()
        self._unacked: dict[int, tuple[int, int]] = {}
        self._failure: Exception | None = None
        self.sequence = 0
        self._applied = 0
        call = self._channel.stream_stream(
            SEND_PAGES,
            request_serializer=lambda message: message,
            response_deserializer=migration_pb2.SendPagesResponse.FromString,
        )
        self._responses = call(self._requests(), metadata=metadata)
        self._acks = threading.Thread(target=self._take_acks, name="acks", daemon=True)
        self._acks.start()

    def _requests(self) -> Iterator[bytes]:
        while (message := self._queue.get()) is not None:
            yield message

    def _take_acks(self) -> None:
        try:
            for response in self._responses:
                with self._changed:
                    done = [number for number in self._unacked if number <= response.applied_sequence]
                    acked = [self._unacked.pop(number) for number in done]
                    self._applied = response.applied_sequence
                    self._changed.notify_all()
                self._on_applied(sum(pages for pages, _ in acked), sum(size for _, size in acked))
            failure: Exception = ConnectionError("the destination has ended a page lane")
        except grpc.RpcError as error:
            failure = peer_error(error)
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def send(self, ram: GuestRam, runs: Runs, data: Runs, number: int, *, compress: bool) -> LaneStats:
        """Send the pages of `runs`; return when all of them are applied."""
        stats = LaneStats()
        for batch in encode(ram, *runs, round=number, compress=compress, data=data):
            self.sequence += 1
            batch.sequence = self.sequence
            message = serialize(batch)
            self._limiter.take(len(message))
            with self._changed:
                self._unacked[self.sequence] = (batch.pages, len(message))
            self._put(message)
            stats.pages += batch.pages
            stats.zero_pages += batch.zero_pages
            stats.sent_bytes += len(message)
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._applied == self.sequence)
            if self._applied != self.sequence:
                assert self._failure is not None
                raise self._failure
        return stats

    def interrupt(self, failure: Exception) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _put(self, message: bytes | None) -> None:
        while True:
            if self._failure is not None:
                raise self._failure
            try:
                self._queue.put(message, timeout=0.1)
            except queue.Full:
                continue
            return

    def close(self, *, abort: bool) -> None:
        if abort or self._failure is not None:
            self._responses.cancel()
        else:
            self._queue.put(None)
        self._acks.join()
        self._channel.close()


class PageLanes:
    """All lanes of a migration. A failure of any lane is raised by `send` as `PeerError` or ConnectionError."""

    def __init__(
        self,
        address: str,
        session_id: str,
        ram: GuestRam,
        count: int,
        limiter: Limiter,
        *,
        compress: bool,
        on_applied: Callable[[int, int], None],
    ) -> None:
        """Open `count` lanes; `on_applied` is told (pages, bytes) of every ack."""
        self._ram = ram
        self._compress = compress
        self._lanes = [
            _Lane(address, (("session-id", session_id), ("lane", str(index))), limiter, on_applied)
            for index in range(count)
        ]
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="lane")

    @property
    def sequences(self) -> list[int]:
        """The last batch number of each lane."""
        return [lane.sequence for lane in self._lanes]

    def send(self, runs: Runs, data: Runs, number: int) -> LaneStats:
        """Send the pages of `runs` as round `number`; return when they are in the destination's RAM.

        `data` are the runs of RAM that are not holes: no page outside them is read.
        """
        futures: list[Future[LaneStats]] = [
            self._pool.submit(lane.send, self._ram, part, data, number, compress=self._compress)
            for lane, part in zip(self._lanes, split_lanes(*runs, len(self._lanes)), strict=True)
        ]
        parts = [future.result() for future in futures]
        return LaneStats(
            sum(part.pages for part in parts),
            sum(part.zero_pages for part in parts),
            sum(part.sent_bytes for part in parts),
        )

    def interrupt(self, failure: Exception) -> None:
        """Let a `send` that runs, and every later one, fail with `failure`."""
        for lane in self._lanes:
            lane.interrupt(failure)

    def close(self, *, abort: bool) -> None:
        """End the streams: in good order, or at once."""
        for lane in self._lanes:
            lane.close(abort=abort)
        self._pool.shutdown()
