"""The ceiling of lanes that compress: our first level of zstd over plain sockets, zero pages as bits, and no more.

Each stream has a thread at either end, which packs and sends, or receives and unpacks, a unit after the other. What it
takes beyond that to migrate a machine is all that it leaves out: rounds, dirty pages, what was sent before, acks,
choosing the method, checks of what comes. Run as a program it is one end, as `benchmarks.plain` is.
"""

from __future__ import annotations

import socket
import struct
import sys

import numpy as np
import zstandard

from benchmarks.plain import one_end, receive_into
from common.memory.allocator import tune_allocator
from common.memory.compression import MAX_UNIT_PAGES, METHODS
from common.memory.layout import PAGE_SIZE

__all__: list[str] = []

FIRST_LEVEL = next(method for method in METHODS if method.name == "zstd-1")
SIZE = struct.Struct("<I")


def _pages(view: memoryview) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.frombuffer(view, np.uint64).reshape(-1, PAGE_SIZE // 8)


def _send(connection: socket.socket, view: memoryview) -> int:
    compressor = zstandard.ZstdCompressor(compression_params=FIRST_LEVEL.parameters)
    pages, sent = _pages(view), 0
    for start in range(0, len(pages), MAX_UNIT_PAGES):
        unit = pages[start : start + MAX_UNIT_PAGES]
        filled = unit.any(axis=1)
        packed = compressor.compress(unit[filled].data)
        head = SIZE.pack(len(packed)) + np.packbits(filled).tobytes()
        connection.sendall(head)
        connection.sendall(packed)
        sent += len(head) + len(packed)
    return sent


def _receive(connection: socket.socket, view: memoryview) -> int:
    decompressor = zstandard.ZstdDecompressor()
    pages, received = _pages(view), 0
    room = memoryview(bytearray(2 * MAX_UNIT_PAGES * PAGE_SIZE))  # what cannot be packed becomes a little larger
    for start in range(0, len(pages), MAX_UNIT_PAGES):
        unit = pages[start : start + MAX_UNIT_PAGES]
        head = room[: SIZE.size + -(-len(unit) // 8)]
        receive_into(connection, head)
        (size,) = SIZE.unpack_from(head)
        filled = np.unpackbits(np.frombuffer(head[SIZE.size :], np.uint8), count=len(unit)).astype(bool)
        receive_into(connection, room[:size])
        unit[filled] = _pages(memoryview(decompressor.decompress(room[:size])))
        received += len(head) + size
    return received


if __name__ == "__main__":
    tune_allocator()
    one_end(sys.argv[1:], _send, _receive)
