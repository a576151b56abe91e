"""Round trips, refusals, and every message of the captured conversations."""

import contextlib
import struct
from pathlib import Path

import pytest
from captures import DESTINATION, QEMU, SOURCE, answered, load
from hypothesis import given
from hypothesis import strategies as st

from common.vfio import feature as vfio
from common.vfio_user import codec
from common.vfio_user.capabilities import Capabilities, Extension, TwinSocket
from common.vfio_user.codec import Command, DmaAccess, DmaMap, DmaUnmap, Feature, Header, MigData, RegionAccess, Version
from common.vfio_user.description import (
    Area,
    DeviceInfo,
    IoEventFd,
    IrqFlags,
    IrqInfo,
    IrqSet,
    RegionFlags,
    RegionInfo,
    RegionQuery,
    pack_io_fds,
    unpack_io_fds,
)
from common.vfio_user.transcript import Recorded

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
SMALL = st.integers(0, 1 << 20)
IRQ_FLAGS = st.builds(
    lambda data, action: IrqFlags(data | action), st.sampled_from([1, 2, 4]), st.sampled_from([8, 16, 32])
)
LIMIT = 1 << 20

bodies = st.one_of(
    st.builds(DmaMap, U32, U64, U64, U64),
    st.builds(DmaUnmap, st.just(0), U64, U64),
    st.builds(DmaUnmap, st.just(1), U64, U64, U64, SMALL),
    st.builds(DmaAccess, U64, U64),
    st.builds(DeviceInfo, U32, U32, U32),
    st.builds(IrqInfo, U32, U32, U32),
    st.builds(IrqSet, U32, IRQ_FLAGS, U32, U32),
    st.builds(RegionAccess, U64, U32, U32),
    st.builds(Feature, U32, U32),
    st.builds(MigData, SMALL),
)


@given(bodies, st.integers(1, 8))
def test_bodies_survive_the_wire_and_short_ones_are_refused(body: DmaMap, missing: int) -> None:
    packed = body.pack()
    assert type(body).unpack(packed) == body
    assert type(body).unpack(memoryview(packed)) == body
    with pytest.raises(ValueError):
        type(body).unpack(packed[:-missing])


@given(U16, U16, st.integers(16, LIMIT), st.sampled_from([0, 1, 0x10, 0x21]), U32)
def test_headers_survive_the_wire(number: int, command: int, size: int, flags: int, error: int) -> None:
    header = Header(number, command, size, flags, error)
    assert Header.unpack(header.pack(), LIMIT) == header
    assert header.is_reply == bool(flags & 1)


@pytest.mark.parametrize(("size", "flags"), [(15, 0), (0, 0), (LIMIT + 1, 0), (2**32 - 1, 0), (16, 2), (16, 0xF)])
def test_impossible_headers_are_refused(size: int, flags: int) -> None:
    with pytest.raises(ValueError):
        Header.unpack(struct.pack("<HHIII", 1, 1, size, flags, 0), LIMIT)


@given(st.binary(max_size=80))
def test_whatever_comes_is_read_or_refused(body: bytes) -> None:
    readers = (
        Version.unpack, DmaMap.unpack, DmaUnmap.unpack, DmaAccess.unpack, DeviceInfo.unpack, RegionInfo.unpack,
        RegionQuery.unpack_info, RegionQuery.unpack_io_fds, IrqInfo.unpack, IrqSet.unpack, RegionAccess.unpack,
        Feature.unpack, MigData.unpack, lambda data: unpack_io_fds(data, [3]),
    )  # fmt: skip
    for read in readers:
        with contextlib.suppress(ValueError):
            read(body)


def test_unmap_with_bitmap() -> None:
    request = DmaUnmap(codec.UNMAP_GET_DIRTY_BITMAP, 0x1000, 0x2000, 4096, 8)
    assert request.pack() == struct.pack("<IIQQQQ", 48, 1, 0x1000, 0x2000, 4096, 8)
    assert bytes(request.unpack_bitmap(request.pack() + b"12345678")) == b"12345678"
    with pytest.raises(ValueError, match="too short"):
        request.unpack_bitmap(request.pack() + b"1234567")


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<IIQQ", 24, 3, 0, 0),
        struct.pack("<IIQQ", 24, 4, 0, 0),
        struct.pack("<IIQQ", 24, 2, 0x1000, 0),
        struct.pack("<IIQQ", 23, 0, 0, 0x1000),
        struct.pack("<IIQQ", 24, 1, 0, 0x1000),
        struct.pack("<IIQQQQ", 47, 1, 0, 0x1000, 4096, 8),
    ],
)
def test_impossible_unmaps_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        DmaUnmap.unpack(body)


@pytest.mark.parametrize("flags", [0, 1, 8, 0x0B, 0x39, 0x64])
def test_interrupts_need_one_kind_of_data_and_one_action(flags: int) -> None:
    with pytest.raises(ValueError):
        IrqSet.unpack(struct.pack("<IIIII", 20, flags, 0, 0, 1))


def test_data_of_a_padded_message() -> None:
    body = MigData(3).pack() + b"abc" + bytes(5)
    assert bytes(MigData.unpack(body).data(body)) == b"abc"
    with pytest.raises(ValueError):
        MigData.unpack(body[:-6]).data(body[:-6])


# Regions


@given(st.lists(st.builds(Area, st.integers(0, 1 << 30), st.integers(0, 1 << 30)), max_size=5), U64)
def test_regions_survive_the_wire(areas: list[Area], offset: int) -> None:
    region = RegionInfo(3, RegionFlags(7), 1 << 40, offset, tuple(areas))
    body = region.pack(region.argsz)
    assert len(body) == region.argsz
    expected = RegionFlags(15) if areas else RegionFlags(7)
    assert RegionInfo.unpack(body) == (RegionInfo(3, expected, 1 << 40, offset, tuple(areas)), region.argsz)


def test_a_region_without_room_for_its_areas() -> None:
    region = RegionInfo(1, RegionFlags(7), 0x3000, 0, (Area(0, 0x1000), Area(0x2000, 0x1000)))
    body = region.pack(32)
    assert len(body) == 32
    assert RegionInfo.unpack(body) == (RegionInfo(1, RegionFlags(7), 0x3000), 80)


def test_areas_outside_their_region_are_refused() -> None:
    region = RegionInfo(1, RegionFlags(7), 0x3000, 0, (Area(0x2000, 0x1001),))
    with pytest.raises(ValueError, match="outside"):
        RegionInfo.unpack(region.pack(region.argsz))


def test_capabilities_in_a_circle_end() -> None:
    body = struct.pack("<IIIIQQHHI", 40, 8, 0, 32, 0x1000, 0, 9, 1, 32)
    with pytest.raises(ValueError, match="capabilities"):
        RegionInfo.unpack(body)


def test_an_unknown_capability_is_passed_over() -> None:
    sparse = struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0x1000, 0x1000)
    body = struct.pack("<IIIIQQHHI", 72, 8, 0, 32, 0x3000, 0, 9, 1, 40) + sparse
    assert RegionInfo.unpack(body)[0].areas == (Area(0x1000, 0x1000),)


def test_a_number_of_areas_that_cannot_be() -> None:
    body = struct.pack("<IIIIQQHHIII", 48, 8, 0, 32, 0x3000, 0, 1, 1, 0, 2**31, 0)
    with pytest.raises(ValueError, match="too short"):
        RegionInfo.unpack(body)


def test_io_fds_share_descriptors() -> None:
    items = [IoEventFd(0x800, 4, 7), IoEventFd(0x808, 8, 5, 1, 99), IoEventFd(0x810, 0, 7)]
    body, fds = pack_io_fds(0, 1 << 20, items)
    assert fds == [5, 7] and len(body) == 16 + 3 * 48
    assert unpack_io_fds(body, fds) == (items, len(body))


def test_io_fds_without_room() -> None:
    body, fds = pack_io_fds(2, 63, [IoEventFd(0, 4, 7)])
    assert body == struct.pack("<IIII", 64, 0, 2, 1) and fds == []
    assert unpack_io_fds(body, []) == ([], 64)


def test_io_fds_of_the_published_layout() -> None:
    body = struct.pack("<IIIIQQIIIIQ", 56, 0, 0, 1, 0x800, 4, 0, 0, 1, 0, 42)
    assert unpack_io_fds(body, [9]) == ([IoEventFd(0x800, 4, 9, 1, 42)], 56)


def test_io_fds_that_are_no_eventfds_are_passed_over() -> None:
    body = struct.pack("<IIIIQQIIIIQ", 56, 0, 0, 1, 0x800, 4, 0, 1, 1, 0, 42)
    assert unpack_io_fds(body, [9]) == ([], 56)


@pytest.mark.parametrize("fds", [[], [9]])
def test_io_fds_that_did_not_come(fds: list[int]) -> None:
    body = struct.pack("<IIIIQQIIIIQ", 56, 0, 0, 1, 0x800, 4, 1, 0, 1, 0, 42)
    with pytest.raises(ValueError, match="descriptor"):
        unpack_io_fds(body, fds)


# VERSION

extensions = st.builds(Extension, *([st.booleans()] * 6))
capabilities = st.builds(
    Capabilities,
    st.integers(0, 1000),
    st.integers(1, 2**32),
    st.none() | st.just(4096),
    st.none() | extensions,
    st.none() | st.builds(TwinSocket, st.none() | st.integers(0, 1000)),
)


@given(U16, U16, capabilities)
def test_versions_survive_the_wire(major: int, minor: int, offered: Capabilities) -> None:
    assert Version.unpack(Version(major, minor, offered).pack()) == Version(major, minor, offered)


def test_a_version_without_capabilities_has_the_defaults() -> None:
    assert Version.unpack(b"\0\0\1\0") == Version(0, 1, Capabilities(1, 1 << 20, None, None))


@pytest.mark.parametrize(
    "text",
    [
        b"{}", b"\0\0", b"{\0", b"[]\0", b'"x"\0', b'{"capabilities":3}\0', b'{"capabilities":{"max_msg_fds":-1}}\0',
        b'{"capabilities":{"max_msg_fds":true}}\0', b'{"capabilities":{"max_data_xfer_size":0}}\0',
        b'{"capabilities":{"migration":4096}}\0', b'{"capabilities":{"migration":{"pgsize":"4096"}}}\0',
        b"[" * 100_000 + b"\0", b"\xff\0",
    ],
)  # fmt: skip
def test_versions_that_make_no_sense(text: bytes) -> None:
    with pytest.raises(ValueError):
        Version.unpack(b"\0\0\2\0" + text)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, {"version": 2, "p2p": True}, {"version": "1"}])
def test_other_extensions_are_none_of_ours(value: object) -> None:
    assert Capabilities.from_json({"capabilities": {"switchover": value}}).extension is None


def test_the_extension_as_documented() -> None:
    assert Extension().to_json() == {
        "version": 1, "precopy_info": True, "data_size": True, "p2p": True, "report_ranges": True,
        "comparable_dump": True, "iommu_dirty": False, "trace": False,
    }  # fmt: skip
    assert Extension.from_json({"version": 1, "p2p": 1, "data_size": True, "more": 5}) == Extension(
        precopy_info=False, data_size=True, p2p=False, report_ranges=False, comparable_dump=False
    )


# Captured conversations


def repacked(command: Recorded, reply: Recorded) -> tuple[bytes | None, bytes | None]:
    """Return both bodies after having been read and written by the codec; None for one that has no fixed form."""
    body, answer = command.body, reply.body
    match Command(command.header.command):
        case Command.DMA_MAP:
            return DmaMap.unpack(body).pack(), b""
        case Command.DMA_UNMAP:
            return DmaUnmap.unpack(body).pack(), DmaUnmap.unpack(answer).pack()
        case Command.DEVICE_GET_INFO:
            return DeviceInfo.unpack(body).pack(), DeviceInfo.unpack(answer).pack()
        case Command.DEVICE_GET_REGION_INFO:
            query = RegionQuery.unpack_info(body)
            region, argsz = RegionInfo.unpack(answer)
            return query.pack_info(), region.pack(query.argsz) if argsz == len(answer) else None
        case Command.DEVICE_GET_IRQ_INFO:
            return IrqInfo.unpack(body).pack(), IrqInfo.unpack(answer).pack()
        case Command.DEVICE_SET_IRQS:
            return IrqSet.unpack(body).pack(), b""
        case Command.REGION_READ | Command.REGION_WRITE:
            access = RegionAccess.unpack(body)
            data = body[16:] if command.header.command == Command.REGION_WRITE else answer[16:]
            assert reply.header.flags & 0x20 or len(data) == access.size
            refused = b"" if reply.header.flags & 0x20 else RegionAccess.unpack(answer).pack() + answer[16:]
            return access.pack() + body[16:], refused
        case Command.DMA_READ | Command.DMA_WRITE:
            access = DmaAccess.unpack(body)
            assert len(body + answer) == 32 + access.size
            return access.pack() + body[16:], DmaAccess.unpack(answer).pack() + answer[16:]
        case Command.DEVICE_FEATURE:
            return Feature.unpack(body).pack() + body[8:], Feature.unpack(answer).pack() + answer[8:]
        case Command.MIG_DATA_READ:
            data = MigData.unpack(answer).data(answer)
            return MigData.unpack(body).pack(), (MigData(len(data)).pack() + data).ljust(len(answer), b"\0")
        case Command.MIG_DATA_WRITE:
            data = MigData.unpack(body).data(body)
            return MigData(len(data)).pack() + data, b""
        case Command.VERSION:
            assert Version.unpack(body).capabilities.max_msg_fds in (16, 32)
            assert Version.unpack(answer).capabilities == Capabilities(8, 1 << 20, 4096, None)
    return None, None


@pytest.mark.parametrize("path", [SOURCE, DESTINATION, QEMU], ids=lambda path: path.stem)
def test_captured_messages_are_read_and_written_as_they_were(path: Path) -> None:
    pairs = answered(path)
    assert len(pairs) * 2 == len(load(path))
    for command, reply in pairs:
        assert Header.unpack(command.header.pack(), codec.MAX_COMMAND_SIZE) == command.header
        body, answer = repacked(command, reply)
        assert body is None or body == command.body
        assert answer is None or answer == reply.body


def test_captured_features() -> None:
    starts, reports, states = [], [], []
    for command, reply in answered(SOURCE):
        if command.header.command != Command.DEVICE_FEATURE:
            continue
        number = Feature.unpack(command.body).flags & vfio.FEATURE_MASK
        match number:
            case vfio.DeviceFeature.DMA_LOGGING_START:
                starts.append(vfio.LoggingStart.unpack(command.body[8:]))
            case vfio.DeviceFeature.DMA_LOGGING_REPORT:
                reports.append((vfio.LoggingReport.unpack(command.body[8:]).iova, reply.body[32:]))
            case vfio.DeviceFeature.MIG_DEVICE_STATE:
                states.append(vfio.unpack_device_state(command.body[8:]).name)
    assert starts == [vfio.LoggingStart(4096, ())]
    assert [iova for iova, _ in reports] == [page * 4096 for page in range(16)]
    assert [iova for iova, bitmap in reports if any(bitmap)] == [4096]
    assert states == ["PRE_COPY", "STOP_COPY", "STOP"]
