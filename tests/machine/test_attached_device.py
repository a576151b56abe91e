from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common.machine import device as device_module
from common.machine.device import AttachedDevice, Digest, Pending, Saved
from common.machine.device_config import DeviceSpec
from common.machine.device_process import StartedDevice
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.capabilities import Extension
from common.vfio_user.client import VfioUserClient
from common.vfio_user.description import IrqInfo

CONFIG = device_module.CONFIG_REGION
ALL = int(MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY)


class FakeClient:
    """A device of two BARs, one of which cannot be read, three vectors and two doorbells."""

    def __init__(self) -> None:
        self.migration_flags = ALL
        self.dma_logging = True
        self.regions = [
            SimpleNamespace(index=0, size=4096, flags=1),
            SimpleNamespace(index=1, size=0, flags=1),
            SimpleNamespace(index=2, size=(1 << 20) + 8, flags=3),
            SimpleNamespace(index=4, size=64, flags=2),
            SimpleNamespace(index=CONFIG, size=256, flags=3),
        ]
        self.irqs = [IrqInfo(0, 1, 1), IrqInfo(2, 1, 3)]
        self.contents = {0: bytearray(b"z" * 4096), 2: bytearray(os.urandom((1 << 20) + 8)), CONFIG: bytearray(256)}
        self.doorbells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.extension: Extension | None = Extension(comparable_dump=False)
        self.dump = [b"abc", b"de"]
        self.refused: set[DeviceState] = set()
        self.states: list[DeviceState] = []
        self.resets = 0
        self.irq_fds: Sequence[int] = ()
        self.irq_calls: list[tuple[int, int, int, int]] = []
        self.closed = False

    def get_region_io_fds(self, _: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(fd=fd) for fd in self.doorbells]

    def set_irqs(self, index: int, flags: int, start: int, count: int, *, fds: Sequence[int] = ()) -> None:
        self.irq_calls.append((index, flags, start, count))
        self.irq_fds = fds

    def set_state(self, state: DeviceState) -> None:
        self.states.append(state)
        if state in self.refused:
            raise OSError(errno.EIO, f"no {state.name}")

    def reset(self) -> None:
        self.resets += 1

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        assert 0 < size <= 1 << 20
        return bytes(self.contents[index][offset : offset + size])

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        self.contents[index][offset : offset + len(data)] = data

    def mig_data_read(self, _: int) -> bytes:
        return self.dump.pop(0) if self.dump else b""

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def attach(client: FakeClient, **told: Any) -> AttachedDevice:
    started = StartedDevice("nic0", Path("nic0.sock"), None)
    return AttachedDevice(DeviceSpec("nic0", "nic", **told), cast("VfioUserClient", client), started)


@pytest.fixture
def device(client: FakeClient) -> Iterator[AttachedDevice]:
    made = attach(client)
    yield made
    made.close()
    assert client.closed


def test_what_is_there(device: AttachedDevice, client: FakeClient) -> None:
    assert device.bar_sizes == {0: 4096, 2: (1 << 20) + 8, 4: 64}
    assert client.irq_calls == [(2, 0x24, 0, 3)]  # MSI-X, eventfds, trigger
    assert list(client.irq_fds) == device.interrupts and len(device.interrupts) == 3
    assert device.migration_flags == MigrationFlags(ALL)


@pytest.mark.parametrize("size", [0, 63, 4097, 1 << 60])
def test_a_device_without_a_configuration_space_is_none(client: FakeClient, size: int) -> None:
    client.regions[-1].size = size
    with pytest.raises(OSError, match=f"nic0: its configuration space has {size} bytes, that of a PCI device has from"):
        attach(client)
    del client.regions[-1]
    with pytest.raises(OSError, match="nic0: its configuration space has 0 bytes"):
        attach(client)


def test_a_device_that_was_told_not_to_does_not_migrate(client: FakeClient) -> None:
    device = attach(client, migration="off")
    assert device.migration_flags == 0
    device.enter(DeviceState.STOP)  # it has no states
    assert client.states == []
    device.close()


def test_changes_state_once(device: AttachedDevice, client: FakeClient) -> None:
    device.enter(DeviceState.STOP)
    device.enter(DeviceState.STOP)
    assert client.states == [DeviceState.STOP] and device.state is DeviceState.STOP


def test_a_refused_change_goes_to_where_it_can_recover(device: AttachedDevice, client: FakeClient) -> None:
    client.refused = {DeviceState.STOP_COPY}
    with pytest.raises(OSError, match="no STOP_COPY"):
        device.enter(DeviceState.STOP_COPY, recover=DeviceState.STOP)
    assert client.states == [DeviceState.STOP_COPY, DeviceState.STOP]
    assert device.state is DeviceState.STOP and client.resets == 0


def test_who_is_late_does_not_take_a_device_away(device: AttachedDevice, client: FakeClient) -> None:
    device.enter(DeviceState.STOP_COPY)
    device.enter(DeviceState.STOP, only_from=DeviceState.STOP_COPY)
    device.enter(DeviceState.STOP, only_from=DeviceState.STOP_COPY)  # it is there
    device.enter(DeviceState.RUNNING)
    with pytest.raises(OSError, match="nic0: is in RUNNING, not in STOP_COPY"):
        device.enter(DeviceState.STOP, recover=DeviceState.STOP, only_from=DeviceState.STOP_COPY)
    client.extension = Extension()
    with pytest.raises(OSError, match="nic0: is in RUNNING, not in STOP"):
        device.digest()
    assert client.states == [DeviceState.STOP_COPY, DeviceState.STOP, DeviceState.RUNNING]
    assert device.state is DeviceState.RUNNING and not client.resets


@pytest.mark.parametrize("recover", [DeviceState.ERROR, DeviceState.STOP])
def test_what_cannot_recover_is_reset(device: AttachedDevice, client: FakeClient, recover: DeviceState) -> None:
    client.refused = {DeviceState.STOP_COPY, DeviceState.STOP}
    with pytest.raises(OSError, match="no STOP_COPY"):  # the first error, not the second
        device.enter(DeviceState.STOP_COPY, recover)
    assert client.states == [DeviceState.STOP_COPY, DeviceState.STOP][: 1 + (recover is DeviceState.STOP)]
    assert client.resets == 1 and device.state is DeviceState.RUNNING


def chain(client: FakeClient, *capabilities: tuple[int, int, int]) -> None:
    """Lay out (offset, id, next) capabilities."""
    client.contents[CONFIG][0x06] |= 1 << 4
    client.contents[CONFIG][0x34] = capabilities[0][0]
    for offset, identity, following in capabilities:
        client.contents[CONFIG][offset : offset + 2] = bytes([identity, following])


def test_enabling_is_what_a_driver_does(device: AttachedDevice, client: FakeClient) -> None:
    chain(client, (0x40, 0x01, 0x50), (0x50, 0x11, 0))
    client.contents[CONFIG][0x52:0x54] = b"\x02\x00"
    device.guest_enable()
    config = client.contents[CONFIG]
    assert config[0x04:0x06] == b"\x06\x00" and config[0x52:0x54] == b"\x02\x80"


def test_a_chain_of_capabilities_that_loops_has_an_end(device: AttachedDevice, client: FakeClient) -> None:
    chain(client, (0x40, 0x01, 0x50), (0x50, 0x05, 0x40))
    device.guest_enable()
    assert client.contents[CONFIG][0x04:0x06] == b"\x06\x00"


def test_restores_what_software_may_write_and_nothing_else(device: AttachedDevice, client: FakeClient) -> None:
    chain(client, (0x40, 0x05, 0x50), (0x50, 0x11, 0))
    client.contents[CONFIG][0x42] = 0x80  # MSI with 64 bits of address
    saved = bytes(
        number % 255 + 1 if number not in (0x06, 0x34, *range(0x40, 0x44), 0x50, 0x51) else value
        for number, value in enumerate(client.contents[CONFIG])
    )
    device.restore_config(saved)
    config = device.config_space()
    restored = {offset for offset in range(256) if config[offset] == saved[offset]}
    written = {4, 5, 0x0C, 0x0D, *range(0x10, 0x28), *range(0x30, 0x34), 0x3C, *range(0x44, 0x4E), 0x52, 0x53}
    assert restored == written | {0x06, 0x34, *range(0x40, 0x44), 0x50, 0x51}


def test_what_is_there_already_is_not_written(device: AttachedDevice, client: FakeClient) -> None:
    saved = device.config_space()
    client.region_write = None  # type: ignore[assignment,method-assign]  # a call would fail
    device.restore_config(saved)


# A device that somebody else serves


def test_a_device_of_others_is_not_taken_to_precopy_unless_told(client: FakeClient) -> None:
    client.extension = None
    device = attach(client)
    assert device.migration_flags == MigrationFlags.STOP_COPY | MigrationFlags.P2P
    assert any("PRE_COPY is not used" in note for note in device.notes)
    assert any("how much state it has is not known" in note for note in device.notes)
    device.close()
    told = attach(client, pre_copy="on")
    assert told.migration_flags == MigrationFlags(ALL)
    told.close()


def test_interrupts_are_the_best_that_there_are(client: FakeClient) -> None:
    client.irqs = [IrqInfo(0, 1 | 1 << 2, 1), IrqInfo(1, 1, 2)]
    device = attach(client)
    assert client.irq_calls == [(1, 0x24, 0, 2)] and not device.masks_itself
    device.close()


def test_an_interrupt_that_masks_itself_is_unmasked(client: FakeClient) -> None:
    client.irqs = [IrqInfo(0, 1 | 1 << 2, 1)]
    device = attach(client)
    device.unmask()
    assert client.irq_calls == [(0, 0x24, 0, 1), (0, 0x11, 0, 1)]
    device.close()


def test_a_device_without_ioeventfds(client: FakeClient) -> None:
    def refuse(_: int) -> list[SimpleNamespace]:
        raise OSError(errno.EINVAL, "bad region")

    client.get_region_io_fds = refuse  # type: ignore[method-assign]
    device = attach(client)
    assert device.doorbells == []
    device.close()


def test_only_the_bars_that_were_named_are_compared(client: FakeClient) -> None:
    device = attach(client, compare_bars=(2,))
    assert device.digest().bars == (xxhash.xxh3_64_intdigest(bytes(client.contents[2])),)
    device.close()


def test_what_is_pending_twice_is_signalled_once() -> None:
    assert Pending((0, 2), (1,)) | Pending((2, 1)) == Pending((0, 1, 2), (1,))
    assert Pending() | Pending((), (0,)) == Pending((), (0,))


@settings(deadline=None)
@given(st.sets(st.integers(0, 2)), st.sets(st.integers(0, 1)))
def test_what_was_pending_is_taken_once_and_signalled_again(vectors: set[int], doorbells: set[int]) -> None:
    client = FakeClient()
    device = attach(client)
    for vector in vectors:
        os.eventfd_write(device.interrupts[vector], 3)
    for doorbell in doorbells:
        os.eventfd_write(client.doorbells[doorbell], 1)
    pending = device.drain()
    assert pending == Pending(tuple(sorted(vectors)), tuple(sorted(doorbells)))
    assert device.drain() == Pending()
    device.signal(pending)
    assert device.drain() == pending
    device.close()


def test_a_doorbell_that_blocks_and_was_not_rung_is_not_waited_for(client: FakeClient) -> None:
    for doorbell in client.doorbells:
        os.set_blocking(doorbell, True)
    device = attach(client)
    os.eventfd_write(client.doorbells[1], 1)
    drained: list[Pending] = []
    thread = threading.Thread(target=lambda: drained.append(device.drain()), daemon=True)
    thread.start()
    thread.join(20)
    assert drained == [Pending((), (1,))]
    device.close()


def test_a_doorbell_is_an_eventfd(client: FakeClient) -> None:
    theirs, other = os.pipe()
    client.doorbells.append(theirs)
    with pytest.raises(OSError, match="nic0: a descriptor that it gives as a doorbell is no eventfd"):
        attach(client)
    for doorbell in client.doorbells:
        with pytest.raises(OSError):
            os.fstat(doorbell)  # closed
    os.close(other)


def test_a_digest_reads_all_that_can_be_read(device: AttachedDevice, client: FakeClient) -> None:
    digest = device.digest()
    assert digest.config == xxhash.xxh3_64_intdigest(bytes(client.contents[CONFIG]))
    assert digest.bars == tuple(xxhash.xxh3_64_intdigest(bytes(client.contents[index])) for index in (0, 2))
    assert digest.dump == 0 and digest.compared and client.states == []
    client.contents[2][-1] ^= 1
    assert device.digest().bars[1] != digest.bars[1]


def test_a_digest_of_more_than_is_wanted_is_that_of_the_config_space(
    device: AttachedDevice, client: FakeClient
) -> None:
    size = len(client.contents[0]) + len(client.contents[2])
    assert device.digest(size) == device.digest() and device.digest(size).compared
    digest = device.digest(size - 1)
    assert digest == Digest(device.digest().config, (), 0, compared=False)


def test_a_digest_of_a_dump_leaves_the_device_in_stop(device: AttachedDevice, client: FakeClient) -> None:
    client.extension = Extension()
    device.enter(DeviceState.STOP)
    assert device.digest().dump == xxhash.xxh3_64_intdigest(b"abcde")
    assert client.states == [DeviceState.STOP, DeviceState.STOP_COPY, DeviceState.STOP]
    assert device.state is DeviceState.STOP


def test_reads_say_which_session_they_are_of(device: AttachedDevice, client: FakeClient) -> None:
    assert device.read_saved(5) == Saved(0, b"", ended=True)  # and the device was not asked
    device.enter(DeviceState.PRE_COPY)
    device.enter(DeviceState.PRE_COPY_P2P)
    assert device.read_saved(5) == Saved(1, b"abc", ended=False)
    device.enter(DeviceState.STOP)
    assert device.read_saved(5) == Saved(0, b"", ended=True)
    device.enter(DeviceState.STOP_COPY)
    assert device.read_saved(5) == Saved(2, b"de", ended=True)
    device.reset()
    assert (device.session, device.state) == (0, DeviceState.RUNNING)


@pytest.mark.parametrize(
    ("reads", "found"),
    [
        ([b"abcde", b""], [(b"abcde", False), (b"", True)]),  # as much as was asked for tells nothing
        ([b"abc", b""], [(b"abc", True)]),
        ([b"abc", b"de", b""], [(b"abcde", False), (b"", True)]),
        ([b"a", b"b", b"c", b""], [(b"ab", False), (b"c", True)]),
        ([b""], [(b"", True)]),
    ],
)
def test_in_stop_copy_only_nothing_is_the_end(
    device: AttachedDevice, client: FakeClient, reads: list[bytes], found: list[tuple[bytes, bool]]
) -> None:
    client.dump = reads
    device.enter(DeviceState.STOP_COPY)
    assert [(bytes(saved.data), saved.ended) for saved in (device.read_saved(5) for _ in found)] == found


def test_what_kept_a_device_out_of_a_session_is_told_by_the_read(device: AttachedDevice) -> None:
    device.failure = OSError(errno.EIO, "no PRE_COPY")
    with pytest.raises(OSError, match="no PRE_COPY"):
        device.read_saved(5)


def test_each_change_is_told_once(device: AttachedDevice, client: FakeClient) -> None:
    told: list[tuple[str, DeviceState]] = []
    device.on_state = lambda name, state: told.append((name, state))
    client.refused = {DeviceState.STOP_COPY}
    device.enter(DeviceState.STOP)
    with pytest.raises(OSError, match="no STOP_COPY"):
        device.enter(DeviceState.STOP_COPY, recover=DeviceState.STOP)
    device.reset()
    assert told == [("nic0", DeviceState.STOP), ("nic0", DeviceState.RUNNING)]


def test_a_device_that_cannot_be_reset(
    device: AttachedDevice, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(errno.EIO, "no reset")

    monkeypatch.setattr(client, "reset", refuse)
    client.refused = {DeviceState.STOP}
    with pytest.raises(device_module.ResetFailedError, match="no STOP; no reset"):
        device.enter(DeviceState.STOP)
