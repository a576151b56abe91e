from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.memory import bitmap
from common.memory.bitmap import DirtyBitmap, Words

# Bitmaps of up to three blocks of those that are looked at together, with something at the edges of blocks and groups.
BLOCK_PAGES, GROUP_PAGES = bitmap._BLOCK * 64, bitmap._GROUP * 64
edges = st.sampled_from(
    [
        *(0, 63, 64, BLOCK_PAGES - 1, BLOCK_PAGES, BLOCK_PAGES + 1, 2 * BLOCK_PAGES - 1, 2 * BLOCK_PAGES),
        *(GROUP_PAGES - 1, GROUP_PAGES, 5 * GROUP_PAGES - 1, 5 * GROUP_PAGES, BLOCK_PAGES + GROUP_PAGES - 1),
    ]
)
run_lists = st.lists(st.tuples(edges | st.integers(0, 3 * BLOCK_PAGES - 1), st.integers(1, 300)), max_size=8)


def with_pages(pages: int, numbers: set[int]) -> Words:
    """The slow way: the bits of a Python integer."""
    value = sum(1 << number for number in numbers)
    return np.frombuffer(value.to_bytes(bitmap.words_for(pages) * 8, "little"), np.uint64).copy()


small = st.integers(1, 400).flatmap(lambda pages: st.tuples(st.just(pages), st.sets(st.integers(0, pages - 1))))


@given(small)
def test_pages_runs_and_count_of_small_bitmaps(case: tuple[int, set[int]]) -> None:
    pages, numbers = case
    words = with_pages(pages, numbers)
    assert bitmap.pages_of(words).tolist() == sorted(numbers)
    assert bitmap.count(words) == len(numbers)
    first, count = bitmap.runs_of(words)
    assert [n for f, c in zip(first.tolist(), count.tolist(), strict=True) for n in range(f, f + c)] == sorted(numbers)
    assert (first[1:] > (first + count)[:-1]).all()


@given(run_lists)
def test_runs_across_blocks(wanted: list[tuple[int, int]]) -> None:
    pages = 3 * BLOCK_PAGES
    words = bitmap.empty(pages)
    flags = np.zeros(pages, np.bool_)
    for start, size in wanted:
        end = min(start + size, pages)
        bitmap.set_range(words, start, end - start)
        flags[start:end] = True
    assert np.array_equal(bitmap.pages_of(words), np.flatnonzero(flags))
    first, count = bitmap.runs_of(words)
    changes = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    assert np.array_equal(first, changes[::2])
    assert np.array_equal(first + count, changes[1::2])


@given(run_lists)
def test_runs_of_the_complement(wanted: list[tuple[int, int]]) -> None:
    pages = 3 * BLOCK_PAGES
    words = bitmap.empty(pages)
    for start, size in wanted:
        bitmap.set_range(words, start, min(size, pages - start))
    first, count = bitmap.runs_of(words)
    other_first, other_count = bitmap.runs_of(~words)
    assert int(count.sum() + other_count.sum()) == pages
    ends = np.sort(np.concatenate((first + count, other_first + other_count)))
    starts = np.sort(np.concatenate((first, other_first)))
    assert np.array_equal(starts[1:], ends[:-1])


@given(small, st.data())
def test_setting_pages_and_ranges(case: tuple[int, set[int]], data: st.DataObject) -> None:
    pages, numbers = case
    more = data.draw(st.lists(st.integers(0, pages - 1)))
    first = data.draw(st.integers(0, pages))
    size = data.draw(st.integers(0, pages - first))
    words = with_pages(pages, numbers)
    bitmap.set_pages(words, np.array(more, np.int64))
    assert np.array_equal(words, with_pages(pages, numbers | set(more)))
    bitmap.set_range(words, first, size)
    assert np.array_equal(words, with_pages(pages, numbers | set(more) | set(range(first, first + size))))


def test_few_and_many_pages_are_set_alike() -> None:
    numbers = np.random.default_rng(7).integers(64, 100_000, 50_000)
    at_once = bitmap.empty(100_000)
    bitmap.set_pages(at_once, numbers)
    one_by_one = bitmap.empty(100_000)
    for part in np.array_split(numbers, 500):
        bitmap.set_pages(one_by_one, part)
    assert np.array_equal(at_once, one_by_one)
    assert np.array_equal(bitmap.pages_of(at_once), np.unique(numbers))


@pytest.mark.parametrize("number", [-1, 128])
def test_pages_outside_the_bitmap_are_refused(number: int) -> None:
    words = bitmap.empty(100)
    with pytest.raises(IndexError):
        bitmap.set_pages(words, np.array([5, number]))
    with pytest.raises(IndexError):
        bitmap.set_range(words, number, 1)
    with pytest.raises(IndexError):
        bitmap.set_range(words, 5, -1)
    assert not words.any()


def test_dirty_bitmap_is_the_union_of_what_was_marked() -> None:
    dirty = DirtyBitmap(200)
    dirty.mark_range(3, 2)
    dirty.mark_pages(np.array([199, 3, 3]))
    dirty.mark_pages(np.array([64, 199]))
    assert bitmap.pages_of(dirty.take()).tolist() == [3, 4, 64, 199]
    assert dirty.take().size == 4


def test_dirty_bitmap_refuses_what_it_cannot_place() -> None:
    dirty = DirtyBitmap(100)
    for first, pages in [(99, 2), (-1, 2), (0, -1), (100, 1)]:
        with pytest.raises(IndexError):
            dirty.mark_range(first, pages)
    for page in (-1, 100, 127):
        with pytest.raises(IndexError):
            dirty.mark_pages(np.array([page]))
    assert not dirty.take().any()


def test_no_bit_is_lost_between_writers_and_a_reader() -> None:
    pages = 1 << 14
    dirty = DirtyBitmap(pages)
    start = threading.Barrier(4)

    def mark(part: int) -> None:
        start.wait()
        numbers = np.arange(part, pages, 3)
        for chunk in np.array_split(numbers, 400):
            if part:
                dirty.mark_pages(chunk)
            else:
                for page in chunk.tolist():
                    dirty.mark_range(page, 1)

    threads = [threading.Thread(target=mark, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    start.wait()
    marked = np.zeros(pages, np.int64)
    while any(thread.is_alive() for thread in threads):
        marked[bitmap.pages_of(dirty.take())] += 1
    marked[bitmap.pages_of(dirty.take())] += 1
    assert (marked == 1).all()


def test_a_page_past_the_last_word_is_refused() -> None:
    words = bitmap.empty(64)
    with pytest.raises(IndexError, match=r"^pages 64 to 65 are not all in the bitmap of 64 pages$"):
        bitmap.set_range(words, 64, 1)
    with pytest.raises(IndexError, match=r"^a page is outside the bitmap of 64 pages$"):
        bitmap.set_pages(words, np.array([64]))


@pytest.mark.parametrize(("first", "pages"), [(-1, 1), (3, -1), (99, 2), (100, 1)])
def test_a_dirty_bitmap_refuses_ranges_that_are_not_in_it(first: int, pages: int) -> None:
    with pytest.raises(IndexError, match=f"^pages {first} to {first + pages} are not all among 100 pages$"):
        DirtyBitmap(100).mark_range(first, pages)
    with pytest.raises(IndexError, match=r"^a page is not among 100 pages$"):
        DirtyBitmap(100).mark_pages(np.array([100]))


def test_a_dirty_bitmap_takes_all_of_it_and_nothing() -> None:
    dirty = DirtyBitmap(100)
    dirty.mark_range(7, 0)
    assert bitmap.count(dirty.take()) == 0
    dirty.mark_range(0, 100)
    assert bitmap.pages_of(dirty.take()).tolist() == list(range(100))
