from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.iommu import translate
from common.iommu.iova_tree import BarTarget, IovaTree, Mapping, RamTarget
from common.iommu.translate import dirty_ram_pages, mark_runs
from common.memory.bitmap import DirtyBitmap, empty, pages_of, set_pages
from common.memory.layout import PAGE_SIZE


def tree_of(layout):
    """Build a tree of (gap, pages, ram page or None) one after the other, and the model: a dict page -> page."""
    tree, model, at = IovaTree(), {}, 0
    for gap, pages, ram in layout:
        at += gap
        target = BarTarget("peer", 2, 0) if ram is None else RamTarget(ram * PAGE_SIZE)
        tree.insert(Mapping(at * PAGE_SIZE, pages * PAGE_SIZE, 0, target))
        for n in range(pages):
            model[at + n] = None if ram is None else ram + n
        at += pages
    return tree, model


layouts = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 9), st.one_of(st.none(), st.integers(0, 900))), max_size=30
)


@settings(deadline=None)
@given(layouts, st.sets(st.integers(0, 400)), st.integers(0, 100), st.sampled_from([1, 2, 16]), st.integers(1, 1 << 14))
def test_like_a_dict_of_pages(layout, bits, base, factor, slice_pages):
    tree, model = tree_of(layout)
    words = empty(448)
    set_pages(words, np.array(sorted(bits), np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translate, "_SLICE_PAGES", slice_pages)
        found = dirty_ram_pages(words, base * PAGE_SIZE, factor * PAGE_SIZE, tree.arrays())
    iova_pages = [base + bit * factor + n for bit in sorted(bits) for n in range(factor)]
    hits = [model[page] for page in iova_pages if page in model]
    assert found.pages.tolist() == [page for page in hits if page is not None]
    assert found.bar_hits == hits.count(None)
    assert found.unmapped == len(iova_pages) - len(hits)


@pytest.mark.parametrize(("base", "page_size"), [(1, 4096), (0, 4095), (0, 0), (0, -4096), (4096, 2048)])
def test_refuses_what_is_not_made_of_pages(base, page_size):
    with pytest.raises(ValueError, match="is not made of 4 KiB pages"):
        dirty_ram_pages(empty(64), base, page_size, IovaTree().arrays())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 5000)), max_size=20))
def test_mark_runs_like_a_set(wanted):
    dirty = DirtyBitmap(14000)
    first = np.array([run[0] for run in wanted], np.int64)
    count = np.array([run[1] for run in wanted], np.int64)
    marked = mark_runs(dirty, first, count)
    expected = {page for start, length in wanted for page in range(start, start + length)}
    assert set(pages_of(dirty.take()).tolist()) == expected and marked == len(expected)


@pytest.mark.parametrize("factor", [1, 4])
def test_bits_in_every_slice_of_a_large_bitmap(monkeypatch, factor):
    monkeypatch.setattr(translate, "_SLICE_PAGES", factor)
    tree, _ = tree_of([(0, 1000, 5000)])
    words = empty(192)
    set_pages(words, np.array([1, 65, 130]))
    expected = [5000 + page * factor + n for page in (1, 65, 130) for n in range(factor)]
    found = dirty_ram_pages(words, 0, factor * PAGE_SIZE, tree.arrays())
    assert found.pages.tolist() == expected


def test_nothing_dirty_is_an_array_of_page_numbers():
    found = dirty_ram_pages(empty(64), 0, PAGE_SIZE, IovaTree().arrays())
    assert found.pages.dtype == np.int64
