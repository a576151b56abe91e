"""accelerator: works on its own memory, which is large, which others may write to (BAR 2), and which never rests.

The memory's first half is the driver's and the peers': LOAD copies from guest RAM into it, XOR changes it, STORE copies
it to guest RAM; BAR 2 shows all of it. The second half is the device's own: CELL by CELL, at its churn rate, it moves
each cell on to its next step, and cell i at step s holds `pattern.block(cell_seed(i, s), CELL)`. Jobs are finished in
order.
Cells move whenever the device runs, enabled or not. Writes to BAR 2's second half are ignored; LOAD and XOR there are
STATUS_BAD_RANGE, STORE may read all of the memory. The memory is a power of two.
"""

from __future__ import annotations

import numpy as np

MAGIC = 0x41434331
DEVICE_ID = 0x0003

MEMORY_SIZE = 0x28  # u64, read-only: bytes of device memory (BAR 2)
STEPS = 0x30  # u64, read-only: cell moves so far: cell (n % cells) made its (n // cells + 1)-th step at move n
OP_LOAD = 1
OP_XOR = 2  # each byte with `argument`
OP_STORE = 3
STATUS_OK = 1
STATUS_BAD_RANGE = 2
STATUS_DMA_FAULT = 3
STATUS_BAD_OPCODE = 4
CELL = 4096

ENTRY = np.dtype(
    [
        ("opcode", "<u4"),
        ("length", "<u4"),  # bytes, up to 1 MiB
        ("offset", "<u8"),  # in device memory
        ("iova", "<u8"),  # LOAD and STORE
        ("argument", "<u4"),  # XOR
        ("status", "<u4"),  # 0 when posted, STATUS_* when finished
    ]
)


def cell_seed(cell: int, step: int) -> int:
    """Return the seed of a cell's content; step 0 is the state after reset."""
    return (cell << 40 | step & 0xFF_FFFF_FFFF) & 0xFFFF_FFFF_FFFF_FFFF
