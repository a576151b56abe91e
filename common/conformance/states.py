"""The states of a device's migration, and every way between two of them."""

from __future__ import annotations

import errno
from functools import partial

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import Device, parsed
from common.conformance.lab import Lab
from common.conformance.probe import Hung, Lost, name_of_error
from common.vfio import feature as vfio
from common.vfio.feature import DeviceFeature
from common.vfio.migration import (
    PRECOPY_STATES,
    SAVING_STATES,
    DeviceState,
    InvalidTransition,
    MigrationFlags,
    path,
    supported,
)
from common.vfio_user.codec import FEATURE_SIZE, Command, Feature, MigData

_STATES = [state for state in DeviceState if state is not DeviceState.ERROR]
_IN_ORDER = (
    DeviceState.RUNNING,
    DeviceState.RUNNING_P2P,
    DeviceState.PRE_COPY,
    DeviceState.PRE_COPY_P2P,
    DeviceState.STOP_COPY,
    DeviceState.STOP,
    DeviceState.RESUMING,
)
_UNKNOWN_FEATURE = 0x7ABC


@check("MIGRATION tells what a device's migration can do: STOP_COPY at least, and P2P and PRE_COPY perhaps.")
def flags(lab: Lab) -> str:
    """Get them."""
    device = lab.device()
    request = Feature(FEATURE_SIZE + 8, DeviceFeature.MIGRATION | vfio.FEATURE_GET).pack()
    reply = device.ask(Command.DEVICE_FEATURE, request)
    if reply.error:
        raise Unknown(f"the device has no feature MIGRATION: {name_of_error(reply.error)}")
    found = int.from_bytes(reply.body[FEATURE_SIZE : FEATURE_SIZE + 8], "little")
    if not found & MigrationFlags.STOP_COPY:
        raise Failure(f"migration flags 0x{found:x} are without STOP_COPY, without which nothing can be moved")
    if found & ~7:
        raise Failure(f"migration flags 0x{found:x}: nobody knows them all")
    return " ".join(flag.name or "" for flag in MigrationFlags(found))


@check("PROBE tells whether a feature is there, and in this direction; one that is not there is refused.")
def probe(lab: Lab) -> None:
    """Probe both directions of the migration features."""
    device = lab.device()
    _ask_probe(device, _UNKNOWN_FEATURE, 0, there=False)
    device.need_migration()
    for number, operation, there in (
        (DeviceFeature.MIGRATION, vfio.FEATURE_GET, True),
        (DeviceFeature.MIGRATION, vfio.FEATURE_SET, False),
        (DeviceFeature.MIG_DEVICE_STATE, vfio.FEATURE_GET, True),
        (DeviceFeature.MIG_DEVICE_STATE, vfio.FEATURE_SET, True),
    ):
        _ask_probe(device, number, operation, there=there)


def _ask_probe(device: Device, number: int, operation: int, *, there: bool) -> None:
    request = Feature(FEATURE_SIZE, number | operation | vfio.FEATURE_PROBE).pack()
    error = device.ask(Command.DEVICE_FEATURE, request).error
    if bool(error) == there:
        direction = {vfio.FEATURE_GET: " to get", vfio.FEATURE_SET: " to set"}.get(operation, "")
        raise Failure(f"a probe of feature {number}{direction} is {'refused' if error else 'not refused'}")


@check("A DEVICE_FEATURE says one of GET and SET, and has room for its answer; anything else is refused.")
def feature_requests(lab: Lab) -> None:
    """Ask for both, for none, and with too little room."""
    device = lab.device()
    device.need_migration()
    state = DeviceFeature.MIG_DEVICE_STATE
    payload = vfio.pack_device_state(DeviceState.RUNNING)
    for what, argsz, operation in (
        ("with GET and SET", FEATURE_SIZE + 8, vfio.FEATURE_GET | vfio.FEATURE_SET),
        ("with neither GET nor SET", FEATURE_SIZE + 8, 0),
        ("of a state with argsz 8", FEATURE_SIZE, vfio.FEATURE_GET),
    ):
        request = Feature(argsz, state | operation).pack()
        device.refused(f"a DEVICE_FEATURE {what}", Command.DEVICE_FEATURE, request, payload)


@check("A device begins in RUNNING.")
def initial(lab: Lab) -> None:
    """Look before anything has been done."""
    device = lab.device()
    device.need_migration()
    if device.state is not DeviceState.RUNNING:
        raise Failure(f"it begins in {device.state.name}")


@check("A state that a device has not, and ERROR, cannot be asked for: EINVAL, and the device stays where it is.")
def no_such_state(lab: Lab) -> None:
    """Ask for ERROR, for numbers that are no states, and for states that the flags exclude."""
    device = lab.device()
    found = device.need_migration()
    for state in (0, 8, 9, 0x7FFF_FFFF, *(state for state in _STATES if not supported(state, found))):
        error = device.try_state(state)
        _refused_arc(device, DeviceState.RUNNING, f"state {state}", error)


def _refused_arc(device: Device, before: DeviceState, target: str, error: int) -> None:
    if not error:
        raise Failure(f"{before.name} to {target} is not refused")
    if (now := device.get_state()) is not before:
        raise Failure(f"{before.name} to {target} is refused, and the device is in {now.name}")
    if error != errno.EINVAL:
        raise Failure(f"{before.name} to {target} is refused with {name_of_error(error)}, not EINVAL")


def _arcs_from(start: DeviceState, lab: Lab) -> str:
    device = lab.device()
    device.need_migration(start)
    problems: list[str] = []
    targets = [state for state in _STATES if supported(state, device.migration_flags)]
    tried: list[str] = []
    for number, target in enumerate(targets):
        try:
            if number and not _home(device):
                device = lab.restart()
            device.go(start)
            if start in SAVING_STATES:
                device.drain()
            tried.append(_arc(device, start, target))
        except (Failure, Lost, Hung) as error:
            fate = lab.fate() if isinstance(error, Lost) else None
            problems.append(f"to {target.name}: {fate or error}")
    if problems:
        raise Failure(f"from {start.name} {'; '.join(problems)}")
    return f"to {', '.join(tried)}"


def _home(device: Device) -> bool:
    """Bring the device back to RUNNING, and tell whether it is there."""
    try:
        if device.try_state(DeviceState.RUNNING):
            device.ask(Command.DEVICE_RESET)
        return device.get_state() is DeviceState.RUNNING
    except (Failure, Lost, Hung):
        return False


def _arc(device: Device, start: DeviceState, target: DeviceState) -> str:
    try:
        path(start, target, device.migration_flags)
    except InvalidTransition:
        _refused_arc(device, start, target.name, device.try_state(target))
        return f"{target.name} (refused)"
    device.set_state(target)
    return target.name


for _start in _STATES:
    check(
        f"From {_start.name} a device goes to every state that it has, step by step where they are not neighbours"
        + ("; only back to PRE_COPY there is no way (EINVAL)." if _start is DeviceState.STOP_COPY else "."),
        name=f"from-{_start.name.lower().replace('_', '-')}",
    )(partial(_arcs_from, _start))


@check("A device's state is read in PRE_COPY and STOP_COPY only, and written in RESUMING only; else EINVAL.")
def data_in_other_states(lab: Lab) -> None:
    """Read and write in every state where it is not possible, in the order in which a migration comes by them."""
    device = lab.device()
    found = device.need_migration()
    for state in (state for state in _IN_ORDER if supported(state, found)):
        device.set_state(state)
        if state in SAVING_STATES:
            device.drain()
        else:
            _invalid(device, f"MIG_DATA_READ in {state.name}", Command.MIG_DATA_READ, MigData(64).pack())
        if state is not DeviceState.RESUMING:
            _invalid(device, f"MIG_DATA_WRITE in {state.name}", Command.MIG_DATA_WRITE, MigData(64).pack(), bytes(64))


def _invalid(device: Device, what: str, command: int, *parts: bytes) -> None:
    error = device.refused(what, command, *parts)
    if error != errno.EINVAL:
        raise Failure(f"{what} is refused with {name_of_error(error)}, not EINVAL")


@check("A stopped device can be looked at: its regions are read in STOP, so that what was moved can be compared.")
def stopped_access(lab: Lab) -> str:
    """Read configuration space in STOP, and again in RUNNING."""
    device = lab.device()
    device.need_migration()
    before = device.config(0, 64)
    device.set_state(DeviceState.STOP)
    if device.config(0, 4) != before[:4]:
        raise Failure("configuration space reads differently in STOP")
    error = device.ask(Command.DEVICE_RESET).error
    if error:
        return f"DEVICE_RESET in STOP: {name_of_error(error)} (left open)"
    if (state := device.get_state()) is not DeviceState.RUNNING:
        raise Failure(f"after a reset in STOP the device is in {state.name}, not RUNNING")
    return "DEVICE_RESET in STOP: RUNNING"


@check("In PRE_COPY reading nothing means that there is nothing now, and not that anything is wrong, or at its end.")
def pre_copy_is_patient(lab: Lab) -> str:
    """Read in PRE_COPY until there is nothing, and on."""
    device = lab.device()
    device.need_migration(DeviceState.PRE_COPY)
    device.set_state(DeviceState.PRE_COPY)
    data = device.drain()
    for _ in range(4):
        device.read_data()
    if (state := device.get_state()) not in PRECOPY_STATES:
        raise Failure(f"reading brought the device to {state.name}")
    return f"{len(data)} bytes in PRE_COPY"


@check("MIGRATION is answered with as many bytes as it has, after the fixed part of DEVICE_FEATURE.")
def feature_answers(lab: Lab) -> None:
    """Look at the sizes of what GET brings, with more room than needed."""
    device = lab.device()
    device.need_migration()
    for number, size in ((DeviceFeature.MIGRATION, 8), (DeviceFeature.MIG_DEVICE_STATE, 8)):
        request = Feature(FEATURE_SIZE + 64, number | vfio.FEATURE_GET).pack()
        reply = device.accepted(Command.DEVICE_FEATURE, request)
        answer = parsed(Feature.unpack, reply.body)
        if len(reply.body) < FEATURE_SIZE + size or answer.flags & vfio.FEATURE_MASK != number:
            raise Failure(f"feature {number} is answered with {len(reply.body)} bytes for feature {answer.flags}")
