from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from device_rig import Rig

from common.datasheets import pci
from common.vfio.feature import Range
from common.vfio_user.codec import DMA_READABLE, DMA_WRITABLE

RING = 1 << 32  # reached by message, so that every access to it is seen
BUFFER = 0x10000
ENTRIES = {"nic": (BUFFER, 64, 0, 0, 0, 0), "nvme": (1, 1, 5, BUFFER, 7, 0), "accelerator": (2, 9, 0, 0, 3, 0)}


@pytest.mark.parametrize("kind", sorted(ENTRIES))
def test_says_that_an_entry_is_finished_after_all_else(rig: Callable[..., Rig], kind: str) -> None:
    device = rig(kind)
    device.set_up()
    device.client.dma_map(RING, 4096, DMA_READABLE | DMA_WRITABLE)
    dtype, field = device.device.ENTRY, device.device.COMPLETION
    page = bytearray(4096)
    page[:4] = (1).to_bytes(4, "little")
    page[pci.RING_HEADER : pci.RING_HEADER + dtype.itemsize] = np.array([ENTRIES[kind]], dtype=dtype).tobytes()
    seen: list[tuple[int, int, tuple[object, ...]]] = []

    def write(iova: int, data: memoryview) -> None:
        entry = np.frombuffer(bytes(data), dtype=dtype)[0]
        rest = tuple(entry[name].item() for name in dtype.names or () if name != field)
        seen.append((int(entry[field]), device.device.registers.get(pci.HEAD, 4), rest))

    device.client.on_dma_read = lambda iova, count: bytes(page[iova - RING :][:count])
    device.client.on_dma_write = write
    device.client.logging_start(4096, [Range(RING, 4096)])
    device.write(pci.RING_BASE, RING, 8)
    device.write(pci.RING_ENTRIES, 4)
    device.write(pci.CONTROL, pci.CONTROL_ENABLE)
    assert device.interrupted()
    (before, head_before, rest_before), (after, head_after, rest_after) = seen
    assert (before, head_before) == (0, 0)
    assert (after, head_after) == (1, 1)
    assert rest_before == rest_after
