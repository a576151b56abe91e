from __future__ import annotations

import itertools

from common.iommu.history import Interval, MappingHistory
from common.iommu.iova_tree import BarTarget, Mapping, RamTarget
from common.memory.layout import PAGE_SIZE


def mapping(iova: int, page: int, pages: int = 1, **more: bool) -> Mapping:
    return Mapping(iova * PAGE_SIZE, pages * PAGE_SIZE, 0, RamTarget(page * PAGE_SIZE), **more)


def test_who_could_have_written_a_page():
    ticks = itertools.count(1)
    old = mapping(100, 0, 10)
    history = MappingHistory([old], clock=lambda: float(next(ticks)))
    history.opened(mapping(200, 5))
    history.closed(old)
    history.opened(mapping(300, 5, readable=False))
    history.closed(mapping(200, 5))
    assert history.of_page(5) == [
        Interval(105 * PAGE_SIZE, None, 2.0),
        Interval(200 * PAGE_SIZE, 1.0, 4.0),
        Interval(300 * PAGE_SIZE, 3.0, None),
    ]
    assert history.of_page(9) == [Interval(109 * PAGE_SIZE, None, 2.0)]
    assert history.of_page(10) == []


def test_a_mapping_that_is_still_there_leads_to_each_of_its_pages():
    history = MappingHistory([mapping(100, 20, 4)], clock=lambda: 7.0)
    history.opened(mapping(300, 21, 2))
    assert history.of_page(22) == [
        Interval(102 * PAGE_SIZE, None, None),
        Interval(301 * PAGE_SIZE, 7.0, None),
    ]
    assert history.of_page(24) == []


def test_readers_and_bars_write_no_ram():
    history = MappingHistory([mapping(1, 0, writable=False)], clock=lambda: 0.0)
    history.opened(Mapping(0, PAGE_SIZE, 0, BarTarget("peer", 2, 0)))
    history.closed(mapping(1, 0))
    assert history.of_page(0) == []


def test_the_oldest_make_room():
    ticks = itertools.count()
    history = MappingHistory([], clock=lambda: float(next(ticks)), capacity=1500)
    for n in range(4000):
        history.opened(mapping(n, 7))
        history.closed(mapping(n, 7))
    found = history.of_page(7)
    assert history.forgotten == 2500
    assert [interval.iova // PAGE_SIZE for interval in found] == list(range(2500, 4000))
    assert len(history._rows) == 1500
