"""Page lanes: streams that carry batches of pages to the destination.

A 2 MiB chunk of RAM always travels on the same lane, so two versions of a page never race. Each lane encodes in a
thread of its own, and waits there for the bandwidth limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
from switchover.v1 import migration_pb2

from common.memory.pages import PageBatch, split_lanes
from common.memory.runs import Runs
from common.rpc.page_batch import serialize
from source.lane_stats import LaneStats, total
from source.limiter import Limiter
from source.packer import Packer
from source.stream import AckedStream

__all__ = ["LaneStats", "PageLanes"]

SEND_PAGES = "/switchover.v1.MigrationService/SendPages"


class _Lane:
    def __init__(
        self,
        open_channel: Callable[[], grpc.Channel],
        metadata: tuple[tuple[str, str], ...],
        limiter: Limiter,
        on_applied: Callable[[int, int], None],
    ) -> None:
        self._limiter = limiter
        self._on_applied = on_applied
        self._channel = open_channel()
        self._unacked: dict[int, tuple[int, int]] = {}
        call = self._channel.stream_stream(
            SEND_PAGES,
            request_serializer=lambda message: message,
            response_deserializer=migration_pb2.SendPagesResponse.FromString,
        )
        self.stream: AckedStream[bytes, migration_pb2.SendPagesResponse] = AckedStream(
            lambda requests: call(requests, metadata=metadata), self._applied
        )

    def _applied(self, response: migration_pb2.SendPagesResponse) -> None:
        done = [number for number in list(self._unacked) if number <= response.applied_sequence]
        acked = [self._unacked.pop(number) for number in done]
        self._on_applied(sum(pages for pages, _ in acked), sum(size for _, size in acked))

    def send(self, batches: Iterator[PageBatch]) -> LaneStats:
        """Send batches of pages; return when all of them are applied."""
        stats = LaneStats()
        for batch in batches:
            batch.sequence = self.stream.next_sequence()
            message = serialize(batch)
            self._unacked[batch.sequence] = (batch.pages, len(message))
            self._limiter.take(len(message))
            self.stream.send(message)
            stats.count(batch, len(message))
        self.stream.drain()
        return stats

    def close(self, *, abort: bool) -> None:
        self.stream.close(abort=abort)
        self._channel.close()


class PageLanes:
    """All lanes of a migration; failures are those of `AckedStream`."""

    def __init__(
        self,
        open_channel: Callable[[], grpc.Channel],
        session_id: str,
        count: int,
        limiter: Limiter,
        *,
        packer: Packer,
        on_applied: Callable[[int, int], None],
    ) -> None:
        """Open `count` lanes; `on_applied` is told (pages, bytes) of every ack."""
        self._packer = packer
        self._lanes = [
            _Lane(open_channel, (("session-id", session_id), ("lane", str(index))), limiter, on_applied)
            for index in range(count)
        ]
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="lane")

    @property
    def sequences(self) -> list[int]:
        """The last batch number of each lane."""
        return [lane.stream.sequence for lane in self._lanes]

    def send(self, runs: Runs, data: Runs, number: int) -> LaneStats:
        """Send the pages of `runs` as round `number`; return when they are in the destination's RAM.

        `data` are the runs of RAM that are not holes: no page outside them is read.
        """
        futures: list[Future[LaneStats]] = [
            self._pool.submit(lane.send, self._packer.batches(index, part, data, number, lane.stream.drain))
            for index, (lane, part) in enumerate(zip(self._lanes, split_lanes(*runs, len(self._lanes)), strict=True))
        ]
        return total([future.result() for future in futures])

    def interrupt(self, failure: Exception) -> None:
        """Let a `send` that runs, and every later one, fail with `failure`."""
        for lane in self._lanes:
            lane.stream.interrupt(failure)

    def close(self, *, abort: bool) -> None:
        """End the streams: in good order, or at once."""
        for lane in self._lanes:
            lane.close(abort=abort)
        self._pool.shutdown()
