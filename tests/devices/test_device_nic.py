from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from device_rig import Rig

from common.datasheets import nic, pattern, pci
from common.devices.nic import Nic, NicKnobs
from common.vfio.migration import DeviceState

BUFFERS = 0x10000
PEER = 0xFE00_0000


def buffers(count: int, size: int = 2048, first: int = 0) -> list[tuple[int, ...]]:
    return [(BUFFERS + (first + n) * size, size, 0, 0, 0, 0) for n in range(count)]


def test_fills_posted_buffers_in_order(rig: Callable[..., Rig]) -> None:
    device = rig("nic", rate=1e9)
    device.set_up()
    device.enable(16)
    device.post(*buffers(12))
    device.wait_head(12)
    assert device.interrupted()
    for n, entry in enumerate(device.ring()[:12]):
        at = BUFFERS + n * 2048
        data = device.ram.mmap[at : at + 1500]
        assert (entry["done"], entry["sequence"], entry["length"]) == (1, n, 1500)
        assert data == pattern.block(n, 1500)
        assert entry["checksum"] == zlib.crc32(data)
        assert device.ram.mmap[at + 1500 : at + 2048] == bytes(548)
    assert device.read(nic.SEQUENCE, 8) == 12


def test_goes_round_the_ring_and_never_beyond_what_is_posted(rig: Callable[..., Rig]) -> None:
    device = rig("nic", rate=1e9, packet=64)
    device.set_up()
    device.enable(4)
    for lap in range(5):
        device.post(*buffers(3, first=lap))
        device.wait_head(3 * lap + 3)
    assert sorted(device.ring()["sequence"].tolist()) == [11, 12, 13, 14]
    assert device.read(pci.STATUS) == pci.STATUS_ENABLED


def test_a_smaller_buffer_gets_a_smaller_packet(rig: Callable[..., Rig]) -> None:
    device = rig("nic", rate=1e9, packet=1500)
    device.set_up()
    device.enable(2)
    device.post((BUFFERS, 100, 0, 0, 0, 0))
    device.wait_head(1)
    assert device.ring()["length"][0] == 100
    assert device.ram.mmap[BUFFERS : BUFFERS + 101] == pattern.block(0, 100) + b"\0"


@pytest.mark.parametrize("size", [0, 63, (64 << 10) + 1])
def test_refuses_buffers_of_impossible_size(rig: Callable[..., Rig], size: int) -> None:
    device = rig("nic", rate=1e9)
    device.set_up()
    device.enable(2)
    device.post((BUFFERS, size, 0, 0, 0, 0))
    device.wait_head(1)
    assert device.ring()["done"][0] == 2
    assert device.read(pci.FAULTS) == 0


def test_a_refused_packet_is_not_lost(rig: Callable[..., Rig]) -> None:
    device = rig("nic", rate=1e9)
    device.set_up()
    device.enable(4)
    device.post((0xDEAD_0000, 2048, 0, 0, 0, 0), *buffers(1))
    device.wait_head(2)
    assert device.ring()["done"][:2].tolist() == [2, 1]
    assert device.ring()["sequence"][1] == 0
    assert device.read(pci.FAULTS) == 1
    assert device.read(pci.STATUS) == pci.STATUS_ENABLED | pci.STATUS_FAULT


def peer_of(device: Rig, size: int, writes: list[tuple[int, bytes]]) -> None:
    device.client.on_dma_write = lambda iova, data: writes.append((iova, bytes(data)))
    device.write(nic.PEER_BASE, PEER, 8)
    device.write(nic.PEER_SIZE, size)


def test_writes_round_the_peers_window_by_message(rig: Callable[..., Rig]) -> None:
    device = rig("nic")
    device.set_up()
    writes: list[tuple[int, bytes]] = []
    peer_of(device, 2 * nic.PEER_BLOCK, writes)
    device.write(pci.CONTROL, nic.CONTROL_PEER)
    device.wait(lambda: len(writes) >= 5)
    for n, (iova, data) in enumerate(writes[:5]):
        assert iova == PEER + n % 2 * nic.PEER_BLOCK
        assert data == pattern.block(n, nic.PEER_BLOCK)
    device.write(pci.CONTROL, 0)
    device.wait(lambda: device.read(nic.PEER_SEQUENCE, 8) == len(writes))


@pytest.mark.parametrize("size", [0, 100])
def test_an_impossible_window_is_a_fault_and_ends_the_writes(rig: Callable[..., Rig], size: int) -> None:
    device = rig("nic")
    device.set_up()
    peer_of(device, size, [])
    device.write(pci.CONTROL, nic.CONTROL_PEER)
    device.wait(lambda: device.read(pci.FAULTS) == 1)
    assert device.read(pci.CONTROL) == 0


def test_writes_to_no_peer_in_the_p2p_states(rig: Callable[..., Rig]) -> None:
    device = rig("nic", rate=1e9)
    device.set_up()
    device.enable(16)
    writes: list[tuple[int, bytes]] = []
    peer_of(device, 256, writes)
    device.write(pci.CONTROL, pci.CONTROL_ENABLE | nic.CONTROL_PEER)
    device.wait(lambda: len(writes) > 0)
    for state in (DeviceState.RUNNING_P2P, DeviceState.PRE_COPY_P2P):
        device.client.set_state(state)
        before = len(writes)
        # DMA to memory goes on meanwhile, for longer than it takes until the next write to the peer.
        for _ in range(10):
            device.post(*buffers(1))
            device.wait_head(device.tail)
        assert len(writes) == before
        assert device.read(nic.PEER_SEQUENCE, 8) == before
    device.client.set_state(DeviceState.RUNNING)
    device.wait(lambda: len(writes) > before)
    assert writes[before][1] == pattern.block(before, nic.PEER_BLOCK)


def test_a_buffer_reached_by_message_waits_in_the_p2p_states(rig: Callable[..., Rig]) -> None:
    device = rig("nic", rate=1e9)
    device.set_up()
    device.enable(4)
    writes: list[tuple[int, bytes]] = []
    device.client.on_dma_write = lambda iova, data: writes.append((iova, bytes(data)))
    device.client.set_state(DeviceState.RUNNING_P2P)
    device.post(*buffers(1), (PEER, 1500, 0, 0, 0, 0))
    device.wait_head(1)
    assert writes == []
    device.client.set_state(DeviceState.RUNNING)
    device.wait_head(2)
    assert writes == [(PEER, pattern.block(1, 1500))]


def test_writes_to_an_accelerators_memory_while_both_run(rig: Callable[..., Rig]) -> None:
    device, peer = rig("nic"), rig("accelerator", memory=1 << 20)
    device.set_up()
    device.client.on_dma_write = lambda iova, data: peer.client.region_write(2, iova - PEER, data)
    device.write(nic.PEER_BASE, PEER, 8)
    device.write(nic.PEER_SIZE, 4096)
    device.write(pci.CONTROL, nic.CONTROL_PEER)
    device.wait(lambda: device.read(nic.PEER_SEQUENCE, 8) >= 20)
    device.client.set_state(DeviceState.RUNNING_P2P)
    written = device.read(nic.PEER_SEQUENCE, 8)
    for sequence in range(written - 16, written):
        assert peer.client.region_read(2, sequence % 16 * 256, 256) == pattern.block(sequence, 256)


def test_two_devices_that_write_to_each_other_do_not_block(rig: Callable[..., Rig]) -> None:
    first, second = rig("nic"), rig("nic")
    for device, other in ((first, second), (second, first)):
        device.set_up()
        device.client.on_dma_write = lambda _iova, data, other=other: other.client.region_write(4, 0, data)
        device.write(nic.PEER_BASE, PEER, 8)
        device.write(nic.PEER_SIZE, 256)
        device.write(pci.CONTROL, nic.CONTROL_PEER)
    first.wait(lambda: all(device.read(nic.PEER_SEQUENCE, 8) >= 50 for device in (first, second)))


@pytest.mark.parametrize("rate", [1e3, 2e7, 1e9])
def test_the_rate_is_kept_and_pauses_are_not_made_up_for(rate: float) -> None:
    device = Nic("nic0", NicKnobs(rate=rate, packet=1000))
    burst = max(rate * 0.01, 1000)
    now, packets = 100.0, 0
    device.allowance(1 << 20, now)
    device._credit = 0.0
    while now < 110:
        allowed, delay = device.allowance(1 << 20, now)
        assert allowed > 0 or delay > 0
        packets += allowed
        device._credit -= allowed * 1000
        now += max(delay, 0.001)
    assert 10 * rate - burst <= packets * 1000 <= 10 * rate + burst
    assert device.allowance(1 << 20, now + 3600)[0] * 1000 <= burst
