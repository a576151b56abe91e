from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.guest.programs.pages import PART, PARTS, WORDS, Cursor, PageContent


@given(st.integers(1, 300), st.integers(0, 50), st.booleans(), st.lists(st.integers(1, 80), max_size=30))
def test_a_cursor_visits_every_page_once_a_lap_and_knows_how_often(
    count: int, first: int, scattered: bool, limits: list[int]
) -> None:
    cursor = Cursor(first, count, scattered=scattered)
    visits = np.zeros(first + count, np.uint64)
    written = 0
    for limit in limits:
        pages, sequence = cursor.batch(written, limit)
        assert 1 <= pages.size <= limit
        visits[pages] += np.uint64(1)
        assert (visits[pages] == sequence).all()
        written += pages.size
    everything = np.arange(first, first + count)
    assert (cursor.sequences(everything, written) == visits[first:]).all()
    assert not visits[:first].any()


def test_scattered_order_is_not_sequential() -> None:
    pages, _ = Cursor(0, 1000, scattered=True).batch(0, 100)
    assert (np.abs(np.diff(pages)) > 1).all()


def test_any_change_of_what_was_written_last_is_found() -> None:
    content = PageContent(np.zeros((8, WORDS), np.uint64))
    pages = np.array([6, 1, 3])
    for sequence in range(1, PARTS + 2):
        content.write(pages, sequence)
        assert content.wrong(pages, sequence).size == 0
        assert content.wrong(pages, sequence + 1).size == 3
    region = content._region
    written = np.flatnonzero(region[1])
    last_part = slice(4 + sequence % PARTS * PART, 4 + sequence % PARTS * PART + PART)
    assert written.size > PARTS * PART // 2
    for word in (0, 1, WORDS - 1, last_part.start, last_part.stop - 1):
        region[1, word] ^= np.uint64(1)
        assert content.wrong(pages, sequence).tolist() == [1]
        region[1, word] ^= np.uint64(1)


def test_an_older_version_of_a_page_and_an_empty_one_are_told_apart() -> None:
    content = PageContent(np.zeros((2, WORDS), np.uint64))
    content.write(np.array([1]), 4)
    assert content.describe(0) == "is empty"
    assert content.describe(1) == "is at sequence 4"
    content._region[0] = content._region[1]
    assert content.describe(0) == "holds something else"
