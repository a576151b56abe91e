from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.memory.layout import CHUNK_SIZE, HIGH_START, LOW_END, PAGE_SIZE, Layout, Segment

sizes = st.integers(1, 1 << 19).map(lambda chunks: chunks * CHUNK_SIZE)


@pytest.mark.parametrize("size", [0, -CHUNK_SIZE, PAGE_SIZE, CHUNK_SIZE + 1])
def test_refuses_sizes_that_are_no_multiple_of_two_mebibytes(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 2 MiB"):
        Layout(size)


def test_small_ram_is_one_segment_up_to_three_gibibytes() -> None:
    assert Layout(CHUNK_SIZE).segments == (Segment(0, CHUNK_SIZE, 0),)
    assert Layout(LOW_END).segments == (Segment(0, LOW_END, 0),)


def test_the_rest_of_large_ram_begins_at_four_gibibytes() -> None:
    assert Layout(LOW_END + CHUNK_SIZE).segments == (
        Segment(0, LOW_END, 0),
        Segment(HIGH_START, CHUNK_SIZE, LOW_END),
    )


def test_nothing_may_cross_the_hole_below_four_gibibytes() -> None:
    layout = Layout(8 << 30)
    assert layout.offset_of(LOW_END - 16, 16) == LOW_END - 16
    assert layout.offset_of(HIGH_START, 16) == LOW_END
    for gpa, size in [(LOW_END - 16, 17), (LOW_END, 1), (HIGH_START - 1, 2), (0, 0), (0, -1), (-1, 2)]:
        with pytest.raises(ValueError, match="no RAM at"):
            layout.offset_of(gpa, size)


@given(sizes, st.data())
def test_gpa_and_offset_are_each_others_inverse(size: int, data: st.DataObject) -> None:
    layout = Layout(size)
    assert layout.pages * PAGE_SIZE == size == sum(segment.size for segment in layout.segments)
    offset = data.draw(st.integers(0, size - 1))
    gpa = layout.gpa_of(offset)
    assert gpa < LOW_END or gpa >= HIGH_START
    assert layout.offset_of(gpa, 1) == offset


@given(sizes, st.integers(0, 1 << 12))
def test_there_is_nothing_past_the_end(size: int, past: int) -> None:
    layout = Layout(size)
    with pytest.raises(ValueError, match="outside RAM"):
        layout.gpa_of(size + past)
    with pytest.raises(ValueError, match="no RAM at"):
        layout.offset_of(layout.gpa_of(size - 1), past + 2)
