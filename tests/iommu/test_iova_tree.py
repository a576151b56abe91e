from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.iommu import iova_tree
from common.iommu.iova_tree import BarTarget, IovaTree, Mapping, RamTarget
from common.memory.layout import PAGE_SIZE


def mapping(first: int, pages: int = 1, ram: int | None = 0, **more: bool) -> Mapping:
    target = BarTarget("peer", 2, 0) if ram is None else RamTarget(ram * PAGE_SIZE)
    return Mapping(first * PAGE_SIZE, pages * PAGE_SIZE, 0, target, **more)


def fails(number: int):
    return pytest.raises(OSError, check=lambda error: error.errno == number)


operations = st.lists(
    st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 8), st.integers(-1, 500)), max_size=80
)


@settings(deadline=None)
@given(operations)
def test_like_a_dict_of_pages(todo):
    """Insert and remove against a dict of single pages: same refusals, same contents, same order, same arrays."""
    tree, model = IovaTree(), {}
    for insert, first, pages, ram in todo:
        span = range(first, first + pages)
        if insert:
            new = mapping(first, pages, None if ram < 0 else ram, writable=ram % 2 == 0)
            if any(page in model for page in span):
                with fails(errno.EEXIST):
                    tree.insert(new)
            else:
                tree.insert(new)
                model.update(dict.fromkeys(span, new))
        else:
            inside = {model[page] for page in span if page in model}
            if any(page not in span for item in inside for page in model if model[page] is item):
                with fails(errno.EINVAL):
                    tree.remove(first * PAGE_SIZE, pages * PAGE_SIZE)
            else:
                gone = tree.remove(first * PAGE_SIZE, pages * PAGE_SIZE)
                assert set(gone) == inside
                assert gone == sorted(gone, key=lambda item: item.iova)
                model = {page: item for page, item in model.items() if page not in span}
    expected = sorted(set(model.values()), key=lambda item: item.iova)
    assert list(tree) == expected and len(tree) == len(expected)
    for page in range(70):
        assert tree.find(page * PAGE_SIZE + 5) is model.get(page)
    arrays = tree.arrays()
    assert arrays.starts.tolist() == [item.iova for item in expected]
    assert arrays.sizes.tolist() == [item.size for item in expected]
    assert arrays.pages.tolist() == [item.ram_page for item in expected]
    assert arrays.writable.tolist() == [item.writable for item in expected]
    assert tree.arrays() is arrays


def test_slots_are_used_again_and_grow():
    tree = IovaTree()
    for turn in range(3):
        for page in range(3000):
            tree.insert(mapping(page * 2, ram=page + turn))
        assert tree.arrays().pages.tolist() == list(range(turn, 3000 + turn))
        tree.remove(0, 6000 * PAGE_SIZE)
    assert len(tree.arrays()) == 0 and len(tree._starts) == 4096


def test_arrays_are_a_snapshot():
    tree = IovaTree()
    tree.insert(mapping(1))
    before = tree.arrays()
    tree.insert(mapping(2))
    assert len(before) == 1 and len(tree.arrays()) == 2
    with pytest.raises(ValueError):
        before.starts[0] = 1


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (0, 0),
        (0, -4096),
        (-4096, 4096),
        (1, 4096),
        (0, 4095),
        (1 << 39, 4096),
        ((1 << 39) - 4096, 8192),
        (1 << 63, 4096),
    ],
)
def test_refuses_what_is_no_range(iova, size):
    tree = IovaTree((1 << 39) - 1)
    with fails(errno.EINVAL):
        tree.insert(Mapping(iova, size, 0, RamTarget(0)))
    with fails(errno.EINVAL):
        tree.remove(iova, size)


def test_takes_the_last_page_and_refuses_bit_63():
    tree = IovaTree()
    tree.insert(Mapping((1 << 63) - PAGE_SIZE, PAGE_SIZE, 0, RamTarget(0)))
    assert tree.find((1 << 63) - 1) is not None
    with fails(errno.EINVAL):
        tree.insert(Mapping(1 << 63, PAGE_SIZE, 0, RamTarget(0)))


def test_refuses_bad_targets_and_too_many(monkeypatch):
    tree = IovaTree()
    with fails(errno.EINVAL):
        tree.insert(Mapping(0, PAGE_SIZE, 0, RamTarget(5)))
    with fails(errno.EINVAL):
        tree.insert(Mapping(0, PAGE_SIZE, 0, RamTarget(0), readable=False, writable=False))
    monkeypatch.setattr(iova_tree, "MAX_MAPPINGS", 1)
    tree.insert(mapping(0))
    with fails(errno.ENOSPC):
        tree.insert(mapping(1))


def test_foreach_ascends_and_stops():
    tree = IovaTree()
    for page in (5, 1, 3):
        tree.insert(mapping(page))
    seen = []
    tree.foreach(lambda item: seen.append(item.iova // PAGE_SIZE) or len(seen) == 2)
    assert seen == [1, 3]


def test_translate_splits_and_checks():
    tree = IovaTree()
    tree.insert(mapping(1, 2, 10))
    tree.insert(mapping(3, 1, 40, readable=False))
    tree.insert(mapping(4, 1, 50, writable=False))
    pieces = tree.translate(2 * PAGE_SIZE + 100, PAGE_SIZE, write=True)
    assert [(piece.mapping.ram_page, piece.offset, piece.size) for piece in pieces] == [
        (10, PAGE_SIZE + 100, PAGE_SIZE - 100),
        (40, 0, 100),
    ]
    assert tree.translate(5 * PAGE_SIZE, 0, write=True) == []
    for iova, size, write in ((0, 8, True), (3 * PAGE_SIZE, 8, False), (4 * PAGE_SIZE, 8, True)):
        with fails(errno.EFAULT):
            tree.translate(iova, size, write=write)
    with fails(errno.EFAULT):
        tree.translate(4 * PAGE_SIZE, PAGE_SIZE + 1, write=False)


def test_arrays_know_writable_ram():
    tree = IovaTree()
    tree.insert(mapping(0))
    tree.insert(mapping(1, ram=None))
    tree.insert(mapping(2, writable=False))
    assert tree.arrays().ram_writable.tolist() == [True, False, False]
    assert np.array_equal(tree.arrays().ends, tree.arrays().starts + PAGE_SIZE)


def test_every_refusal_says_what_was_wrong(monkeypatch):
    tree = IovaTree()
    tree.insert(mapping(4, 2, writable=False))
    tree.insert(mapping(8, 1, readable=False))
    monkeypatch.setattr(iova_tree, "MAX_MAPPINGS", 2)
    refused = [
        (lambda: tree.insert(Mapping(0, PAGE_SIZE, 0, RamTarget(5))), "mapping at IOVA 0x0 leads to offset 0x5"),
        (lambda: tree.insert(mapping(0, readable=False, writable=False)), "IOVA 0x0 can neither be read nor written"),
        (lambda: tree.insert(mapping(5)), "IOVA 0x5000 size 0x1000 overlaps the mapping at 0x4000 size 0x2000"),
        (lambda: tree.insert(mapping(0)), "2 mappings exist already"),
        (lambda: tree.contained(0, 5 * PAGE_SIZE), "size 0x5000 would split the mapping at 0x4000 size 0x2000"),
        (lambda: tree.translate(0, 8, write=False), "IOVA 0x0 is not mapped"),
        (lambda: tree.translate(4 * PAGE_SIZE, 8, write=True), "IOVA 0x4000 must not be written"),
        (lambda: tree.translate(8 * PAGE_SIZE, 8, write=False), "IOVA 0x8000 must not be read"),
        (lambda: tree.remove(0, 5), "IOVA 0x0 size 0x5: must be whole pages of 4096 bytes up to 0x7fffffffffffffff"),
    ]
    for call, said in refused:
        with pytest.raises(OSError, match=f"{said}$"):
            call()
