from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.guest.memory import GuestMemory
from common.guest.programs.iova import MSI_END, MSI_START, TOP, WINDOW, IovaAllocator
from common.guest.programs.program import Area
from common.memory.ram import GuestRam


def allocator(top: int = TOP) -> IovaAllocator:
    iovas = IovaAllocator(Area(GuestMemory(GuestRam.create(2 << 20)), 0, 4096), top)
    iovas.begin()
    return iovas


def test_addresses_go_downwards_and_round_the_range_of_interrupts() -> None:
    iovas = allocator()
    assert iovas.allocate(0x1001) == TOP - 0x2000
    assert iovas.allocate((TOP - MSI_END) // 2) > MSI_END
    assert iovas.allocate((TOP - MSI_END) // 2) == MSI_START - (TOP - MSI_END) // 2


@settings(max_examples=30)
@given(st.sampled_from([1, 3, 200]), st.integers(2, 12), st.lists(st.tuples(st.integers(0, 11), st.booleans())))
def test_no_two_live_addresses_overlap_whatever_is_freed(pages: int, count: int, moves: list[tuple[int, bool]]) -> None:
    iovas, size = allocator(TOP - WINDOW), pages * 4096
    fixed = iovas.allocate(8192)
    busy = np.zeros(count, np.uint64)
    for index in range(count):
        busy[index] = iovas.move(size, busy[:index])
    for which, reuse in moves * 5:
        index = which % count
        old = int(busy[index])
        reused = iovas.reuse() if reuse else None
        busy[index] = iovas.move(size, busy) if reused is None else reused
        assert int(busy[index]) != old
        iovas.free(old)
        starts = np.sort(busy).astype(np.int64)
        assert (np.diff(starts) >= size).all()
        assert starts[0] >= TOP - 2 * WINDOW and starts[-1] + size <= fixed


def test_at_the_end_of_the_window_it_goes_on_at_the_top_round_what_is_in_use() -> None:
    iovas, size = allocator(), 100 * 4096
    busy = np.zeros(4, np.uint64)
    for index in range(4):
        busy[index] = iovas.move(size, busy[:index])
    iovas.free(int(busy[3]) - size)
    for _ in range(3 * WINDOW // size):
        new = iovas.move(size, busy)
        assert all(abs(new - int(other)) >= size for other in (*busy, busy[3] - np.uint64(size)))
        assert new >= TOP - WINDOW
    with pytest.raises(ValueError, match="no IOVA"):
        iovas.move(size, np.arange(TOP - WINDOW, TOP, size // 2, dtype=np.uint64))


def test_a_freed_address_comes_back() -> None:
    iovas = allocator()
    assert iovas.reuse() is None
    iovas.free(0x5000)
    iovas.free(0x9000)
    assert (iovas.reuse(), iovas.reuse(), iovas.reuse()) == (0x5000, 0x9000, None)
