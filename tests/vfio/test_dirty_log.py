"""The log against a set of page numbers."""

import errno
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.vfio import dirty_log
from common.vfio.dirty_log import DirtyLog, LogLimits
from common.vfio.feature import Range

PAGE = 4096
WINDOW = 64 << 20
FAR = 1 << 45


def pages_of(bitmap: bytes) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")).tolist())


def refused(call: object, *args: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.errno


class NaiveLog:
    """4 KiB pages in a set; the contract, word for word."""

    def __init__(self, page_size: int, ranges: list[Range]) -> None:
        self.page_size, self.ranges, self.pages = page_size, ranges, set[int]()

    def mark(self, iova: int, length: int) -> None:
        for item in self.ranges:
            low, high = max(iova, item.iova), min(iova + length, item.iova + item.length)
            if low < high:
                low, high = low // self.page_size * self.page_size, -(-high // self.page_size) * self.page_size
                inside = range(item.iova // PAGE, (item.iova + item.length) // PAGE)
                self.pages |= {page for page in range(low // PAGE, high // PAGE) if page in inside}

    def report(self, iova: int, length: int, page_size: int) -> set[int]:
        inside = {page for page in self.pages if iova <= page * PAGE < iova + length}
        self.pages -= inside
        return {(page * PAGE - iova) // page_size for page in inside}


# Around the begin, around a border between two windows, and far away.
places = st.sampled_from([0, WINDOW - 40 * PAGE, 3 * WINDOW, FAR])
offsets = st.integers(0, 80 * PAGE)
marks = st.tuples(st.just("mark"), places, offsets, st.integers(0, 60 * PAGE), st.just(0))
reports = st.tuples(
    st.just("report"), places, offsets, st.integers(1, 70 * PAGE), st.sampled_from([PAGE, 2 * PAGE, 16 * PAGE, 1 << 21])
)


@settings(deadline=None)
@given(st.sampled_from([PAGE, 4 * PAGE, 2 << 20]), st.lists(st.one_of(marks, reports), max_size=20))
def test_any_marks_and_reports(page_size: int, actions: list[tuple[str, int, int, int, int]]) -> None:
    size = max(page_size, 64 * PAGE)
    ranges = [Range(0, size), Range(WINDOW - size, 2 * size), Range(3 * WINDOW, 3 * size), Range(FAR, size)]
    log, naive = DirtyLog(LogLimits(page_sizes=(PAGE, 4 * PAGE, 2 << 20))), NaiveLog(page_size, ranges)
    assert log.start(page_size, ranges) == page_size
    for kind, place, offset, length, asked in actions:
        if kind == "mark":
            log.mark(place + offset, length)
            naive.mark(place + offset, length)
        else:
            iova, whole = (place + offset) // PAGE * PAGE, -(-length // PAGE) * PAGE
            bitmap = log.report(iova, whole, asked)
            assert len(bitmap) == math.ceil(math.ceil(whole / asked) / 64) * 8
            assert pages_of(bitmap) == naive.report(iova, whole, asked)
    everything = [log.report(item.iova, item.length, PAGE) for item in ranges]
    assert [pages_of(bitmap) for bitmap in everything] == [naive.report(r.iova, r.length, PAGE) for r in ranges]


def test_reading_clears() -> None:
    log = DirtyLog()
    log.start(PAGE, [Range(0, 1 << 30)])
    log.mark(5 * PAGE + 7, 1)
    assert pages_of(log.report(0, 1 << 30, PAGE)) == {5}
    assert pages_of(log.report(0, 1 << 30, PAGE)) == set()


def test_a_big_page_in_part_is_not_forgotten() -> None:
    log = DirtyLog(LogLimits(page_sizes=(2 << 20,)))
    assert log.start(PAGE, [Range(0, 4 << 20)]) == 2 << 20
    log.mark(PAGE, 1)
    assert pages_of(log.report(0, PAGE, PAGE)) == {0}
    assert pages_of(log.report(0, 4 << 20, PAGE)) == set(range(1, 512))


def test_a_big_page_is_marked_no_further_than_its_range() -> None:
    log = DirtyLog(LogLimits(page_sizes=(2 << 20,)))
    log.start(PAGE, [Range(3 * PAGE, 2 * PAGE)])
    log.mark(4 * PAGE, 1)
    assert pages_of(log.report(0, 4 << 20, PAGE)) == {3, 4}


def test_a_large_report_leaves_what_is_outside() -> None:
    log = DirtyLog()
    log.start(PAGE, [Range(0, 1 << 48)])
    log.mark(0, 1)
    log.mark(FAR, 1)
    assert not any(log.report(1 << 30, FAR - (1 << 30) - 100 * PAGE, 2 << 20))
    assert pages_of(log.report(0, PAGE, PAGE)) == pages_of(log.report(FAR, PAGE, PAGE)) == {0}


def test_a_report_of_a_large_sparse_range() -> None:
    log = DirtyLog()
    log.start(PAGE, [Range(0, 1 << 48)])
    log.mark((1 << 38) - PAGE, PAGE)
    bitmap = log.report(0, 1 << 38, PAGE)
    assert len(bitmap) == 1 << 23
    assert bitmap[-1] == 0x80 and bytes(bitmap).count(0) == len(bitmap) - 1
    assert refused(log.report, 0, (1 << 43) + PAGE, PAGE) == errno.E2BIG


def test_stop_loses_the_log() -> None:
    log = DirtyLog()
    log.start(PAGE, [Range(0, PAGE)])
    log.mark(0, 1)
    log.stop()
    log.stop()
    assert not log.active
    log.mark(0, 1)
    log.start(PAGE, [Range(0, PAGE)])
    assert pages_of(log.report(0, PAGE, PAGE)) == set()


def test_a_second_start_is_refused_and_changes_nothing() -> None:
    log = DirtyLog()
    log.start(PAGE, [Range(0, PAGE)])
    log.mark(0, 1)
    assert refused(log.start, PAGE, [Range(PAGE, PAGE)]) == errno.EINVAL
    assert pages_of(log.report(0, 2 * PAGE, PAGE)) == {0}


def test_a_refused_start_leaves_the_log_stopped() -> None:
    log = DirtyLog(LogLimits(max_ranges=2, max_bits=21))
    assert refused(log.start, PAGE, [Range(n << 20, PAGE) for n in range(3)]) == errno.E2BIG
    assert refused(log.start, PAGE, [Range(0, 1 << 20), Range(8 << 20, (1 << 20) + PAGE)]) == errno.EOPNOTSUPP
    assert refused(log.start, PAGE, [Range(0, 100)]) == errno.EINVAL
    assert not log.active
    assert log.start(PAGE, [Range(0, 1 << 20), Range(8 << 20, 1 << 20)]) == PAGE


def test_a_stopped_log_reports_nothing() -> None:
    assert refused(DirtyLog().report, 0, PAGE, PAGE) == errno.EINVAL


def test_a_report_of_parts_of_pages_is_refused() -> None:
    log = DirtyLog()
    log.start(PAGE, [Range(0, 1 << 20)])
    assert refused(log.report, 100, PAGE, PAGE) == errno.EINVAL
    assert refused(log.report, 0, PAGE + 1, PAGE) == errno.EINVAL
    assert refused(log.report, 0, PAGE, 2048) == errno.EINVAL


@pytest.mark.parametrize(("asked", "used"), [(4096, 8192), (8192, 8192), (1 << 16, 8192), (1 << 21, 1 << 21)])
def test_the_page_size_that_is_used(asked: int, used: int) -> None:
    log = DirtyLog(LogLimits(page_sizes=(1 << 21, 8192)))
    assert log.start(asked, [Range(0, 1 << 30)]) == used


@pytest.mark.parametrize(
    "options", [{"max_ranges": 0}, {"page_sizes": ()}, {"page_sizes": (2048,)}, {"page_sizes": (12288,)}]
)
def test_limits_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        LogLimits(**options)  # type: ignore[arg-type]


def test_discarding_forgets_a_part_and_nothing_beside_it() -> None:
    log = DirtyLog()
    log.discard(0, 1 << 40)
    log.start(PAGE, [Range(0, 1 << 40)])
    edge = 1 << 26  # of what the log keeps together
    for iova in (0, edge - PAGE, edge, edge + PAGE, 1 << 39):
        log.mark(iova, 1)
    log.discard(edge - PAGE, 2 * PAGE)
    assert [iova for iova in (0, edge - PAGE, edge, edge + PAGE, 1 << 39) if log.report(iova, PAGE, PAGE)[0]] == [
        0, edge + PAGE, 1 << 39,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [PAGE, 2 * PAGE])
@pytest.mark.parametrize("before", [0, 1, 8, 9, 13])
def test_a_report_of_whole_windows_wherever_it_begins(before: int, size: int) -> None:
    log = DirtyLog()
    log.start(PAGE, [Range(0, 1 << 40)])
    marked = [WINDOW - 8 * PAGE, WINDOW, WINDOW + 5 * PAGE, 2 * WINDOW - PAGE, 2 * WINDOW, 3 * WINDOW + 7 * PAGE]
    for iova in marked:
        log.mark(iova, 1)
    first = WINDOW - before * PAGE
    found = pages_of(log.report(first, 3 * WINDOW, size))
    assert found == {(iova - first) // size for iova in marked if iova >= first}
    assert bytes(log.report(0, 1 << 30, PAGE)).count(0) == (1 << 15) - (before < 8)


def test_a_log_that_was_never_started_stops_and_takes_marks() -> None:
    log = DirtyLog()
    log.mark(0, 1)
    log.stop()
    assert not log.active


def test_a_write_across_several_ranges_is_in_each() -> None:
    log = DirtyLog()
    log.start(PAGE, [Range(0, PAGE), Range(PAGE, PAGE), Range(2 * PAGE, PAGE), Range(4 * PAGE, PAGE)])
    log.mark(0, 5 * PAGE)
    assert pages_of(log.report(0, 8 * PAGE, PAGE)) == {0, 1, 2, 4}


def test_a_write_behind_a_range_is_not_in_it_however_large_a_page_is() -> None:
    log = DirtyLog(LogLimits(page_sizes=(2 << 20,)))
    log.start(PAGE, [Range(3 * PAGE, 2 * PAGE)])
    log.mark(5 * PAGE, 1)
    assert pages_of(log.report(0, 4 << 20, PAGE)) == set()


def test_the_largest_bitmap_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_log, "MAX_BITMAP_BYTES", 16)
    log = DirtyLog()
    log.start(PAGE, [Range(0, 1 << 20)])
    assert len(log.report(0, 128 * PAGE, PAGE)) == 16
    assert refused(log.report, 0, 129 * PAGE, PAGE) == errno.E2BIG


def test_a_log_of_one_range() -> None:
    log = DirtyLog(LogLimits(max_ranges=1))
    assert log.start(PAGE, [Range(0, PAGE)]) == PAGE


def test_every_refusal_of_a_log_says_why() -> None:
    log = DirtyLog(LogLimits(max_ranges=1, max_bits=13))
    started = DirtyLog()
    started.start(PAGE, [Range(0, PAGE)])
    for call, said in [
        (lambda: log.start(PAGE, [Range(0, PAGE), Range(PAGE, PAGE)]), "2 ranges to log, the device has 1"),
        (lambda: log.start(PAGE, [Range(0, 3 * PAGE)]), r"0x3000 bytes to log, the device can do 2\^13"),
        (lambda: log.report(0, PAGE, PAGE), "DMA logging is not started"),
        (lambda: started.start(PAGE, [Range(0, PAGE)]), "DMA logging is started already"),
        (lambda: started.report(1, PAGE, PAGE), r"0x1 \+ 0x1000 is no run of 4096-byte pages"),
        (lambda: started.report(0, 1 << 60, PAGE), "a bitmap of 35184372088832 bytes, at most 268435456 are possible"),
    ]:
        with pytest.raises(OSError, match=rf"\] {said}$"):
            call()
    for options, said in [
        ({"max_ranges": 0}, "a log has at least one range and one page size"),
        ({"page_sizes": (2048,)}, "page size 2048 is no power of two from 4096"),
    ]:
        with pytest.raises(ValueError, match=f"^{said}$"):
            LogLimits(**options)  # type: ignore[arg-type]
