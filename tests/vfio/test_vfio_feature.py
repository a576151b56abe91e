import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.vfio import feature
from common.vfio.feature import LoggingReport, LoggingStart, PrecopyInfo, Range
from common.vfio.migration import DeviceState, MigrationFlags

U64 = st.integers(0, 2**64 - 1)


def refused(call: object, *args: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.errno


@given(U64, st.lists(st.builds(Range, U64, U64), max_size=300))
def test_logging_start_survives_the_wire(page_size: int, ranges: list[Range]) -> None:
    start = LoggingStart(page_size, tuple(ranges))
    if len(ranges) > 256:
        assert refused(LoggingStart.unpack, start.pack()) == errno.E2BIG
    else:
        assert LoggingStart.unpack(start.pack() + b"more") == start


@given(U64, U64, U64)
def test_fixed_payloads_survive_the_wire(a: int, b: int, c: int) -> None:
    assert LoggingReport.unpack(LoggingReport(a, b, c).pack()) == LoggingReport(a, b, c)
    assert PrecopyInfo.unpack(PrecopyInfo(a, b).pack()) == PrecopyInfo(a, b)
    assert feature.unpack_data_size(feature.pack_data_size(a)) == a


def test_layouts() -> None:
    assert LoggingStart(4096, (Range(1, 2),)).pack() == struct.pack("<QIIQQ", 4096, 1, 0, 1, 2)
    assert feature.pack_device_state(DeviceState.STOP_COPY) == struct.pack("<Ii", 3, -1)
    assert feature.unpack_device_state(struct.pack("<Ii", 7, 0)) is DeviceState.PRE_COPY_P2P
    assert feature.unpack_migration_flags(struct.pack("<Q", 0xF5)) == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    assert PrecopyInfo(1, 2).pack() == struct.pack("<QQ", 1, 2)


@pytest.mark.parametrize(
    ("read", "size"),
    [
        (LoggingStart.unpack, 16),
        (LoggingReport.unpack, 24),
        (PrecopyInfo.unpack, 16),
        (feature.unpack_device_state, 8),
        (feature.unpack_migration_flags, 8),
        (feature.unpack_data_size, 8),
    ],
)
def test_short_payloads_are_refused(read: object, size: int) -> None:
    read(bytes(size))  # type: ignore[operator]
    with pytest.raises(ValueError, match=str(size)):
        read(bytes(size - 1))  # type: ignore[operator]


def test_a_payload_with_too_few_ranges_is_refused() -> None:
    with pytest.raises(ValueError, match="2 ranges"):
        LoggingStart.unpack(LoggingStart(4096, (Range(0, 1), Range(2, 3))).pack()[:-1])


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(ValueError):
        feature.unpack_device_state(struct.pack("<Ii", 8, -1))


@pytest.mark.parametrize(
    ("page_size", "ranges", "expected"),
    [
        (4096, [], errno.EINVAL),
        (4096, [Range(n * 8192, 4096) for n in range(257)], errno.E2BIG),
        (0, [Range(0, 4096)], errno.EINVAL),
        (12288, [Range(0, 12288)], errno.EINVAL),
        (4096, [Range(0, 4095)], errno.EINVAL),
        (4096, [Range(1, 4096)], errno.EINVAL),
        (4096, [Range(4096, 0)], errno.EINVAL),
        (4096, [Range(2**64 - 4096, 8192)], errno.EOVERFLOW),
        (4096, [Range(8192, 4096), Range(0, 12288)], errno.EINVAL),
        (4096, [Range(0, 4096), Range(0, 4096)], errno.EINVAL),
    ],
)
def test_refused_starts(page_size: int, ranges: list[Range], expected: int) -> None:
    assert refused(feature.check_logging_start, page_size, ranges) == expected


def test_accepted_starts() -> None:
    feature.check_logging_start(4096, [Range(n * 4096, 4096) for n in reversed(range(256))])
    feature.check_logging_start(4096, [Range(2**64 - 4096, 4096)])


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (LoggingReport(0, 4096, 2048), errno.EINVAL),
        (LoggingReport(0, 4096, 4097), errno.EINVAL),
        (LoggingReport(0, 0, 4096), errno.EINVAL),
        (LoggingReport(2**64 - 4096, 4097, 4096), errno.EOVERFLOW),
    ],
)
def test_refused_reports(report: LoggingReport, expected: int) -> None:
    assert refused(feature.check_logging_report, report) == expected
    feature.check_logging_report(LoggingReport(2**64 - 4096, 4096, 1 << 21))


def test_bitmap_sizes_are_whole_words() -> None:
    assert [feature.bitmap_bytes(n * 4096, 4096) for n in (1, 64, 65)] == [8, 8, 16]
    assert feature.bitmap_bytes(1, 4096) == 8
