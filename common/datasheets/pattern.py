"""Bytes that can be computed again: what a device writes and its driver expects.

`block(seed, size)` is a slice of a fixed pool of pseudo-random bytes behind a header that holds the seed: any two seeds
differ, and no byte of it costs more than a copy.
"""

from __future__ import annotations

import struct

import numpy as np

__all__ = ["block", "seed_of"]

_HEADER = struct.Struct("<QQ")
_POOL_SIZE = 1 << 20
_MAX_BLOCK = 1 << 20
_POOL = np.random.Generator(np.random.Philox(0x5357)).bytes(_POOL_SIZE + _MAX_BLOCK)


def block(seed: int, size: int) -> bytes:
    """Return `size` bytes (16 … 1 MiB) that follow from `seed` (64 bits)."""
    if not _HEADER.size <= size <= _MAX_BLOCK:
        raise ValueError(f"a block has 16 to {_MAX_BLOCK} bytes, not {size}")
    start = seed * 0x9E3779B97F4A7C15 % _POOL_SIZE
    return _HEADER.pack(seed, size) + _POOL[start : start + size - _HEADER.size]


def seed_of(data: bytes | bytearray | memoryview) -> int:
    """Return the seed that a block claims to be made from."""
    return int(_HEADER.unpack_from(data)[0])
