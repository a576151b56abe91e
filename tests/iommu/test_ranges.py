from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.iommu.iova_tree import BarTarget, IovaTree, Mapping, RamTarget
from common.iommu.ranges import Coverage, aperture_sizes, merge, plan_start, plan_windows
from common.memory.layout import PAGE_SIZE
from common.vfio.feature import Range, check_logging_start

GIB = 1 << 30
TIB = 1 << 40


def arrays_of(*mappings):
    """Arrays of (iova, size) mappings of RAM, or (iova, size, "bar") or (iova, size, "read")."""
    tree = IovaTree()
    for iova, size, *kind in mappings:
        target = BarTarget("peer", 2, 0) if kind == ["bar"] else RamTarget(0)
        tree.insert(Mapping(iova, size, 0, target, writable=kind != ["read"]))
    return tree.arrays()


def pages(ranges):
    return {page for item in ranges for page in range(item.iova // 4096, (item.iova + item.length) // 4096)}


spans = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 12)), min_size=1, max_size=40)


@settings(deadline=None)
@given(spans, st.integers(1, 12))
def test_merge_closes_the_smallest_gaps(wanted, limit):
    starts = np.array([first for first, _ in wanted]) * PAGE_SIZE
    ends = starts + np.array([count for _, count in wanted]) * PAGE_SIZE
    merged = merge(starts, ends, limit)
    needed = {page for first, count in wanted for page in range(first, first + count)}
    exact = sorted(page for page in needed if page - 1 not in needed)
    assert len(merged) == min(limit, len(exact))
    assert needed <= pages(merged)
    check_logging_start(PAGE_SIZE, merged)
    # The naive way: close one smallest gap after the other.
    gaps = sorted(after - max(page for page in needed if page < after) - 1 for after in exact[1:])
    assert len(pages(merged)) - len(needed) == sum(gaps[: len(exact) - len(merged)])


@pytest.mark.parametrize(
    ("width", "ram", "expected"),
    [
        (48, 4 * GIB, [1 << 48, 1 << 39, 4 * GIB]),
        (48, 300 * GIB, [1 << 48, 1 << 39, 1 << 38]),
        (39, 4 * GIB, [1 << 39, 1 << 38, 4 * GIB]),
        (39, 300 * GIB, [1 << 39, 1 << 38, 1 << 37]),
        (None, 4 * GIB, [1 << 39, 4 * GIB]),
        (None, 300 * GIB, [1 << 39, 1 << 38]),
        (64, 4 * GIB, [(1 << 63) - 4096, 1 << 39, 4 * GIB]),
    ],
)
def test_aperture_sizes_of_the_series(width, ram, expected):
    """QEMU series patch 15: A0, A1, A2."""
    assert aperture_sizes(None if width is None else (1 << width) - 1, ram) == expected


def plan(strategy, arrays, width=None, **more):
    max_iova = None if width is None else (1 << width) - 1
    return plan_start(strategy, arrays, max_iova=max_iova, ram_size=4 * GIB, **more)


def test_mapped_is_exact_up_to_the_limit():
    """QEMU series patch 9: 1, 256 and 257 ranges; and nothing to start with where nothing is mapped."""
    for count, expected in ((0, 0), (1, 1), (256, 256), (257, 256), (3000, 256)):
        arrays = arrays_of(*[(n * 3 * PAGE_SIZE, PAGE_SIZE) for n in range(count)])
        attempts = plan("mapped", arrays).attempts
        assert len(attempts[0].ranges) == expected
        if count <= 256:
            assert pages(attempts[0].ranges) == {3 * n for n in range(count)}
        assert len(attempts[-1].ranges) == min(count, 1)
        assert len({attempt.ranges for attempt in attempts}) == len(attempts)
        assert all(Coverage(attempt.ranges).mask(arrays.starts, arrays.sizes).all() for attempt in attempts)


def test_mapped_wants_writable_ram_only():
    arrays = arrays_of((0, PAGE_SIZE, "read"), (8192, PAGE_SIZE), (1 << 40, PAGE_SIZE, "bar"))
    assert plan("mapped", arrays).attempts[0].ranges == (Range(8192, PAGE_SIZE),)


def test_minmax_has_a_span_for_low_high_and_bars():
    """QEMU: vfio_dirty_tracking_update_range; OVMF puts BARs far above RAM, and one span over both is refused (-95)."""
    arrays = arrays_of(
        (PAGE_SIZE, PAGE_SIZE), (2 * GIB, GIB), (4 * GIB, GIB), (6 * GIB, GIB), (TIB, GIB, "bar"), (2 * TIB, GIB, "bar")
    )
    assert plan("minmax", arrays).attempts[0].ranges == (
        Range(PAGE_SIZE, 3 * GIB - PAGE_SIZE),
        Range(4 * GIB, 3 * GIB),
        Range(TIB, TIB + GIB),
    )
    assert plan("minmax", arrays_of()).attempts[0].ranges == ()
    assert plan("minmax", arrays_of((0, PAGE_SIZE))).attempts[0].ranges == (Range(0, PAGE_SIZE),)


def test_minmax_with_a_mapping_across_4_gib_does_not_overlap():
    arrays = arrays_of((0, PAGE_SIZE), (3 * GIB, 2 * GIB), (8 * GIB, GIB))
    (attempt,) = plan("minmax", arrays).attempts
    check_logging_start(PAGE_SIZE, attempt.ranges)
    assert Coverage(attempt.ranges).mask(arrays.starts, arrays.sizes).all()


def test_auto_without_viommu_is_mapped():
    arrays = arrays_of((0, GIB))
    assert plan("auto", arrays).attempts == plan("mapped", arrays).attempts
    assert "without a vIOMMU" in plan("auto", arrays).reason


def test_auto_behind_a_viommu_tries_apertures_that_hold_what_is_mapped():
    """An aperture that leaves out what is mapped now would be dirty for ever; the exact ranges are better."""
    low = plan("auto", arrays_of((0xFFF0_0000, PAGE_SIZE)), 48)
    assert [attempt.ranges[0] for attempt in low.attempts] == [
        Range(0, 1 << 48),
        Range(0, 1 << 39),
        Range(0, 4 * GIB),
        Range(0xFFF0_0000, PAGE_SIZE),
    ]
    high = plan("auto", arrays_of((TIB, PAGE_SIZE)), 48)
    assert [attempt.ranges[0] for attempt in high.attempts] == [Range(0, 1 << 48), Range(TIB, PAGE_SIZE)]
    assert "48-bit vIOMMU" in high.reason


def test_every_attempt_is_what_the_kernel_takes():
    arrays = arrays_of(*[(n * 2 * GIB, GIB, *(["bar"] if n % 5 == 4 else [])) for n in range(400)])
    for strategy in ("auto", "mapped", "minmax", "aperture"):
        for width in (None, 39, 48):
            for attempt in plan(strategy, arrays, width).attempts:
                check_logging_start(PAGE_SIZE, attempt.ranges)
                assert attempt.what


@settings(deadline=None)
@given(spans, st.integers(0, 310), st.integers(1, 20), st.sampled_from([1, 4]))
def test_coverage_like_a_set_of_pages(wanted, first, count, alignment):
    """All or nothing: even partly untracked is untracked (QEMU series patch 15)."""
    coverage = Coverage([Range(at * 4096, size * 4096) for at, size in wanted], exact=True, granule=alignment * 4096)
    model = {page for at, size in wanted for page in range(at, at + size)}
    aligned = first % alignment == 0 == count % alignment
    assert coverage.covers(first * 4096, count * 4096) == (aligned and set(range(first, first + count)) <= model)


def test_nothing_covers_nothing():
    assert not Coverage(()).covers(0, PAGE_SIZE)


mapping_lists = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 9), st.sampled_from([[], [], ["bar"], ["read"]])), max_size=25
)


@settings(deadline=None)
@given(mapping_lists, spans, st.sampled_from([1, 4]), st.booleans(), st.sampled_from([8, 16, 1 << 20]))
def test_windows_hold_every_covered_mapping_once(layout, armed, granule, arbitrary, max_bitmap):
    at, mappings = 0, []
    for gap, count, kind in layout:
        mappings.append(((at + gap) * 4096, count * 4096, *kind))
        at += gap + count
    arrays = arrays_of(*mappings)
    coverage = Coverage([Range(first * 4096, count * 4096) for first, count in armed])
    windows = plan_windows(arrays, coverage, granule=granule * 4096, arbitrary=arbitrary, max_bitmap=max_bitmap)
    mask = coverage.mask(arrays.starts, arrays.sizes) & arrays.ram_writable
    wanted = [Range(*map(int, item)) for item in zip(arrays.starts[mask], arrays.sizes[mask], strict=True)]
    assert pages(wanted) <= pages(windows)
    assert len(pages(windows)) == sum(window.length // 4096 for window in windows)
    assert windows == sorted(windows)
    if not arbitrary:
        assert windows == wanted
        return
    for window in windows:
        assert window.iova % (granule * 4096) == 0 == window.length % (granule * 4096)
        assert window.length // 4096 <= max_bitmap * 8
        assert pages([window]) & pages(wanted)


def test_one_report_for_a_section_that_fits():
    """QEMU series patch 16: not one for each of m mappings."""
    arrays = arrays_of(*[(n * 6 * (1 << 20), PAGE_SIZE) for n in range(5000)])
    assert len(plan_windows(arrays, Coverage([Range(0, 1 << 48)]))) == 1


def test_a_48_bit_aperture_costs_no_gigabytes_of_bitmap():
    """Two mappings at its ends: 8 GiB of bitmap in one, two small ones in windows."""
    arrays = arrays_of((0, PAGE_SIZE), ((1 << 48) - PAGE_SIZE, PAGE_SIZE))
    windows = plan_windows(arrays, Coverage([Range(0, 1 << 48)]))
    assert windows == [Range(0, PAGE_SIZE), Range((1 << 48) - PAGE_SIZE, PAGE_SIZE)]


def test_large_ram_is_cut_at_the_largest_bitmap():
    arrays = arrays_of((0, 3 * GIB), (4 * GIB, 397 * GIB))
    windows = plan_windows(arrays, Coverage([Range(0, TIB)]))
    assert [window.length // GIB for window in windows] == [128, 128, 128, 17]


def test_gaps_that_cost_more_than_a_message_stay_out():
    arrays = arrays_of((0, GIB), (2 * GIB, GIB), (20 * GIB, GIB), (500 * GIB, GIB))
    windows = plan_windows(arrays, Coverage([Range(0, TIB)]))
    assert windows == [Range(0, 3 * GIB), Range(20 * GIB, GIB), Range(500 * GIB, GIB)]


def test_ranges_that_touch_become_one():
    starts = np.array([0, 1, 5]) * PAGE_SIZE
    assert merge(starts, starts + PAGE_SIZE, 9) == [Range(0, 2 * PAGE_SIZE), Range(5 * PAGE_SIZE, PAGE_SIZE)]


def test_a_mapping_of_half_a_log_page_is_not_covered():
    coverage = Coverage([Range(0, GIB)], exact=True, granule=2 * PAGE_SIZE)
    assert coverage.covers(0, 2 * PAGE_SIZE)
    assert not coverage.covers(0, PAGE_SIZE)
    assert not coverage.covers(PAGE_SIZE, 2 * PAGE_SIZE)


def test_aperture_sizes_are_whole_pages_that_fit_64_bits():
    for max_iova in ((1 << 63) - 1, (1 << 64) - 1):
        sizes = aperture_sizes(max_iova, 4 * GIB)
        assert sizes == [(1 << 63) - PAGE_SIZE, 1 << 39, 4 * GIB]
    assert all(isinstance(size, int) for width in (None, (1 << 39) - 1) for size in aperture_sizes(width, TIB))


def test_every_plan_says_why():
    arrays = arrays_of((PAGE_SIZE, PAGE_SIZE))
    assert [plan(strategy, arrays, 48).reason for strategy in ("mapped", "minmax", "aperture", "auto")] == [
        "the mapped ranges were asked for",
        "the spans of low, high and BAR mappings were asked for",
        "the aperture was asked for",
        "behind a 48-bit vIOMMU an aperture needs no arming again as the guest maps",
    ]
    assert plan("auto", arrays).reason == "without a vIOMMU the mappings never change"


def test_an_aperture_is_named_by_its_size():
    tried = plan_start("aperture", arrays_of(), max_iova=(1 << 48) - 1, ram_size=3 * GIB).attempts
    assert [attempt.what for attempt in tried] == [
        "the aperture up to 2^48",
        "the aperture up to 2^39",
        "[0, 0xc0000000)",
    ]


def test_an_aperture_that_ends_with_the_last_mapping_holds_it():
    high = plan("auto", arrays_of(((1 << 48) - PAGE_SIZE, PAGE_SIZE)), 48)
    assert high.attempts[0].ranges == (Range(0, 1 << 48),)


def test_two_ranges_that_are_refused_are_tried_as_one():
    arrays = arrays_of((0, PAGE_SIZE), (TIB, PAGE_SIZE))
    assert [len(attempt.ranges) for attempt in plan("mapped", arrays).attempts] == [2, 1]


def test_minmax_counts_a_mapping_that_ends_at_4_gib_as_low():
    arrays = arrays_of((4 * GIB - PAGE_SIZE, PAGE_SIZE), (8 * GIB, PAGE_SIZE))
    assert plan("minmax", arrays).attempts[0].ranges == (
        Range(4 * GIB - PAGE_SIZE, PAGE_SIZE),
        Range(8 * GIB, PAGE_SIZE),
    )


def test_one_report_for_a_section_that_fits_wherever_it_lies():
    arrays = arrays_of((TIB, PAGE_SIZE), (TIB + 5 * GIB, PAGE_SIZE), (TIB + 32 * GIB - PAGE_SIZE, PAGE_SIZE))
    assert plan_windows(arrays, Coverage([Range(0, 1 << 48)])) == [Range(TIB, 32 * GIB)]


def test_a_gap_as_large_as_the_largest_stays_in():
    """All of it does not fit, so gaps are looked at, each between its own two mappings."""
    near = ((0, PAGE_SIZE), (2 * GIB + PAGE_SIZE, PAGE_SIZE), (2 * GIB + 3 * PAGE_SIZE, PAGE_SIZE))
    far = ((TIB, PAGE_SIZE), (TIB + PAGE_SIZE, PAGE_SIZE), (TIB + 3 * GIB, PAGE_SIZE))
    assert plan_windows(arrays_of(*near, *far), Coverage([Range(0, 1 << 48)])) == [
        Range(0, 2 * GIB + 4 * PAGE_SIZE),
        Range(TIB, 2 * PAGE_SIZE),
        Range(TIB + 3 * GIB, PAGE_SIZE),
    ]


def test_windows_leave_out_the_gaps_between_them():
    """64 pages in each; mappings of 3 pages at 0, 100 and 150, of which two fit into one."""
    arrays = arrays_of(*[(at * PAGE_SIZE, 3 * PAGE_SIZE) for at in (0, 100, 150)])
    windows = plan_windows(arrays, Coverage([Range(0, GIB)]), max_bitmap=8)
    assert windows == [Range(0, 3 * PAGE_SIZE), Range(100 * PAGE_SIZE, 53 * PAGE_SIZE)]


def test_a_window_is_at_least_one_page_of_the_log():
    arrays = arrays_of((0, 1 << 20))
    windows = plan_windows(arrays, Coverage([Range(0, GIB)]), granule=512 << 10, max_bitmap=8)
    assert windows == [Range(0, 512 << 10), Range(512 << 10, 512 << 10)]


def test_what_is_too_large_for_one_report_is_not_covered_where_mappings_cannot_be_cut() -> None:
    whole = [Range(0, TIB)]
    assert Coverage(whole, exact=True).covers(0, 512 * GIB)
    assert not Coverage(whole, exact=True).covers(0, 512 * GIB + PAGE_SIZE)
    assert Coverage(whole).covers(0, TIB)
