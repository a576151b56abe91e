"""Channels to other daemons.

Control calls and bulk data never share a channel: beside a page lane that fills the link a unary call waits for
hundreds of milliseconds behind the lane's unacknowledged bytes.
"""

from __future__ import annotations

import grpc

__all__ = ["BULK_OPTIONS", "MAX_MESSAGE", "open_bulk_channel", "open_channel"]

MAX_MESSAGE = 64 << 20
_COMMON_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.max_ping_strikes", 0),
    # A network that is back is found at once; the first of these is how long a connection may take to be made.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
# What a stream of 1 MiB messages wants: large frames, a wide window from the start, no probing for it.
BULK_OPTIONS: list[tuple[str, int]] = [
    *_COMMON_OPTIONS,
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.lookahead_bytes", 16 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.experimental.tcp_min_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 << 20),
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
]


def open_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """Return a channel for control calls to HOST:PORT; without credentials it is plain, and a TLS port refuses it."""
    return _open(address, credentials, _COMMON_OPTIONS)


def open_bulk_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """Return a channel for one bulk stream to HOST:PORT, with a connection of its own."""
    return _open(address, credentials, BULK_OPTIONS)


def _open(address: str, credentials: grpc.ChannelCredentials | None, options: list[tuple[str, int]]) -> grpc.Channel:
    options = [*options, ("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)
