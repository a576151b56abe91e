"""The two kinds of page lane, and how one of each is opened."""

from __future__ import annotations

from collections.abc import Callable, Container

import grpc
from switchover.v1 import host_pb2, migration_pb2

from common.host.network import Security
from common.memory.compression import MAX_UNIT_PAGES
from common.memory.pages import MAX_PLAIN_PAGES
from common.rpc.versions import PLAIN_16M
from source.grpc_lane import GrpcLane
from source.lanes import OnApplied, OpenLane
from source.limiter import Limiter
from source.reconnect import Connection
from source.tcp_lane import LanePort, TcpLane

__all__ = ["batch_pages", "opener"]

# gRPC copies a message several times at either end: one of 1 MiB stays in the caches meanwhile. TCP copies nothing.
GRPC_PAGES = 256


def batch_pages(kind: migration_pb2.LaneKind.ValueType, features: Container[str]) -> tuple[int, int]:
    """Return how many pages to give a payload in a batch that is not compressed: the least, and the most."""
    if kind != migration_pb2.LANE_KIND_TCP:
        return GRPC_PAGES, GRPC_PAGES
    return MAX_UNIT_PAGES, MAX_PLAIN_PAGES if PLAIN_16M in features else MAX_UNIT_PAGES


def opener(
    open_bulk: Callable[[], grpc.Channel],
    session_id: str,
    request: host_pb2.MigrateRequest,
    security: Security,
    limiter: Limiter,
) -> OpenLane:
    """Return what opens a lane of the kind that was asked for; `open_bulk` opens a channel to the destination."""
    if request.lane_kind != migration_pb2.LANE_KIND_TCP:
        return lambda number, connection, applied: GrpcLane(open_bulk, session_id, number, connection, limiter, applied)
    host = request.destination.rpartition(":")[0].strip("[]")

    def open_tcp(number: int, connection: Connection, applied: OnApplied) -> TcpLane:
        begins = connection.begins
        if len(begins.lane_tokens) != len(begins.lanes):
            raise ConnectionError(f"{request.destination} takes no page lanes of the kind tcp")
        port = LanePort(host, begins.lane_port, security.lane_client)
        last = begins.lanes[number].applied_sequence
        return TcpLane(port, begins.lane_tokens[number], last, limiter, applied)

    return open_tcp
