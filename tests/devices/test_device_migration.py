from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from device_rig import Memory, Rig

from common.datasheets import nic, pattern, pci
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.client import DeviceError

S = DeviceState
BUFFERS = 0x10000
PAGE = 4096
KNOBS: dict[str, dict[str, Any]] = {
    "nic": {"rate": 1e9},
    "nvme": {"blocks": 4096, "latency_us": 0},
    "accelerator": {"memory": 4 << 20, "churn": 1e8},
}
KINDS = sorted(KNOBS)
PRECOPY_KINDS = ["accelerator", "nic"]
WORK: dict[str, list[tuple[int, ...]]] = {
    "nic": [(BUFFERS + n * 2048, 2048, 0, 0, 0, 0) for n in range(3)],
    "nvme": [(2, 1, 9, BUFFERS, 0, 0), (1, 2, 8, BUFFERS + 8 * PAGE, 0, 0)],
    "accelerator": [(1, 5000, 100, BUFFERS, 0, 0), (2, 300, 200, 0, 0x5A, 0), (3, 5000, 100, BUFFERS + 0x8000, 0, 0)],
}


def working(rig: Callable[..., Rig], kind: str, memory: Memory | None = None, **knobs: Any) -> Rig:
    """Return a device that has done some work, and has left traces everywhere in its state."""
    device = rig(kind, memory, **(KNOBS[kind] | knobs))
    device.set_up()
    device.enable(8)
    device.ram.mmap[BUFFERS : BUFFERS + PAGE] = pattern.block(9 << 24 | 77, PAGE)
    device.client.region_write(4, 0, bytes(range(16)))
    device.post(*WORK[kind], (0, 1, 0, 0xDEAD_0000, 0, 0) if kind != "nic" else (0xDEAD_0000, 64, 0, 0, 0, 0))
    device.wait_head(len(WORK[kind]) + 1)
    return device


def refused(error: pytest.ExceptionInfo[DeviceError]) -> int | None:
    return error.value.errno


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_device_is_equal(rig: Callable[..., Rig], kind: str) -> None:
    source = working(rig, kind)
    state = source.dump()
    assert source.dump() == state
    target = rig(kind, **KNOBS[kind])
    target.load(state)
    assert target.dump() == state
    for region in (0, 4):
        assert target.client.region_read(region, 0, PAGE) == source.client.region_read(region, 0, PAGE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dump_does_not_depend_on_how_it_is_read(rig: Callable[..., Rig], kind: str) -> None:
    source = working(rig, kind)
    state = source.dump()
    source.client.set_state(S.STOP_COPY)
    assert source.drain(70_001) == state


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_device_goes_on_where_the_other_stopped(rig: Callable[..., Rig], kind: str) -> None:
    source = working(rig, kind)
    state = source.dump()
    target = rig(kind, **KNOBS[kind])
    target.load(state)
    # What the VMM carries over, beside the state.
    target.client.region_write(7, 0, source.client.region_read(7, 0, 256))
    assert target.client.region_read(7, 0, 256) == source.client.region_read(7, 0, 256)
    target.client.set_state(S.RESUMING)
    target.map_ram()
    target.client.mig_data_write(state)
    target.client.set_state(S.RUNNING)
    target.size, target.tail, target.base = source.size, source.tail, source.base
    target.post(*WORK[kind])
    target.wait_head(source.tail + len(WORK[kind]))
    done = slice(source.tail, source.tail + len(WORK[kind]))
    if kind == "nic":
        assert target.ring()["sequence"][done].tolist() == [3, 4, 5]
    else:
        assert target.ring()["status"][done].tolist() == [1] * len(WORK[kind])


@pytest.mark.parametrize("kind", PRECOPY_KINDS)
@pytest.mark.parametrize("share", [0, 40, 5_000_000])
def test_precopy_then_stop_copy_gives_an_equal_device(rig: Callable[..., Rig], kind: str, share: int) -> None:
    source = working(rig, kind)
    source.client.set_state(S.PRE_COPY)
    stream = b""
    while len(stream) < share and (part := bytes(source.client.mig_data_read(share - len(stream)))):
        stream += part
    if kind == "accelerator":
        source.client.region_write(2, 12345, b"written meanwhile")
    source.client.set_state(S.PRE_COPY_P2P)
    stream += bytes(source.client.mig_data_read(1000))
    source.client.set_state(S.STOP_COPY)
    announced = source.client.stop_copy_length()
    rest = source.drain()
    assert len(rest) == announced
    target = rig(kind, **KNOBS[kind])
    target.load(stream + rest)
    source.client.set_state(S.STOP)
    assert target.dump() == source.dump()


@pytest.mark.parametrize("kind", KINDS)
def test_stop_copy_length_is_what_comes(rig: Callable[..., Rig], kind: str) -> None:
    source = working(rig, kind)
    source.client.set_state(S.STOP)
    announced = source.client.stop_copy_length()
    source.client.set_state(S.STOP_COPY)
    assert source.client.stop_copy_length() == announced
    first = bytes(source.client.mig_data_read(60))
    assert source.client.stop_copy_length() == announced - len(first)
    assert len(first + source.drain()) == announced
    assert source.client.stop_copy_length() == 0


def test_precopy_info_says_what_can_be_read(rig: Callable[..., Rig]) -> None:
    source = rig("accelerator", memory=4 << 20, churn=0)
    with pytest.raises(DeviceError) as running:
        source.client.precopy_info()
    assert refused(running) == errno.EINVAL
    source.client.set_state(S.PRE_COPY)
    info = source.client.precopy_info()
    assert info.initial_bytes > 4 << 20 and info.dirty_bytes == 0
    initial = info.initial_bytes
    for size in (10, 40, 100_000, 500_000):
        assert len(source.client.mig_data_read(size)) == size
        initial -= size
        assert source.client.precopy_info().initial_bytes == initial
    # Not read yet, so it comes with the initial data; the other one has been read.
    source.client.region_write(2, (2 << 20) - 10, b"x" * 10)
    assert source.client.precopy_info().dirty_bytes == 0
    source.client.region_write(2, 3 * PAGE - 1, b"yz")
    assert source.client.precopy_info().dirty_bytes == 2 * PAGE + 32
    source.client.region_write(2, 9 * PAGE, b"w")
    info = source.client.precopy_info()
    assert info.dirty_bytes == 3 * PAGE + 64
    assert info.initial_bytes == initial
    assert len(source.drain()) == info.initial_bytes + info.dirty_bytes
    info = source.client.precopy_info()
    assert (info.initial_bytes, info.dirty_bytes) == (0, 0)


def test_what_is_dirtied_while_its_record_is_read_comes_again(rig: Callable[..., Rig]) -> None:
    source, target = (rig("accelerator", memory=1 << 20, churn=0) for _ in range(2))
    source.client.set_state(S.PRE_COPY)
    stream = bytes(source.client.mig_data_read(5000))
    source.client.region_write(2, 16, b"behind the reader")
    source.client.region_write(2, 100_000, b"before the reader")
    stream += source.drain()
    assert source.client.precopy_info().dirty_bytes == 0
    source.client.set_state(S.STOP_COPY)
    target.load(stream + source.drain())
    assert target.client.region_read(2, 16, 17) == b"behind the reader"
    assert target.client.region_read(2, 100_000, 17) == b"before the reader"


def test_nothing_now_is_no_error_in_precopy(rig: Callable[..., Rig]) -> None:
    source = rig("nic")
    source.client.set_state(S.PRE_COPY)
    assert source.client.precopy_info().initial_bytes > 0
    assert source.drain()
    assert len(source.client.mig_data_read(100)) == 0
    source.client.set_state(S.STOP_COPY)
    assert source.drain()


def test_an_aborted_session_leaves_nothing_behind(rig: Callable[..., Rig]) -> None:
    source = working(rig, "accelerator", churn=0)
    source.client.set_state(S.PRE_COPY)
    first = source.drain()
    source.client.set_state(S.RUNNING)
    with pytest.raises(DeviceError) as closed:
        source.client.mig_data_read(100)
    assert refused(closed) == errno.EINVAL
    source.client.set_state(S.PRE_COPY)
    assert source.drain() == first
    source.client.set_state(S.RUNNING)
    state = source.dump()
    target = rig("accelerator", **(KNOBS["accelerator"] | {"churn": 0}))
    target.load(state)
    assert target.dump() == state


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_device_does_nothing(rig: Callable[..., Rig], kind: str) -> None:
    device = working(rig, kind)
    device.client.set_state(S.STOP)
    state = device.dump()
    image = device.ram.mmap[BUFFERS:]
    device.post(*WORK[kind], ring_doorbell=False)
    assert device.dump() == state
    assert device.ram.mmap[BUFFERS:] == image


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moved", [False, True])
def test_a_doorbell_that_rings_while_the_device_is_stopped_is_not_lost(
    rig: Callable[..., Rig], kind: str, moved: bool
) -> None:
    device = working(rig, kind)
    device.wait(lambda: not device.device._ring.attention)
    device.client.set_state(S.STOP)
    device.post(*WORK[kind])
    if moved:
        state = device.dump()
        config = device.client.region_read(7, 0, 256)
        tail, size, base = device.tail, device.size, device.base
        device = rig(kind, **KNOBS[kind])
        device.set_up()
        device.client.region_write(7, 0, config)
        device.load(state)
        device.tail, device.size, device.base = tail, size, base
    device.client.set_state(S.RUNNING)
    device.wait_head(device.tail)
    assert device.interrupted()


def test_a_start_of_the_ring_that_the_device_has_not_obeyed_moves_with_it(rig: Callable[..., Rig]) -> None:
    source, target = (rig("nic", rate=1e9) for _ in range(2))
    source.client.set_state(S.STOP)
    source.write(pci.RING_BASE, 0x1000, 8)
    source.write(pci.RING_ENTRIES, 4)
    source.write(pci.CONTROL, pci.CONTROL_ENABLE)
    assert source.read(pci.STATUS) == 0
    target.set_up()
    target.load(source.dump())
    target.client.set_state(S.RUNNING)
    target.wait(lambda: target.read(pci.STATUS) == pci.STATUS_ENABLED)


def damaged(state: bytes) -> list[tuple[str, bytes]]:
    return [
        ("nothing", b""),
        ("short", state[:-1]),
        ("half", state[: len(state) // 2]),
        ("long", state + b"\0"),
        ("twice", state + state),
        ("magic", b"\0" + state[1:]),
        ("version", state[:4] + b"\x09" + state[5:]),
        ("unknown record", state[:6] + b"\x63" + state[7:]),
        ("identity", state[:32] + b"\xff" + state[33:]),
        ("registers", state[:-30] + b"\xff" + state[-29:]),
        ("no identity", state[48:]),
        ("huge", state[:16] + b"\xff" * 8 + state[24:]),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_is_refused_on_leaving_resuming(rig: Callable[..., Rig], kind: str) -> None:
    source, target = working(rig, kind), rig(kind, **KNOBS[kind])
    state = source.dump()
    fresh = target.dump() if kind != "accelerator" else b""
    target.client.set_state(S.RUNNING)
    for what, data in damaged(state):
        target.client.set_state(S.RESUMING)
        target.client.mig_data_write(data)
        with pytest.raises(DeviceError) as invalid:
            target.client.set_state(S.STOP)
        assert refused(invalid) == errno.EINVAL, what
        assert target.client.get_state() == S.ERROR, what
        with pytest.raises(DeviceError):
            target.client.set_state(S.RUNNING)
        target.client.reset()
        assert target.client.get_state() == S.RUNNING
    if fresh:
        assert target.dump() == fresh
    target.load(state)
    assert target.dump() == state


@pytest.mark.parametrize(
    ("kind", "knobs"), [("nvme", {}), ("accelerator", {"memory": 8 << 20}), ("accelerator", {"memory": 2 << 20})]
)
def test_another_devices_state_is_refused(rig: Callable[..., Rig], kind: str, knobs: dict[str, Any]) -> None:
    source = rig("accelerator", **KNOBS["accelerator"])
    target = rig(kind, **(KNOBS[kind] | knobs))
    target.client.set_state(S.RESUMING)
    target.client.mig_data_write(source.dump())
    with pytest.raises(DeviceError):
        target.client.set_state(S.STOP)


def test_memory_that_has_not_come_is_missed(rig: Callable[..., Rig]) -> None:
    source, target = (rig("accelerator", memory=4 << 20, churn=0) for _ in range(2))
    source.client.set_state(S.PRE_COPY)
    stream = source.drain()
    source.client.set_state(S.STOP_COPY)
    rest = source.drain()
    record = (1 << 20) + 32
    target.client.set_state(S.RESUMING)
    target.client.mig_data_write(stream[:48] + stream[48 + record :] + rest)
    with pytest.raises(DeviceError):
        target.client.set_state(S.STOP)


@pytest.mark.parametrize(
    ("flags", "target", "through"),
    [
        (1, S.STOP_COPY, [S.STOP, S.STOP_COPY]),
        (3, S.STOP_COPY, [S.RUNNING_P2P, S.STOP, S.STOP_COPY]),
        (5, S.PRE_COPY, [S.PRE_COPY]),
        (7, S.PRE_COPY_P2P, [S.RUNNING_P2P, S.PRE_COPY_P2P]),
        (7, S.RESUMING, [S.RUNNING_P2P, S.STOP, S.RESUMING]),
    ],
)
def test_goes_step_by_step_as_its_flags_have_it(
    rig: Callable[..., Rig], flags: int, target: DeviceState, through: list[DeviceState]
) -> None:
    # Fails once on each step: what is left between is the way.
    device = rig("nic", migration_flags=flags, faults=[f"fail:{step.name}" for step in through])
    seen = []
    for _ in through:
        with pytest.raises(DeviceError) as failed:
            device.client.set_state(target)
        assert refused(failed) == errno.EIO
        seen.append(device.client.get_state())
    assert seen == [S.RUNNING, *through[:-1]]
    device.client.set_state(target)
    assert device.client.get_state() == target


@pytest.mark.parametrize(
    ("flags", "state", "target"),
    [
        (7, S.STOP_COPY, S.PRE_COPY),
        (7, S.STOP_COPY, S.PRE_COPY_P2P),
        (7, S.RUNNING, S.ERROR),
        (3, S.RUNNING, S.PRE_COPY),
        (1, S.RUNNING, S.RUNNING_P2P),
        (5, S.RUNNING, S.PRE_COPY_P2P),
    ],
)
def test_refuses_ways_that_there_are_not(
    rig: Callable[..., Rig], flags: int, state: DeviceState, target: DeviceState
) -> None:
    device = rig("nic", migration_flags=flags)
    device.client.set_state(state)
    with pytest.raises(DeviceError) as no_way:
        device.client.set_state(target)
    assert refused(no_way) == errno.EINVAL
    assert device.client.get_state() == state


def test_data_are_read_and_written_only_where_they_flow(rig: Callable[..., Rig]) -> None:
    device = rig("nic")
    for state in (S.RUNNING, S.RUNNING_P2P, S.STOP):
        device.client.set_state(state)
        with pytest.raises(DeviceError):
            device.client.mig_data_read(100)
        with pytest.raises(DeviceError):
            device.client.mig_data_write(b"data")
    device.client.set_state(S.RESUMING)
    with pytest.raises(DeviceError):
        device.client.mig_data_read(100)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("nic", 7), ("nvme", 3), ("accelerator", 7)],
)
def test_each_kind_has_its_flags(rig: Callable[..., Rig], kind: str, flags: int) -> None:
    assert rig(kind).client.migration_flags == MigrationFlags(flags)


def test_a_device_that_cannot_be_migrated_says_so(rig: Callable[..., Rig]) -> None:
    device = rig("nic", migration_flags=0)
    assert device.client.migration_flags == 0
    assert not device.client.dma_logging


def test_the_fault_fail_load_refuses_a_good_state(rig: Callable[..., Rig]) -> None:
    source, target = rig("nic"), rig("nic", faults=["fail_load"], load_delay_ms=1)
    target.client.set_state(S.RESUMING)
    target.client.mig_data_write(source.dump())
    with pytest.raises(DeviceError) as invalid:
        target.client.set_state(S.STOP)
    assert refused(invalid) == errno.EINVAL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", [S.PRE_COPY, S.RESUMING, S.RUNNING_P2P])
def test_reset_returns_to_the_beginning(rig: Callable[..., Rig], kind: str, state: DeviceState) -> None:
    device = working(rig, kind, migration_flags=7, **({"churn": 0} if kind == "accelerator" else {}))
    device.client.set_state(state)
    device.client.reset()
    assert device.client.get_state() == S.RUNNING
    assert device.read(pci.STATUS) == 0
    assert device.read(pci.FAULTS) == 0
    if kind == "nic":
        assert device.read(nic.SEQUENCE, 8) == 0
    device.enable(8)
    device.post(*WORK[kind])
    device.wait_head(len(WORK[kind]))
