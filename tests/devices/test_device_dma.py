from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from device_rig import Memory, Rig

from common import hooks
from common.datasheets import pattern, pci
from common.vfio.feature import Range
from common.vfio.migration import DeviceState
from common.vfio_user.client import DeviceError
from common.vfio_user.codec import DMA_READABLE, DMA_WRITABLE

BUFFERS = 0x10000
PAGE = 4096


def dirty(words: np.ndarray | None) -> list[int]:
    assert words is not None
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def page_buffers(*pages: int) -> list[tuple[int, ...]]:
    return [(page * PAGE, 64, 0, 0, 0, 0) for page in pages]


def running_nic(rig: Callable[..., Rig], **knobs: object) -> Rig:
    device = rig("nic", rate=1e9, **knobs)
    device.set_up()
    device.enable(16)
    return device


def test_logs_what_it_has_written_and_reports_it_once(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    assert device.client.logging_start(PAGE, [Range(0, device.ram.size)]) == PAGE
    device.post(*page_buffers(40, 41, 300))
    device.wait_head(3)
    # The ring's page, too: entries are completed there.
    assert dirty(device.client.logging_report(0, device.ram.size, PAGE)) == [device.RING // PAGE, 40, 41, 300]
    assert dirty(device.client.logging_report(0, device.ram.size, PAGE)) == []


def test_reports_parts_of_its_ranges_and_nothing_beside_them(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    device.client.logging_start(PAGE, [Range(40 * PAGE, PAGE), Range(42 * PAGE, 8 * PAGE)])
    device.post(*page_buffers(40, 41, 42, 49, 50))
    device.wait_head(5)
    assert dirty(device.client.logging_report(42 * PAGE, 4 * PAGE, PAGE)) == [0]
    assert dirty(device.client.logging_report(0, device.ram.size, PAGE)) == [40, 49]


def test_its_log_is_as_strict_as_a_cards(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig, log_max_ranges=2, log_max_bits=20)
    with pytest.raises(DeviceError) as not_started:
        device.client.logging_report(0, PAGE, PAGE)
    assert not_started.value.errno == errno.EINVAL
    with pytest.raises(DeviceError) as too_many:
        device.client.logging_start(PAGE, [Range(n * 2 * PAGE, PAGE) for n in range(3)])
    assert too_many.value.errno == errno.E2BIG
    with pytest.raises(DeviceError) as too_large:
        device.client.logging_start(PAGE, [Range(0, 1 << 21)])
    assert too_large.value.errno == errno.EOPNOTSUPP
    device.client.logging_start(PAGE, [Range(0, 1 << 20)])
    with pytest.raises(DeviceError) as twice:
        device.client.logging_start(PAGE, [Range(0, 1 << 20)])
    assert twice.value.errno == errno.EINVAL
    device.post(*page_buffers(40))
    device.wait_head(1)
    device.client.logging_stop()
    device.client.logging_start(PAGE, [Range(0, 1 << 20)])
    assert dirty(device.client.logging_report(0, 1 << 20, PAGE)) == []


def test_a_device_without_a_log_says_so(rig: Callable[..., Rig]) -> None:
    assert not rig("nic", dma_logging=False).client.dma_logging


def test_the_fault_unlogged_writes_and_tells_nobody(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig, faults=["unlogged"])
    device.client.logging_start(PAGE, [Range(0, device.ram.size)])
    device.post(*page_buffers(40))
    device.wait_head(1)
    assert device.ram.mmap[40 * PAGE : 40 * PAGE + 64] == pattern.block(0, 64)
    assert dirty(device.client.logging_report(0, device.ram.size, PAGE)) == []


def test_unmap_returns_what_was_written_and_the_log_forgets_it(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    at = 1 << 32
    device.map_ram(at, 16 * PAGE, 32 * PAGE)
    device.client.logging_start(PAGE, [Range(0, device.ram.size), Range(at, 16 * PAGE)])
    device.post((at + 3 * PAGE + 4000, 200, 0, 0, 0, 0))
    device.wait_head(1)
    assert dirty(device.client.dma_unmap(at, 16 * PAGE, bitmap=True)) == [3, 4]
    assert dirty(device.client.logging_report(at, 16 * PAGE, PAGE)) == []
    assert device.ram.mmap[36 * PAGE - 96 : 36 * PAGE + 104] == pattern.block(0, 200)


def test_unmap_without_a_log_is_just_an_unmap(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    assert device.client.dma_unmap(0, device.ram.size, bitmap=True) is None
    with pytest.raises(DeviceError) as unmapped:
        device.client.dma_unmap(0, device.ram.size)
    assert unmapped.value.errno == errno.ENOENT


def test_the_iommu_sees_every_write_apart_from_the_devices_log(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig, faults=["unlogged"])
    client = device.client
    assert client.extension is not None and client.extension.iommu_dirty
    with pytest.raises(DeviceError) as not_started:
        client.iommu_dirty_report(0, PAGE, PAGE)
    assert not_started.value.errno == errno.EINVAL
    assert client.iommu_dirty_start(PAGE) == PAGE
    client.logging_start(PAGE, [Range(0, device.ram.size)])
    device.post(*page_buffers(40))
    device.wait_head(1)
    assert dirty(client.logging_report(0, device.ram.size, PAGE)) == []
    # A reset is the device's: its log is lost, the IOMMU's bits are not.
    client.reset()
    with pytest.raises(DeviceError):
        client.logging_report(0, PAGE, PAGE)
    assert dirty(client.iommu_dirty_report(0, device.ram.size, PAGE)) == [device.RING // PAGE, 40]
    assert dirty(client.iommu_dirty_report(0, device.ram.size, PAGE)) == []
    client.iommu_dirty_stop()
    with pytest.raises(DeviceError):
        client.iommu_dirty_report(0, PAGE, PAGE)


def test_the_iommus_bits_go_with_the_mapping(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    at = 1 << 32
    device.client.iommu_dirty_start(PAGE)
    for bitmap in (True, False):
        device.map_ram(at, 16 * PAGE, 32 * PAGE)
        device.post((at + 3 * PAGE, 64, 0, 0, 0, 0))
        device.wait_head(1 if bitmap else 2)
        words = device.client.dma_unmap(at, 16 * PAGE, bitmap=bitmap)
        assert words is None or dirty(words) == [3]
        assert dirty(device.client.iommu_dirty_report(at, 16 * PAGE, PAGE)) == []


def test_an_unmap_tells_what_either_log_knows(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    at = 1 << 32
    device.map_ram(at, 16 * PAGE, 32 * PAGE)
    device.client.logging_start(PAGE, [Range(at, 4 * PAGE)])
    device.post((at + 3 * PAGE, 64, 0, 0, 0, 0))
    device.wait_head(1)
    device.client.iommu_dirty_start(PAGE)
    device.post((at + 5 * PAGE, 64, 0, 0, 0, 0))
    device.wait_head(2)
    assert dirty(device.client.dma_unmap(at, 16 * PAGE, bitmap=True)) == [3, 5]


def test_requests_to_the_log_that_fail_once(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig, faults=["fail_logging_start", "fail_logging_report"])
    for ask in (
        lambda: device.client.logging_start(PAGE, [Range(0, device.ram.size)]),
        lambda: device.client.logging_report(0, PAGE, PAGE),
    ):
        with pytest.raises(DeviceError) as failed:
            ask()
        assert failed.value.errno == errno.EIO
        ask()


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that, while it is there, holds nic0 between a write and its mark."""
    monkeypatch.setattr(hooks, "_DIRECTORY", tmp_path)
    return tmp_path / "nic0-dma-written"


def held_device(rig: Callable[..., Rig], held: Path) -> Rig:
    device = running_nic(rig)
    device.map_ram(1 << 32, 16 * PAGE, 32 * PAGE)
    device.client.logging_start(PAGE, [Range(0, device.ram.size), Range(1 << 32, 16 * PAGE)])
    held.touch()
    device.post(((1 << 32) + PAGE, 64, 0, 0, 0, 0))
    device.wait(held.with_name(f"{held.name}.reached").exists)
    assert device.ram.mmap[33 * PAGE : 33 * PAGE + 64] == pattern.block(0, 64)
    return device


def test_unmap_waits_for_dma_and_its_mark(rig: Callable[..., Rig], held: Path) -> None:
    device = held_device(rig, held)
    answers: list[list[int]] = []
    unmap = threading.Thread(
        target=lambda: answers.append(dirty(device.client.dma_unmap(1 << 32, 16 * PAGE, bitmap=True)))
    )
    unmap.start()
    unmap.join(0.1)
    assert unmap.is_alive()
    held.unlink()
    unmap.join()
    assert answers == [[1]]


@pytest.mark.parametrize("state", [DeviceState.STOP, DeviceState.STOP_COPY])
def test_stop_waits_for_dma_and_its_mark(rig: Callable[..., Rig], held: Path, state: DeviceState) -> None:
    device = held_device(rig, held)
    stop = threading.Thread(target=device.client.set_state, args=(state,))
    stop.start()
    stop.join(0.1)
    assert stop.is_alive()
    held.unlink()
    stop.join()
    assert dirty(device.client.logging_report(1 << 32, 16 * PAGE, PAGE)) == [1]


def test_a_report_waits_for_the_mark_of_what_is_written(rig: Callable[..., Rig], held: Path) -> None:
    device = held_device(rig, held)
    reports: list[list[int]] = []
    report = threading.Thread(
        target=lambda: reports.append(dirty(device.client.logging_report(1 << 32, 16 * PAGE, PAGE)))
    )
    report.start()
    report.join(0.1)
    assert report.is_alive()
    held.unlink()
    report.join()
    assert reports == [[1]]


def test_an_unmapped_ring_halts_the_device_until_it_is_started_again(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    device.client.dma_unmap(0, device.ram.size)
    device.post(*page_buffers(40))
    device.wait(lambda: device.read(pci.STATUS) == pci.STATUS_FAULT)
    assert device.read(pci.FAULTS) == 1
    device.map_ram()
    device.write(pci.CONTROL, 0)
    device.enable(16)
    assert device.read(pci.STATUS) == pci.STATUS_ENABLED
    device.post(*page_buffers(40))
    device.wait_head(1)


@pytest.mark.parametrize(("entries", "base"), [(0, 0x1000), (12, 0x1000), (1 << 16, 0x1000), (16, 0x1008)])
def test_an_impossible_ring_is_a_fault(rig: Callable[..., Rig], entries: int, base: int) -> None:
    device = rig("nic")
    device.set_up()
    device.write(pci.RING_BASE, base, 8)
    device.write(pci.RING_ENTRIES, entries)
    device.write(pci.CONTROL, pci.CONTROL_ENABLE)
    device.wait(lambda: device.read(pci.STATUS) == pci.STATUS_FAULT)


def test_a_tail_beyond_the_ring_is_a_fault(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    device.ram.mmap[device.RING : device.RING + 4] = (17).to_bytes(4, "little")
    device.write(pci.DOORBELL, 1)
    device.wait(lambda: device.read(pci.STATUS) == pci.STATUS_FAULT)
    assert device.read(pci.HEAD) == 0


def test_permissions_of_mappings_are_kept(rig: Callable[..., Rig]) -> None:
    device = rig("nvme", blocks=16, latency_us=0)
    device.set_up()
    device.client.dma_map(1 << 32, PAGE, DMA_READABLE, device.ram.fd, 64 * PAGE)
    device.client.dma_map(2 << 32, PAGE, DMA_WRITABLE, device.ram.fd, 64 * PAGE)
    device.ram.mmap[64 * PAGE : 65 * PAGE] = pattern.block(1 << 24 | 5, PAGE)
    device.enable(8)
    device.post((2, 1, 1, 2 << 32, 0, 0), (1, 1, 0, 1 << 32, 0, 0))
    device.wait_head(2)
    assert device.ring()["status"][:2].tolist() == [3, 3]
    assert device.read(pci.FAULTS) == 2
    assert device.ram.mmap[64 * PAGE : 65 * PAGE] == pattern.block(1 << 24 | 5, PAGE)
    device.post((2, 1, 1, 1 << 32, 0, 0), (1, 1, 0, 2 << 32, 0, 0))
    device.wait_head(4)
    assert device.ring()["status"][2:4].tolist() == [1, 1]
    assert device.ram.mmap[64 * PAGE : 65 * PAGE] == pattern.block(0, PAGE)


def test_dma_crosses_mappings_and_goes_by_message_where_there_are_none(rig: Callable[..., Rig]) -> None:
    device = rig("nvme", blocks=16, latency_us=0)
    device.set_up()
    at = 1 << 32
    device.map_ram(at, PAGE, 100 * PAGE)
    device.client.dma_map(at + 2 * PAGE, PAGE, DMA_READABLE | DMA_WRITABLE)
    device.map_ram(at + 3 * PAGE, PAGE, 50 * PAGE)
    outside = bytearray(2 * PAGE)

    def write(iova: int, data: memoryview) -> None:
        outside[iova - at - PAGE : iova - at - PAGE + len(data)] = data

    device.client.on_dma_write = write
    device.client.on_dma_read = lambda iova, count: bytes(outside[iova - at - PAGE :][:count])
    device.client.logging_start(PAGE, [Range(at, 4 * PAGE)])
    device.enable(8)
    device.post((1, 4, 7, at, 0, 0))
    device.wait_head(1)
    blocks = [pattern.block(lba << 24, PAGE) for lba in range(7, 11)]
    assert device.ring()["status"][0] == 1
    assert device.ram.mmap[100 * PAGE : 101 * PAGE] == blocks[0]
    assert bytes(outside) == blocks[1] + blocks[2]
    assert device.ram.mmap[50 * PAGE : 51 * PAGE] == blocks[3]
    assert dirty(device.client.logging_report(at, 4 * PAGE, PAGE)) == [0, 1, 2, 3]
    device.post((2, 4, 7, at, 0, 0))
    device.wait_head(2)
    assert device.ring()["status"][1] == 1


def test_no_dma_without_bus_mastering(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    device.bus_master(on=False)
    device.post(*page_buffers(40))
    device.client.dma_unmap(0, device.ram.size)
    device.map_ram()
    assert device.read(pci.HEAD) == 0
    assert device.read(pci.FAULTS) == 0
    assert device.ram.mmap[40 * PAGE : 41 * PAGE] == bytes(PAGE)
    device.bus_master(on=True)
    device.wait_head(1)


def test_the_doorbell_is_an_eventfd_too(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    (doorbell,) = device.client.get_region_io_fds(0)
    assert doorbell.offset == pci.DOORBELL
    device.post(*page_buffers(40), ring_doorbell=False)
    os.eventfd_write(doorbell.fd, 1)
    os.close(doorbell.fd)
    device.wait_head(1)


def test_nobody_looks_at_the_ring_unless_the_doorbell_rings(rig: Callable[..., Rig]) -> None:
    device = running_nic(rig)
    device.post(*page_buffers(40))
    device.wait_head(1)
    assert device.interrupted()
    device.wait(lambda: not device.device._ring.attention)
    device.post(*page_buffers(41), ring_doorbell=False)
    device.bus_master(on=True)  # makes the engine step
    device.bus_master(on=True)
    assert device.read(pci.HEAD) == 1
    device.post(ring_doorbell=True)
    device.wait_head(2)


def test_memory_that_shrinks_under_a_device_is_a_fault_and_not_its_end(rig: Callable[..., Rig]) -> None:
    device = rig("nic", rate=1e9)
    device.set_up()
    device.enable(4)
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, PAGE)
    iova = device.ram.size
    device.client.dma_map(iova, PAGE, DMA_READABLE | DMA_WRITABLE, unsealed)
    device.post((iova, 64, 0, 0, 0, 0))
    device.wait_head(1)
    assert os.pread(unsealed, 64, 0) == pattern.block(0, 64)
    os.ftruncate(unsealed, 0)
    fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    device.post((iova, 64, 0, 0, 0, 0))
    device.wait_head(2)
    assert device.read(pci.FAULTS) == 1
    os.close(unsealed)


def test_gives_everything_back_when_its_client_goes(rig: Callable[..., Rig], ram: Memory) -> None:
    before = len(os.listdir("/proc/self/fd"))
    device = Rig("nic", ram, {})
    device.set_up()
    device.enable(4)
    device.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(device.device._mappings) == 0
