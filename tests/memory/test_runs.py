from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.memory import runs
from common.memory.layout import CHUNK_PAGES
from common.memory.runs import Runs

page_sets = st.one_of(
    st.sets(st.integers(0, 40)),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 1500)), max_size=5).map(
        lambda pieces: {page for first, count in pieces for page in range(first, first + count)}
    ),
)


def runs_of(pages: set[int]) -> Runs:
    return runs.from_pages(np.array(sorted(pages), np.int64))


def pages_of(found: Runs) -> set[int]:
    """The pages of runs, which are checked to be what they should."""
    first, count = found
    assert first.dtype == count.dtype == np.int64
    assert (count > 0).all()
    assert (first[1:] >= (first + count)[:-1]).all()
    return {
        page
        for start, length in zip(first.tolist(), count.tolist(), strict=True)
        for page in range(start, start + length)
    }


def are_maximal(found: Runs) -> bool:
    return bool((found[0][1:] > (found[0] + found[1])[:-1]).all())


@given(page_sets)
def test_pages_and_back(pages: set[int]) -> None:
    found = runs_of(pages)
    assert pages_of(found) == pages
    assert are_maximal(found)
    assert runs.expand(found).tolist() == sorted(pages)
    assert runs.total(found) == len(pages)


@given(page_sets, page_sets)
def test_set_operations(a: set[int], b: set[int]) -> None:
    assert pages_of(runs.intersect(runs_of(a), runs_of(b))) == a & b
    rest = runs.subtract(runs_of(a), runs_of(b))
    assert pages_of(rest) == a - b and (rest[1] > 0).all()
    joined = runs.union(runs_of(a), runs_of(b))
    assert pages_of(joined) == a | b
    assert are_maximal(joined)


@given(page_sets)
def test_cut_runs_stay_inside_a_chunk(pages: set[int]) -> None:
    first, count = runs.cut_at_chunks(runs_of(pages))
    assert pages_of((first, count)) == pages
    assert (first // CHUNK_PAGES == (first + count - 1) // CHUNK_PAGES).all() and (count > 0).all()


def test_a_tebibyte_is_one_run() -> None:
    everything = runs.one(0, 1 << 28)
    rest = runs.subtract(everything, runs.one(5, 2))
    assert [part.tolist() for part in rest] == [[0, 7], [5, (1 << 28) - 7]]
    assert runs.total(runs.cut_at_chunks(rest)) == (1 << 28) - 2
    assert runs.one(3, 0)[0].size == 0


def test_a_run_that_ends_with_its_chunk_is_one_piece() -> None:
    first, count = runs.cut_at_chunks(runs.one(0, CHUNK_PAGES))
    assert (first.tolist(), count.tolist()) == ([0], [CHUNK_PAGES])
