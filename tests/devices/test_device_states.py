"""The state machine of a device in every state of every flag set: what is legal there, and what fails on the way."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import product

import pytest

from common.devices.knobs import Knobs, OneTimeFaults
from common.devices.migration import Migration
from common.devices.stream import DeviceMemory, RecordFormat
from common.vfio.migration import (
    PRECOPY_STATES,
    SAVING_STATES,
    DeviceState,
    InvalidTransition,
    MigrationFlags,
    path,
    supported,
)

S = DeviceState
FLAG_SETS = [1, 3, 5, 7]
CELLS = [
    (flags, start, target)
    for flags in FLAG_SETS
    for start, target in product(S, S)
    if supported(start, MigrationFlags(flags))
]
PAGE = 4096


class Registers:
    """All that a device is, beside its memory."""

    def __init__(self) -> None:
        self.state = b"registers"

    def save_state(self) -> bytes:
        return self.state

    def load_state(self, state: bytes) -> None:
        self.state = state


def device_in(state: DeviceState, flags: int, faults: tuple[str, ...] = ()) -> Migration:
    """Return a device that has come to a state, and then is told to fail; one in RESUMING has been given a state."""
    knobs = Knobs(migration_flags=flags)
    device = Migration(Registers(), RecordFormat(b"identity", DeviceMemory(2 * PAGE)), knobs, OneTimeFaults("it", ()))
    device.set_state(state)
    if state is S.RESUMING:
        source = Migration(
            Registers(), RecordFormat(b"identity", DeviceMemory(2 * PAGE)), knobs, OneTimeFaults("it", ())
        )
        source.set_state(S.STOP_COPY)
        device.write(bytes(source.read(1 << 20)))
    device._faults = OneTimeFaults("it", faults)
    return device


def refused(call: Callable[[], object]) -> int | None:
    """Return the errno of a call, 0 if it was answered."""
    try:
        call()
    except OSError as error:
        return error.errno
    return 0


def check_what_is_legal(device: Migration) -> None:
    in_precopy, saving = device.state in PRECOPY_STATES, device.state in SAVING_STATES
    assert refused(device.precopy_info) == (0 if in_precopy else errno.EINVAL)
    assert refused(lambda: device.read(1)) == (0 if saving else errno.EINVAL)
    assert refused(lambda: device.write(b"")) == (0 if device.state is S.RESUMING else errno.EINVAL)
    assert device.stop_copy_length() > 0


@pytest.mark.parametrize(("flags", "start", "target"), CELLS)
def test_every_request_from_every_state(flags: int, start: DeviceState, target: DeviceState) -> None:
    device = device_in(start, flags)
    check_what_is_legal(device_in(start, flags))
    try:
        path(start, target, MigrationFlags(flags))
    except InvalidTransition:
        assert refused(lambda: device.set_state(target)) == errno.EINVAL
        assert device.state is start
    else:
        device.set_state(target)
        assert device.state is target
    check_what_is_legal(device)


@pytest.mark.parametrize(("flags", "start", "target"), CELLS)
def test_what_fails_on_the_way_leaves_the_device_where_it_got_to(
    flags: int, start: DeviceState, target: DeviceState
) -> None:
    if not supported(target, MigrationFlags(flags)) or (start is S.STOP_COPY and target in PRECOPY_STATES):
        return
    way = path(start, target, MigrationFlags(flags))
    for index, step in enumerate(way):
        device = device_in(start, flags, (f"fail:{step.name}",))
        assert refused(lambda device=device: device.set_state(target)) == errno.EIO  # type: ignore[misc]
        assert device.state is (start, *way)[index]
        check_what_is_legal(device)
        device.set_state(target)
        assert device.state is target


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_a_device_in_error_says_its_length_and_nothing_else_until_it_is_reset(flags: int) -> None:
    device = device_in(S.RUNNING, flags)
    device.set_state(S.RESUMING)
    assert refused(lambda: device.set_state(S.RUNNING)) == errno.EINVAL  # nothing was loaded
    assert device.state is S.ERROR
    for target in S:
        assert refused(lambda target=target: device.set_state(target)) == errno.EINVAL  # type: ignore[misc]
    assert device.state is S.ERROR
    check_what_is_legal(device)
    device.reset()
    assert device.state is S.RUNNING
    check_what_is_legal(device)


@pytest.mark.parametrize("flags", [5, 7])
def test_initial_bytes_only_decrease_and_dirty_bytes_come_and_go(flags: int) -> None:
    device = device_in(S.PRE_COPY, flags)
    assert isinstance(device._format, RecordFormat)
    memory = device._format.memory
    assert memory is not None
    before = device.precopy_info()
    assert before.initial_bytes > 2 * PAGE and before.dirty_bytes == 0
    while before.initial_bytes:
        read = len(device.read(1000))
        info = device.precopy_info()
        assert info.initial_bytes == before.initial_bytes - read and info.dirty_bytes == 0
        before = info
    assert not len(device.read(1000))
    memory.write(0, b"x")
    grown = device.precopy_info()
    assert grown.initial_bytes == 0 < grown.dirty_bytes
    # What pre-copy has not moved yet is in what STOP_COPY would bring.
    length = device.stop_copy_length()
    assert length > grown.dirty_bytes
    read = len(device.read(1 << 20))
    assert read == grown.dirty_bytes and device.stop_copy_length() == length - read
    device.set_state(S.STOP_COPY)
    left = device.stop_copy_length()
    assert len(device.read(1 << 20)) == left == length - read
    assert not len(device.read(1)) and device.stop_copy_length() == 0
