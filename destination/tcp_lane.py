"""One TCP page lane, from its welcome to its end: batches go from the socket into guest RAM."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from common.memory.pages import MAX_PAYLOAD, PageBatch, Receive
from common.rpc.lane_frame import HEADER_SIZE, pack_ack, parse_header
from common.rpc.lane_socket import LaneSocket
from destination.refusal import bad

__all__ = ["receive_batches"]


def receive_batches(connection: LaneSocket, apply: Callable[[PageBatch, Receive], None]) -> None:
    """Welcome the lane; apply and acknowledge each batch until the source says that it was the last.

    Nothing is allocated for what a header says before that was found possible, and no payload is taken of a batch that
    is not in order. Raise OSError if the connection ends without a word, and what `apply` raises.
    """
    header_bytes = memoryview(bytearray(HEADER_SIZE))
    payload = np.empty(MAX_PAYLOAD, np.uint8).data  # never touched by pages that go straight into RAM
    connection.send([pack_ack(0)])
    while True:
        connection.receive([header_bytes])
        try:
            header = parse_header(header_bytes)
        except ValueError as error:
            raise bad(str(error)) from error
        if header is None:
            return
        body = bytearray(header.body_bytes)
        if body:
            connection.receive([memoryview(body)])
        parts = (payload[: header.payload_bytes],) if header.payload_bytes else ()
        apply(header.batch(bytes(body), parts), connection.receive)
        connection.send([pack_ack(header.sequence)])
