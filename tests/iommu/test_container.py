from __future__ import annotations

import errno
import logging

import numpy as np
import pytest
from dma_devices import PAGES, RAM_SIZE, Destination, Device, Ram, container_of

from common.iommu.container import MAX_MESSAGE, Container
from common.iommu.iova_tree import BarTarget, RamTarget
from common.iommu.viommu import Viommu
from common.memory.bitmap import empty
from common.memory.layout import PAGE_SIZE
from common.vfio.dirty_log import LogLimits
from common.vfio.feature import Range

P = PAGE_SIZE


def fails(number, *words):
    return pytest.raises(
        OSError, check=lambda error: error.errno == number and all(word in str(error) for word in words)
    )


class Bars:
    """One BAR of 64 KiB of the device `peer` at 3 GiB."""

    base = 0xC000_0000

    def __init__(self):
        self.data = bytearray(0x10000)

    def find(self, gpa, size):
        inside = self.base <= gpa and gpa + size <= self.base + len(self.data)
        return BarTarget("peer", 2, gpa - self.base) if inside else None

    def region_read(self, device, bar, offset, size):
        assert (device, bar) == ("peer", 2)
        return bytes(self.data[offset : offset + size])

    def region_write(self, device, bar, offset, data):
        assert (device, bar) == ("peer", 2)
        self.data[offset : offset + len(data)] = data


@pytest.fixture
def ram():
    return Ram()


@pytest.fixture
def destination(ram):
    return Destination(ram)


# -- map and unmap


def test_map_puts_it_into_every_device(ram):
    a, b = Device("a", ram), Device("b", ram)
    container = container_of(ram, a, b)
    mapping = container.map(8 * P, 2 * P, 3 * P, writable=False)
    assert mapping.target == RamTarget(3 * P)
    assert a.maps == b.maps == {8 * P: (2 * P, 3 * P, 1)}
    assert container.mappings == [mapping] and container.mapping_count == 1
    assert container.unmap(0, 100 * P) == 2 * P
    assert a.maps == b.maps == {} and container.mappings == []
    assert container.unmap(0, 100 * P) == 0


def test_refused_maps_reach_no_device(ram):
    """QEMU series patch 8: an overlap is EEXIST and MAP is not attempted."""
    device = Device("a", ram)
    container = container_of(ram, device, viommu=Viommu(39))
    container.map(0, P, 0)
    for number, arguments in [
        (errno.EEXIST, (0, 2 * P, 0)),
        (errno.EINVAL, (1 << 39, P, 0)),
        (errno.EINVAL, (8, P, 0)),
        (errno.EINVAL, (8 * P, 0, 0)),
        (errno.EINVAL, (8 * P, P, RAM_SIZE)),
        (errno.EINVAL, (8 * P, P, -P)),
        (errno.EINVAL, (8 * P, P, 12)),
    ]:
        with fails(number):
            container.map(*arguments)
    assert device.calls == ["map"]


def test_a_device_that_refuses_a_map_takes_it_from_all(ram, destination):
    """What a device wrote between its own map and the roll-back is not lost."""
    a, b = Device("a", ram), Device("b", ram)
    container = container_of(ram, a, b)
    container.map(50 * P, P, 0)
    container.start_tracking(destination.dirty)
    container.begin_delta()
    container.take_delta()
    b.errors["map"] = errno.ENOMEM
    b.on["map"] = lambda: a.write(8 * P)
    with fails(errno.ENOMEM, "dma0: b: cannot map IOVA 0x8000 size 0x1000 (DMA_MAP): Cannot allocate memory"):
        container.map(8 * P, P, 3 * P)
    assert 8 * P not in a.maps and 8 * P not in b.maps and container.mapping_count == 1
    assert container.take_delta().added == ()
    destination.round()
    assert destination.lost() == []


def test_unmap_never_splits(ram):
    container = container_of(ram, Device("a", ram))
    container.map(0, 4 * P, 0)
    with fails(errno.EINVAL):
        container.unmap(0, 2 * P)
    assert container.mapping_count == 1


def test_what_fails_while_no_migration_runs_is_told_to_who_asked_and_that_is_all(ram, destination):
    """QEMU series patch 4: an error is printed, no more. A migration that begins later knows of the RAM at risk."""
    a, b = Device("a", ram), Device("b", ram)
    container = container_of(ram, a, b)
    container.map(0, P, 0)
    container.map(8 * P, P, 3 * P)
    a.errors["unmap"] = errno.EBUSY
    with fails(errno.EBUSY, "dma0: a: cannot unmap IOVA 0x8000 size 0x1000 (DMA_UNMAP): Device or resource busy"):
        container.unmap(8 * P, P)
    del a.errors["unmap"]
    container.map(16 * P, P, 16 * P)
    container.start_tracking(destination.dirty)
    assert container.tracking.kind == "device"
    container.sync()
    assert destination.round() == {3}


def test_a_device_that_refuses_an_unmap_leaves_its_ram_dirty_for_ever(ram, destination):
    """It may still write there, whatever is mapped by now: unknown is dirty, at every sync, in later sessions too."""
    a, b = Device("a", ram), Device("b", ram)
    container = container_of(ram, a, b)
    container.map(8 * P, 2 * P, 3 * P)
    container.start_tracking(destination.dirty)
    a.errors["unmap"] = errno.EIO
    with fails(errno.EIO, "dma0: a: cannot unmap IOVA 0x8000 size 0x2000 (DMA_UNMAP): Input/output error"):
        container.unmap(8 * P, 2 * P)
    assert 8 * P not in b.maps and container.mapping_count == 0
    assert destination.round() == {3, 4}
    for _ in range(2):
        container.sync()
        assert destination.round() == {3, 4}
    container.stop_tracking()
    container.start_tracking(destination.dirty)
    a.write(9 * P)
    container.sync(last=True)
    destination.round()
    assert destination.lost() == []


# -- tracking


def test_several_devices_are_one_union(ram, destination):
    a, b = Device("a", ram), Device("b", ram)
    container = container_of(ram, a, b)
    container.map(0, 100 * P, 7 * P)
    info = container.start_tracking(destination.dirty)
    assert (info.kind, info.ranges, info.page_size) == ("device", (Range(0, 100 * P),), P)
    a.write(P)
    b.write(2 * P)
    b.write(99 * P)
    found = container.sync()
    assert destination.round() == {8, 9, 106} and destination.lost() == []
    assert (found.logged_pages, found.uncovered_pages, found.reports) == (3, 0, 1)
    assert container.sync().logged_pages == 0 and destination.round() == set()


def test_one_report_for_each_device_however_many_mappings(ram, destination):
    """QEMU series patch 16."""
    devices = [Device(name, ram) for name in "ab"]
    container = container_of(ram, *devices, viommu=Viommu(48))
    for n in range(500):
        container.map(n * 3 * P, P, (PAGES - 1 - n) * P)
    container.start_tracking(destination.dirty)
    for n in range(0, 500, 7):
        devices[0].write(n * 3 * P)
    container.sync()
    assert destination.round() == {PAGES - 1 - n for n in range(0, 500, 7)}
    assert [len(device.reports) for device in devices] == [1, 1]


@pytest.mark.parametrize("refuses", [0, 1, 2])
def test_start_is_all_or_nothing(ram, destination, refuses):
    """QEMU series patch 9, M11: the devices before the one that fails are stopped, it is named, nothing is tracked."""
    devices = [Device(name, ram) for name in "abc"]
    devices[refuses].errors["start"] = errno.EIO
    container = container_of(ram, *devices)
    container.map(0, P, 0)
    with fails(
        errno.EIO,
        f"dma0: {'abc'[refuses]}: cannot start DMA logging of 1 ranges (DMA_LOGGING_START): Input/output error",
    ):
        container.start_tracking(destination.dirty)
    for index, device in enumerate(devices):
        assert device.calls[1:] == (["start", "stop"] if index < refuses else ["start"] if index == refuses else [])
        assert not device.log.active
    assert container.tracking is None
    with fails(errno.ENODATA):
        container.sync()
    del devices[refuses].errors["start"]
    container.start_tracking(destination.dirty)
    assert all(device.log.active for device in devices)


def test_attempts_are_tried_until_all_devices_accept_one(ram, destination):
    """A device with 2^42 refuses the whole aperture; the other was started already and is stopped in between."""
    roomy, card = Device("roomy", ram), Device("card", ram, limits=LogLimits(max_bits=42))
    container = container_of(ram, roomy, card, viommu=Viommu(48))
    info = container.start_tracking(destination.dirty)
    assert info.ranges == (Range(0, 1 << 39),)
    assert roomy.calls == ["start", "stop", "start"] and card.calls == ["start", "start"]
    assert "the aperture up to 2^39; refused: dma0: card: cannot start" in info.reason


@pytest.mark.parametrize(
    ("limits", "ranges"), [(LogLimits(max_ranges=10), 3), (LogLimits(max_ranges=300), 50), (LogLimits(max_ranges=1), 1)]
)
def test_mapped_merges_until_it_is_few_enough(ram, destination, limits, ranges):
    device = Device("a", ram, limits=limits)
    container = container_of(ram, device, strategy="mapped")
    for n in range(50):
        container.map(n * 2 * P, P, n * P)
    container.start_tracking(destination.dirty)
    assert len(device.armed) == ranges
    device.write(98 * P)
    container.sync()
    assert destination.round() == {49}


def test_when_every_attempt_is_refused_the_start_fails(ram, destination):
    device = Device("card", ram, limits=LogLimits(max_bits=12))
    container = container_of(ram, device)
    container.map(0, 2 * P, 0)
    with fails(errno.EOPNOTSUPP, "card: cannot start DMA logging"):
        container.start_tracking(destination.dirty)


def test_a_log_that_could_not_be_stopped_is_stopped_before_the_next_start(ram, destination, caplog):
    """M11: a failed STOP is only said, by name. A second START would be refused with EINVAL."""
    a, b = Device("a", ram), Device("b", ram)
    container = container_of(ram, a, b)
    container.map(0, P, 0)
    container.start_tracking(destination.dirty)
    a.errors["stop"] = errno.EBUSY
    with caplog.at_level(logging.WARNING):
        container.stop_tracking()
    assert "dma0: a: cannot stop DMA logging (DMA_LOGGING_STOP): Device or resource busy" in caplog.text
    assert a.log.active and not b.log.active and container.tracking is None
    del a.errors["stop"]
    container.start_tracking(destination.dirty)
    assert a.log.active and b.log.active


def test_a_sync_that_fails_says_who_and_loses_nothing(ram, destination):
    """M11. The first device's log is cleared by the sync that fails at the second: from then on all is dirty."""
    a, b = Device("a", ram), Device("b", ram)
    container = container_of(ram, a, b)
    container.map(0, 4 * P, 0)
    container.map(8 * P, P, 8 * P)
    container.start_tracking(destination.dirty)
    a.write(P)
    b.errors["report"] = errno.EIO
    with fails(
        errno.EIO, "dma0: b: cannot get the DMA log of IOVA 0x0 size 0x9000 (DMA_LOGGING_REPORT): Input/output error"
    ):
        container.sync()
    assert container.tracking.kind == "perpetual" and "Input/output error" in container.tracking.reason
    container.unmap(8 * P, P)
    assert destination.round() == {8}
    container.sync()
    assert destination.round() == {0, 1, 2, 3} and destination.lost() == []


@pytest.mark.parametrize("words", [0, 2])
def test_an_answer_of_the_wrong_size_is_an_error(ram, destination, words):
    device = Device("a", ram)
    device.logging_report = lambda *_: empty(128)[:words]
    container = container_of(ram, device)
    container.map(0, 4 * P, 0)
    container.start_tracking(destination.dirty)
    with fails(errno.EPROTO, "dma0: a:", "no bitmap of 4 pages"):
        container.sync()


def test_bits_past_the_end_are_no_answer(ram, destination):
    """Nobody knows what a device means that marks pages it was not asked for: sync fails, an unmap takes all."""
    device = Device("a", ram)
    container = container_of(ram, device)
    container.map(0, 4 * P, 0)
    container.start_tracking(destination.dirty)
    device.dma_unmap = lambda *_, bitmap: np.array([31], np.uint64)
    container.unmap(0, 4 * P)
    assert destination.round() == {0, 1, 2, 3}


def test_an_unmap_that_cannot_be_asked_about_costs_the_log(ram, destination):
    """A REPORT that fails, here the one after an unmap, means that the log is to be considered lost (kernel)."""
    device = Device("a", ram, unmap_bitmap=False, outlives=True)
    container = container_of(ram, device)
    container.map(0, P, 0)
    container.map(8 * P, P, 8 * P)
    container.start_tracking(destination.dirty)
    device.errors["report"] = errno.EIO
    container.unmap(8 * P, P)
    assert destination.round() == {8}
    assert container.tracking.kind == "perpetual"
    asked = "dma0: a: cannot get the DMA log after the unmap of IOVA 0x8000 size 0x1000 (DMA_LOGGING_REPORT)"
    assert f"{asked}: Input/output error" in container.tracking.reason
    assert container.sync().uncovered_pages == 1 and destination.round() == {0}


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("unmap_bitmap", [True, False])
def test_what_shares_a_large_page_with_an_unmapped_one(ram, destination, writable, unmap_bitmap):
    """A device that logs 32 KiB pages clears all eight when one of them is unmapped; its neighbours become dirty."""
    limits = LogLimits(page_sizes=(8 * P,))
    device = Device("a", ram, limits=limits, clears_granule=True, unmap_bitmap=unmap_bitmap)
    container = container_of(ram, device, viommu=Viommu(48))
    for n in range(7, 17):
        container.map(n * P, P, (2 * n) * P, writable=writable or n != 10)
    assert container.start_tracking(destination.dirty).page_size == 8 * P
    device.write(9 * P)
    container.unmap(10 * P, P)
    assert destination.round() - {20} == {2 * n for n in range(8, 16) if n != 10}
    container.sync()
    destination.round()
    assert destination.lost() == []


def test_nothing_tracks_so_everything_is_dirty_at_every_sync(ram, destination):
    """M10, level 3: what QEMU 10.0 to 10.2.2 silently skips."""
    container = container_of(ram, Device("a", ram), Device("mute", ram, logging=False))
    container.map(0, 2 * P, 5 * P)
    container.map(8 * P, P, 9 * P, writable=False)
    info = container.start_tracking(destination.dirty)
    assert info.kind == "perpetual" and "mute cannot log its own DMA" in info.reason
    for _ in range(2):
        assert container.sync().uncovered_pages == 2
        assert destination.round() == {5, 6}
    container.map(20 * P, P, 20 * P)
    container.unmap(20 * P, P)
    container.unmap(8 * P, P)
    assert destination.round() == {20}
    assert container.sync().unmapped_pages == 1


def test_the_iommu_tracks_all_that_is_mapped(ram, destination):
    a, b = Device("a", ram, logging=False, iommu=True), Device("b", ram, iommu=True)
    container = container_of(ram, a, b, viommu=Viommu(48))
    info = container.start_tracking(destination.dirty)
    assert info.kind == "iommu"
    container.map(1 << 40, 4 * P, 0)
    a.write((1 << 40) + P)
    container.sync()
    assert destination.round() == {1}


def test_an_iommu_that_cannot_be_asked_is_a_mistake(ram):
    class Mute:
        name = "mute"

    traits = Device("mute", ram, logging=False, iommu=True).traits
    with pytest.raises(TypeError, match="mute"):
        Container("dma0", ram, [Mute()], [traits])


def test_traits_belong_to_devices(ram):
    a, b = Device("a", ram), Device("b", ram)
    with pytest.raises(ValueError):
        Container("dma0", ram, [a, b], [b.traits, a.traits])


def test_uncovered_is_dirty_at_every_sync_and_covered_is_not(ram, destination):
    device = Device("a", ram)
    container = container_of(ram, device, viommu=Viommu(48), strategy="aperture")
    device.errors["start"] = errno.EOPNOTSUPP
    device.on["start"] = lambda: device.calls.count("start") > 1 and device.errors.clear()
    container.map((1 << 39) - P, P, 3 * P)
    container.map(1 << 39, P, 4 * P)
    container.start_tracking(destination.dirty)
    for _ in range(3):
        assert not container.sync().rearmed
        assert destination.round() == {4}
    container.unmap(1 << 39, P)
    assert destination.round() == {4}
    container.unmap((1 << 39) - P, P)
    assert destination.round() == set()


def test_arming_again_when_it_pays(ram, destination):
    """Uncovered costs its pages at each sync; once that is as much as is mapped, the logs are armed anew."""
    device = Device("a", ram)
    container = container_of(ram, device, strategy="mapped", viommu=Viommu(48))
    container.map(0, 3 * P, 0)
    container.start_tracking(destination.dirty)
    container.map(64 * P, P, 9 * P)
    for expected in ({9}, {9}, {9}):
        assert not container.sync().rearmed
        assert destination.round() == expected
    assert not container.sync(last=True).rearmed
    destination.round()
    found = container.sync()
    assert found.rearmed and found.uncovered_pages == 4
    assert destination.round() == {0, 1, 2, 9}
    assert device.armed == [Range(0, 3 * P), Range(64 * P, P)]
    device.write(64 * P)
    assert container.sync().logged_pages == 1
    assert destination.round() == {9}
    assert container.sync().uncovered_pages == 0 and destination.round() == set()


def test_nothing_mapped_at_the_start_is_armed_later(ram, destination):
    device = Device("a", ram)
    container = container_of(ram, device, strategy="mapped", viommu=Viommu(48))
    container.start_tracking(destination.dirty)
    assert device.calls == []
    container.map(0, P, 0)
    assert container.sync().rearmed
    assert device.calls == ["map", "start"]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EIO])
def test_a_failed_rearm_means_perpetual_not_a_lost_migration(ram, destination, number):
    a, b = Device("a", ram), Device("b", ram)
    container = container_of(ram, a, b, strategy="mapped", viommu=Viommu(48))
    container.map(0, P, 0)
    container.start_tracking(destination.dirty)
    container.map(64 * P, P, 9 * P)
    b.errors["start"] = number
    container.sync()
    destination.round()
    a.write(0)
    assert container.sync().rearmed
    assert destination.round() == {0, 9}
    assert container.tracking.kind == "perpetual" and "b: cannot start DMA logging" in container.tracking.reason
    assert not a.log.active and not b.log.active
    assert not container.sync().rearmed
    assert destination.round() == {0, 9}


def test_auto_falls_back_to_what_is_mapped_and_never_tries_an_aperture_twice(ram, destination):
    device = Device("card", ram, limits=LogLimits(max_bits=20))
    container = container_of(ram, device, viommu=Viommu(48))
    container.map(0xFFF0_0000, P, 0)
    info = container.start_tracking(destination.dirty)
    assert info.ranges == (Range(0xFFF0_0000, P),)
    assert "1 mappings as 1 ranges; refused:" in info.reason
    tried = device.calls.count("start")
    container.map(0xFFF8_0000, P, P)
    assert [container.sync().rearmed for _ in range(2)] == [False, True]
    assert device.calls.count("start") == tried + 1
    assert len(device.armed) == 2


def test_tracking_twice_is_refused_and_stopping_twice_is_not(ram, destination):
    container = container_of(ram, Device("a", ram))
    container.start_tracking(destination.dirty)
    with fails(errno.EBUSY):
        container.start_tracking(destination.dirty)
    container.stop_tracking()
    container.stop_tracking()


def test_without_tracking_unmap_asks_for_no_bitmap(ram):
    device = Device("a", ram)
    container = container_of(ram, device)
    container.map(0, P, 0)
    device.dma_unmap = lambda _iova, _size, *, bitmap: pytest.fail("bitmap") if bitmap else None
    container.unmap(0, P)


# -- DMA by message, peers, faults


def test_dma_by_message_is_done_checked_and_marked(ram, destination):
    viommu = Viommu(39)
    container = container_of(ram, Device("a", ram), viommu=viommu)
    container.map(8 * P, P, 3 * P)
    container.map(9 * P, P, 7 * P)
    container.map(10 * P, P, 8 * P, writable=False)
    container.map(11 * P, P, 8 * P, readable=False)
    container.start_tracking(destination.dirty)
    container.dma_write(9 * P - 3, b"abcdef")
    assert bytes(ram.bytes[4 * P - 3 : 4 * P]) == b"abc" and bytes(ram.bytes[7 * P : 7 * P + 3]) == b"def"
    assert container.dma_read(9 * P - 3, 6) == b"abcdef"
    assert destination.round() == {3, 7}
    with fails(errno.EFAULT):
        container.dma_write(10 * P - 1, b"xy")
    assert ram.bytes[8 * P - 1] == 0 and destination.round() == set()
    with fails(errno.EFAULT):
        container.dma_read(11 * P, 1)
    with fails(errno.EFAULT):
        container.dma_read(0, 1)
    with fails(errno.EINVAL):
        container.dma_read(8 * P, MAX_MESSAGE + 1)
    assert [(fault.iova, fault.write) for fault in viommu.faults] == [(10 * P - 1, True), (11 * P, False), (0, False)]
    assert container.dma_write(8 * P, b"") is None


def test_bars_are_reached_by_message_and_never_taken_for_ram(ram, destination):
    """Bits that lead to a BAR are counted and skipped."""
    bars = Bars()
    device = Device("a", ram)
    container = container_of(ram, device, bars=bars, viommu=Viommu(48))
    container.map(P, P, P)
    container.map(2 * P, 2 * P, bars.base)
    container.map(4 * P, P, 4 * P)
    assert device.maps[2 * P] == (2 * P, -1, 3)
    container.start_tracking(destination.dirty)
    container.dma_write(2 * P - 2, b"0123")
    assert bytes(bars.data[:2]) == b"23"
    assert container.dma_read(2 * P - 2, 4) == b"0123"
    assert destination.round() == {1}
    device.log.mark(2 * P, P)
    device.log.mark(100 * P, P)
    device.write(4 * P)
    found = container.sync()
    assert (found.logged_pages, found.bar_hits, found.stale_bits) == (1, 1, 0)
    assert destination.round() == {4}
    assert container.unmap(2 * P, 2 * P) == 2 * P and destination.round() == set()
    with fails(errno.EINVAL):
        container.map(2 * P, P, bars.base + 0x10000)


def test_bits_that_lead_nowhere_are_counted(ram, destination):
    device = Device("a", ram, unmap_bitmap=False, outlives=True)
    container = container_of(ram, device, viommu=Viommu(48))
    for iova in (0, 2 * P):
        container.map(iova, P, iova)
    container.start_tracking(destination.dirty)
    device.log.mark(P, P)
    assert container.sync().stale_bits == 1 and destination.round() == set()


# -- what a migration and a verifier want to know


def test_delta_begins_with_all_and_goes_on_with_changes(ram):
    container = container_of(ram, Device("a", ram))
    first = container.map(0, P, 0)
    with fails(errno.ENODATA):
        container.take_delta()
    container.begin_delta()
    second = container.map(P, P, P)
    assert container.take_delta().added == (first, second)
    container.unmap(0, P)
    delta = container.take_delta()
    assert (delta.removed, delta.added) == ((first,), ())
    container.end_delta()
    with fails(errno.ENODATA):
        container.take_delta()


def test_who_could_have_written_a_page(ram, destination):
    now = [0.0]
    container = container_of(ram, Device("nic0", ram), Device("nvme0", ram), clock=lambda: now[0])
    container.map(8 * P, 2 * P, 3 * P)
    assert container.could_have_written(4) == []
    container.start_tracking(destination.dirty)
    now[0] = 5.0
    container.unmap(8 * P, 2 * P)
    container.map(16 * P, P, 4 * P)
    container.stop_tracking()
    assert container.could_have_written(4) == [
        ("nic0", 9 * P, None, 5.0),
        ("nvme0", 9 * P, None, 5.0),
        ("nic0", 16 * P, 5.0, None),
        ("nvme0", 16 * P, 5.0, None),
    ]
