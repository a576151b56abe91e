"""nic: receives packets of a generator into buffers that the driver posts; writes to a peer's BAR if told to.

The driver posts empty buffers; the device fills them in order, packet after packet with growing sequence numbers, as
fast as its rate allows, completes the entry, and signals. Only posted buffers are written. With CONTROL_PEER it also
writes PEER_BLOCK bytes at a time round and round into the window at PEER_BASE (IOVA of another device's BAR): the write
with sequence n goes to offset (n * PEER_BLOCK) % PEER_SIZE and holds `pattern.block(n, PEER_BLOCK)`.
"""

from __future__ import annotations

import numpy as np

MAGIC = 0x4E494331
DEVICE_ID = 0x0001

SEQUENCE = 0x28  # u64, read-only: sequence number of the next packet
PEER_BASE = 0x30  # u64: IOVA
PEER_SIZE = 0x38  # u32: bytes, a multiple of PEER_BLOCK
PEER_SEQUENCE = 0x40  # u64, read-only: sequence number of the next write to the peer
CONTROL_PEER = 1 << 1
PEER_BLOCK = 256

# Ring entry: posted by the driver with done = 0, completed by the device. A packet is pattern.block(sequence, length).
ENTRY = np.dtype(
    [
        ("iova", "<u8"),
        ("size", "<u4"),  # of the buffer: 64 … 64 KiB
        ("done", "<u4"),  # 1: filled; 2: refused (DMA fault, or an impossible size), and no sequence number is used up
        ("sequence", "<u8"),
        ("length", "<u4"),  # of the packet: the device's packet size, or the buffer's if that is smaller
        ("checksum", "<u4"),  # zlib.crc32 of the packet
    ]
)
