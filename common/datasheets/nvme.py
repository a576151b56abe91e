"""nvme: reads and writes 4096-byte blocks of a namespace that is a function of (LBA, generation).

Block `lba` at generation g holds `pattern.block(content_seed(lba, g), 4096)`. A write stores whatever generation its
data claims, provided that the data is right to the byte; so the whole namespace is a map of generations, which is part
of the device's state, and both hosts see the same disk. Entries are finished in order.
"""

from __future__ import annotations

import numpy as np

MAGIC = 0x4E564D31
DEVICE_ID = 0x0002

BLOCK_SIZE = 4096
CAPACITY = 0x28  # u64, read-only: blocks
OP_READ = 1
OP_WRITE = 2
STATUS_OK = 1
STATUS_BAD_LBA = 2
STATUS_DMA_FAULT = 3
STATUS_BAD_DATA = 4  # a write whose data is not the block that it claims to be
STATUS_BAD_OPCODE = 5

ENTRY = np.dtype(
    [
        ("opcode", "<u4"),
        ("blocks", "<u4"),  # 1 … 256
        ("lba", "<u8"),
        ("iova", "<u8"),  # blocks * 4096 bytes
        ("command", "<u4"),  # the driver's own
        ("status", "<u4"),  # 0 when posted, STATUS_* when finished
    ]
)


def content_seed(lba: int, generation: int) -> int:
    """Return the seed of a block's content."""
    return (lba << 24 | generation & 0xFFFFFF) & 0xFFFF_FFFF_FFFF_FFFF


def generation_of(seed: int) -> int:
    """Return the generation that a content seed stands for."""
    return seed & 0xFFFFFF
