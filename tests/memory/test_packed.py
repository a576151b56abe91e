from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.memory import bitmap, runs
from common.memory.bitmap import Words
from common.memory.packed import PackedBitmap, union


def with_pages(pages: int, numbers: set[int]) -> Words:
    words = bitmap.empty(pages)
    bitmap.set_pages(words, np.array(sorted(numbers), np.int64))
    return words


LARGE = 64 * 64 * 64
# Nearly empty ones, and such as have most of their words.
small = st.integers(1, 400).flatmap(lambda pages: st.tuples(st.just(pages), st.sets(st.integers(0, pages - 1))))
sparse = st.integers(1000, 4000).flatmap(
    lambda pages: st.tuples(st.just(pages), st.sets(st.integers(0, pages - 1), max_size=5))
)


@given(small | sparse)
def test_a_packed_bitmap_comes_back(case: tuple[int, set[int]]) -> None:
    pages, numbers = case
    words = with_pages(pages, numbers)
    packed = PackedBitmap.of(words, pages)
    data = packed.to_bytes()
    assert len(data) <= 16 + words.nbytes
    for it in (packed, PackedBitmap.from_bytes(data, pages)):
        assert runs.expand(it.runs()).tolist() == sorted(numbers)
        assert it.count() == len(numbers)
        assert [page for page in range(pages) if it.has(page)] == sorted(numbers)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError):
            PackedBitmap.from_bytes(wrong, pages)
    with pytest.raises(ValueError, match="words"):
        PackedBitmap.from_bytes(data, pages + 64)


def test_few_bits_of_a_large_bitmap_are_few_bytes() -> None:
    pages = 1 << 28
    words = with_pages(pages, {0, 63, 5 << 21, pages - 1})
    data = PackedBitmap.of(words, pages).to_bytes()
    assert len(data) == 16 + 3 * 12
    first, count = PackedBitmap.from_bytes(data, pages).runs()
    assert first.tolist() == [0, 63, 5 << 21, pages - 1] and count.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("given_words", "positions"), [([1, 1], [3, 3]), ([1, 1], [3, 2]), ([1], [4]), ([1 << 7], [3]), ([1] * 5, [0] * 5)]
)
def test_packed_words_of_others_are_checked(given_words: list[int], positions: list[int]) -> None:
    pages = 3 * 64 + 7
    data = struct.pack("<QQ", 4, len(given_words))
    data += np.array(given_words, "<u8").tobytes() + np.array(positions, "<u4").tobytes()
    with pytest.raises(ValueError):
        PackedBitmap.from_bytes(data, pages)


def test_a_bit_past_the_last_page_is_refused_in_a_whole_bitmap() -> None:
    with pytest.raises(ValueError, match="past the last"):
        PackedBitmap.from_bytes(struct.pack("<QQQ", 1, 1, 1 << 7), 7)
    assert PackedBitmap.from_bytes(struct.pack("<QQQ", 1, 1, 1 << 6), 7).has(6)


# Of 1000 pages nearly any bit is many, of the large bitmap up to 64 words are few.
@given(
    st.sampled_from([1000, LARGE]).flatmap(
        lambda pages: st.tuples(st.just(pages), st.lists(st.sets(st.integers(0, pages - 1)), max_size=3))
    )
)
def test_the_union_of_bitmaps(case: tuple[int, list[set[int]]]) -> None:
    pages, sets = case
    found = union([PackedBitmap.of(with_pages(pages, numbers), pages) for numbers in sets], pages)
    expected = sorted(set().union(*sets))
    assert runs.expand(found.runs()).tolist() == expected and found.count() == len(expected)
    first, count = found.runs()
    assert (first[1:] > (first + count)[:-1]).all()  # none that touches the next
    assert PackedBitmap.from_bytes(found.to_bytes(), pages).count() == len(expected)


def test_the_union_of_few_and_many() -> None:
    few, many = {5, LARGE - 1}, set(range(0, LARGE, 100))
    packed = [PackedBitmap.of(with_pages(LARGE, numbers), LARGE) for numbers in (few, many)]
    assert runs.expand(union(packed, LARGE).runs()).tolist() == sorted(few | many)


def test_bitmaps_of_different_sizes_have_no_union() -> None:
    with pytest.raises(ValueError, match=r"^a bitmap of 64 pages among those of 65$"):
        union([PackedBitmap.of(bitmap.empty(64), 64)], 65)


def test_a_packed_bitmap_of_the_wrong_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"^a packed bitmap of 3 bytes$"):
        PackedBitmap.from_bytes(bytes(3), 64)
    with pytest.raises(ValueError, match=r"^5 words of a packed bitmap in 16 bytes$"):
        PackedBitmap.from_bytes(struct.pack("<QQ", 64, 5), 64 * 64)


def test_packed_words_in_any_other_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the words of a packed bitmap are not in order$"):
        PackedBitmap.from_bytes(struct.pack("<QQ3Q3I", 64, 3, 1, 1, 1, 0, 2, 1), 64 * 64)
