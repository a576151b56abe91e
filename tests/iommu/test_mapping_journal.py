from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from common.iommu.iova_tree import Mapping, RamTarget
from common.iommu.journal import MappingJournal
from common.memory.layout import PAGE_SIZE


@settings(deadline=None)
@given(st.lists(st.one_of(st.just("take"), st.tuples(st.integers(0, 5), st.integers(1, 2))), max_size=60))
def test_a_receiver_has_the_same_mappings(todo):
    """Mapping, unmapping and taking in any order: removals first, then additions, never a conflict on the way."""
    here = {0: Mapping(0, PAGE_SIZE, 0, RamTarget(0))}
    journal, there = MappingJournal(here.values()), {}

    def receive():
        delta = journal.take()
        for gone in delta.removed:
            assert there.pop(gone.iova) == gone
        for new in delta.added:
            assert not any(new.iova < old.end and old.iova < new.end for old in there.values())
            there[new.iova] = new

    for number, step in enumerate(todo):
        if step == "take":
            receive()
            continue
        first, pages = step
        for old in [
            old for old in here.values() if old.iova < (first + pages) * PAGE_SIZE and first * PAGE_SIZE < old.end
        ]:
            journal.removed(here.pop(old.iova))
        if number % 3:
            new = Mapping(first * PAGE_SIZE, pages * PAGE_SIZE, number * PAGE_SIZE, RamTarget(number * PAGE_SIZE))
            here[new.iova] = new
            journal.added(new)
    receive()
    assert there == here
    assert journal.take().added == journal.take().removed == ()


def test_what_came_and_went_leaves_no_trace():
    journal, new = MappingJournal([]), Mapping(0, PAGE_SIZE, 0, RamTarget(0))
    for _ in range(1000):
        journal.added(new)
        journal.removed(new)
    assert journal.take().removed == ()
