from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.machine.board import (
    AREA_SIZE,
    BARS_32,
    BARS_32_END,
    BARS_64,
    FIRST_AREA,
    Bar,
    Board,
    image_start,
    regions,
)
from common.memory.layout import CHUNK_SIZE, HIGH_START, LOW_END, Layout

GIB = 1 << 30
LAYOUTS = st.one_of(st.integers(32, 4096), st.integers(1, 128 * 1024)).map(lambda chunks: Layout(chunks * CHUNK_SIZE))
SIZES = st.integers(12, 36).map(lambda power: 1 << power)
DEVICES = st.lists(st.dictionaries(st.integers(0, 5), SIZES, max_size=6), max_size=8).map(
    lambda devices: [(f"dev{index}", sizes) for index, sizes in enumerate(devices)]
)
Devices = list[tuple[str, dict[int, int]]]


@given(LAYOUTS, DEVICES)
def test_bars_are_aligned_apart_from_each_other_and_from_ram(layout: Layout, devices: Devices) -> None:
    bars = Board(layout, devices).bars
    assert sorted((bar.device, bar.index, bar.size) for bar in bars) == sorted(
        (name, index, size) for name, sizes in devices for index, size in sizes.items()
    )
    taken = [(bar.gpa, bar.gpa + bar.size) for bar in bars]
    taken += [(segment.gpa, segment.gpa + segment.size) for segment in layout.segments]
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    for bar in bars:
        assert bar.gpa % bar.size == 0
        in_hole = bar.gpa >= LOW_END and bar.gpa + bar.size <= HIGH_START
        assert in_hole or bar.gpa >= BARS_64


@given(LAYOUTS, DEVICES)
def test_both_hosts_build_the_same_board(layout: Layout, devices: Devices) -> None:
    shuffled = [(name, dict(reversed(sizes.items()))) for name, sizes in devices]
    assert Board(layout, devices).bars == Board(Layout(layout.size), shuffled).bars


@given(DEVICES, LAYOUTS, st.data())
def test_an_access_finds_the_bar_that_holds_all_of_it(devices: Devices, layout: Layout, data: st.DataObject) -> None:
    board = Board(layout, devices)
    assume(board.bars)
    bar = data.draw(st.sampled_from(board.bars))
    offset = data.draw(st.integers(0, bar.size - 1))
    size = data.draw(st.integers(1, bar.size - offset))
    assert board.find(bar.gpa + offset, size) == bar
    assert board.find(bar.gpa, bar.size) == bar
    assert board.find(bar.gpa, bar.size + 1) is None
    assert board.find(bar.gpa - 1, 2) is None


def test_small_bars_are_in_the_hole_and_large_ones_above_all_ram() -> None:
    devices = [("gpu", {0: 16 << 20, 2: 16 * GIB}), ("nic", {0: 4096, 4: 1 << 30})]
    small = Board(Layout(64 << 20), devices)
    assert small.bars == [
        Bar(BARS_32, 16 << 20, "gpu", 0),
        Bar(BARS_64, 16 * GIB, "gpu", 2),
        Bar(BARS_32 + (16 << 20), 4096, "nic", 0),
        Bar(BARS_64 + 16 * GIB, 1 << 30, "nic", 4),
    ]
    assert set(small.of_device("gpu")) == {0, 2} and small.of_device("gpu")[2].gpa == BARS_64
    assert small.of_device("nobody") == {}
    large = Board(Layout(600 * GIB), devices)
    assert large.of_device("gpu")[2].gpa == 608 * GIB  # behind RAM, which ends at 601 GiB


def test_what_no_longer_fits_in_the_hole_does_not_close_it() -> None:
    """256 MiB fit once, 128 MiB once more; the rest goes up."""
    sizes = [("a", {0: 256 << 20}), ("b", {0: 256 << 20}), ("c", {0: 128 << 20}), ("d", {0: 4096})]
    a, b, c, d = Board(Layout(64 << 20), sizes).bars
    assert (a.gpa, b.gpa, c.gpa, d.gpa) == (BARS_32, BARS_64, BARS_32 + (256 << 20), BARS_32 + (384 << 20))
    assert d.gpa + d.size <= BARS_32_END


def test_the_image_is_behind_the_programs() -> None:
    assert image_start(0) == FIRST_AREA
    assert image_start(3) == FIRST_AREA + 3 * AREA_SIZE


@given(LAYOUTS, st.lists(st.integers(1, 4096).map(lambda chunks: chunks * CHUNK_SIZE), max_size=6))
def test_regions_are_ram_apart_from_each_other(layout: Layout, sizes: list[int]) -> None:
    try:
        found = regions(layout, sizes)
    except ValueError:
        assert sum(sizes) > layout.size - max(sizes) * len(layout.segments)  # never for want of trying
        return
    spans = sorted((gpa, gpa + size) for gpa, size in zip(found, sizes, strict=True))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for start, end in spans:
        layout.offset_of(start, end - start)  # ValueError if it is not RAM, or lies across the hole


def test_regions_are_below_each_other_from_the_top() -> None:
    assert regions(Layout(64 << 20), []) == []
    assert regions(Layout(64 << 20), [16 << 20, 8 << 20]) == [48 << 20, 40 << 20]
    # The 2 GiB behind the hole, then what lies before it: none lies across.
    assert regions(Layout(5 * GIB), [GIB, GIB + (2 << 20), GIB]) == [
        HIGH_START + GIB,
        LOW_END - GIB - (2 << 20),
        LOW_END - 2 * GIB - (2 << 20),
    ]


def test_a_region_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="no room in RAM for a region of"):
        regions(Layout(64 << 20), [64 << 20, 2 << 20])
