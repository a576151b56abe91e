"""The state of a device as it moves: read, written, cut off, given up."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import numpy.typing as npt

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import CONFIG_REGION, SAFE_CHUNK, Device
from common.conformance.lab import Lab
from common.conformance.probe import name_of_error
from common.vfio.migration import DeviceState
from common.vfio_user.codec import MIG_DATA_SIZE, Command, MigData, RegionAccess

_TICK = 1.1  # seconds: what counts seconds has changed
_WORD = 8
_ODD_CHUNK = 1021
_ODD_STATE = 4 << 20  # bytes of a state up to which it is written in small pieces
_CONFIG_WORDS = range(4, 256, 4)


@check("In STOP_COPY MIG_DATA_READ gives the whole state; once nothing comes, nothing ever comes.")
def read_to_the_end(lab: Lab) -> str:
    """Read it, and beyond its end; `size` says how much of the answer counts, not how long the message is."""
    device = lab.device()
    device.need_migration()
    device.set_state(DeviceState.STOP_COPY)
    total = len(device.drain())
    for _ in range(3):
        if more := device.read_data():
            raise Failure(f"after the end {len(more)} more bytes came")
    reply = device.accepted(Command.MIG_DATA_READ, MigData(64).pack())
    padded = len(reply.body) == MIG_DATA_SIZE + 64
    return f"{total} bytes; answers are {'padded to what was asked for' if padded else 'as long as their data'}"


@check("MIG_DATA_READ asks for no more than a message may carry, and has room for it; anything else is refused.")
def read_limits(lab: Lab) -> None:
    """Ask for 2 GiB, and with an argsz that is too small."""
    device = lab.device()
    device.need_migration()
    device.set_state(DeviceState.STOP_COPY)
    huge = 0x7FFF_0000
    device.refused("MIG_DATA_READ of 2 GiB", Command.MIG_DATA_READ, MigData(huge).pack())
    small = (8).to_bytes(4, "little") + (64).to_bytes(4, "little")
    device.refused("MIG_DATA_READ of 64 bytes with argsz 8", Command.MIG_DATA_READ, small)
    device.drain()


@check("MIG_DATA_WRITE carries as much data as it says.")
def write_length(lab: Lab) -> None:
    """Write with less data than is said."""
    device = lab.device()
    device.need_migration()
    device.set_state(DeviceState.STOP)
    device.set_state(DeviceState.RESUMING)
    device.refused("MIG_DATA_WRITE of 64 bytes with 16", Command.MIG_DATA_WRITE, MigData(64).pack(), bytes(16))


@check("A state that was saved can be loaded by the same device, which is then as it was, and runs.")
def reload(lab: Lab) -> str:
    """Save it, reset the device, and load it again."""
    device = _prepared(lab)
    data = device.save()
    before = device.contents()
    time.sleep(_TICK)
    later = device.contents()
    device.set_state(DeviceState.RUNNING)
    device.ask(Command.DEVICE_RESET)  # so that what is there afterwards has come with the state
    device.load(data)
    words = _compared(before, device.contents(), later)
    device.set_state(DeviceState.RUNNING)
    return f"{len(data)} bytes; {words}"


@check("A state that was saved in STOP_COPY is loaded by another instance, which then reads the same.")
def move(lab: Lab) -> str:
    """Move it, compare what can be read, and let it run."""
    source = _prepared(lab)
    data = source.save()
    return _move(lab, source, data, SAFE_CHUNK)


@check("What PRE_COPY and then STOP_COPY give is one stream, which another instance takes as it comes.")
def move_with_pre_copy(lab: Lab) -> str:
    """Move it while it runs."""
    source = _prepared(lab)
    source.need_migration(DeviceState.PRE_COPY)
    source.set_state(DeviceState.PRE_COPY)
    early = source.drain()
    source.set_state(DeviceState.STOP_COPY)
    late = source.drain()
    source.set_state(DeviceState.STOP)
    return f"{len(early)} bytes in PRE_COPY, {len(late)} in STOP_COPY; {_move(lab, source, early + late, SAFE_CHUNK)}"


@check("A stream of bytes has no messages in it: it is written in other pieces than it was read in.")
def other_pieces(lab: Lab) -> str:
    """Move it in small pieces of an odd size."""
    source = _prepared(lab)
    data = source.save()
    # A large state would take long in small pieces, and a small one has to be cut too.
    chunk = min(_ODD_CHUNK, len(data) // 3 | 1) if len(data) <= _ODD_STATE else SAFE_CHUNK - 3
    return f"pieces of {chunk} bytes; {_move(lab, source, data, chunk)}"


@check("MIG_DATA_READ gives the next bytes of the state, whatever number of them is asked for at a time.")
def read_in_pieces(lab: Lab) -> str:
    """Save it in pieces of odd sizes, and load it again."""
    device = _prepared(lab)
    device.set_state(DeviceState.STOP_COPY)
    parts = []
    for size in itertools.chain((1, 7, 64), itertools.repeat(_ODD_CHUNK)):
        if not (part := device.read_data(size)):
            break
        parts.append(part)
        if sum(map(len, parts)) > _ODD_STATE:
            raise Unknown(f"the state is larger than {_ODD_STATE >> 20} MiB, which would take long in small pieces")
    device.set_state(DeviceState.STOP)
    device.load(b"".join(parts))
    return f"{sum(map(len, parts))} bytes in {len(parts)} pieces"


@check("A migration that is cancelled in PRE_COPY leaves the device running as if nothing had happened.")
def cancel_pre_copy(lab: Lab) -> str:
    """Go there and back."""
    device = _prepared(lab)
    device.need_migration(DeviceState.PRE_COPY)
    return _cancelled(device, DeviceState.PRE_COPY, DeviceState.RUNNING)


@check("A migration that is cancelled in STOP_COPY, however much was read, leaves a device that runs on as it was.")
def cancel_stop_copy(lab: Lab) -> str:
    """Go there and back."""
    device = _prepared(lab)
    return _cancelled(device, DeviceState.STOP_COPY, DeviceState.STOP, DeviceState.RUNNING)


def _cancelled(device: Device, saving: DeviceState, *back: DeviceState) -> str:
    """Cancel before anything is read, and in the midst; compare the device with what it was, and save it in full."""
    before = device.contents()
    time.sleep(_TICK)
    later = device.contents()
    for reads in (0, 1):
        device.set_state(saving)
        for _ in range(reads):
            device.read_data(64)
        for state in back:
            device.set_state(state)
    words = _compared(before, device.contents(), later)
    return f"{words}; then {len(device.save())} bytes are saved"


@check("Leaving RESUMING is where a device says whether it has a whole state: one that is cut off is refused.")
def truncated_data(lab: Lab) -> str:
    """Load half a state; then find a way back to RUNNING."""
    device = lab.device()
    device.need_migration()
    data = device.save()
    return _cut_off(device, data, len(data) // 2)


@check("A state that PRE_COPY began is whole with all that STOP_COPY gives: one that is cut off there is refused.")
def truncated_pre_copy(lab: Lab) -> str:
    """Load what came in PRE_COPY and half of what came in STOP_COPY; then find a way back to RUNNING."""
    device = lab.device()
    device.need_migration(DeviceState.PRE_COPY)
    device.set_state(DeviceState.PRE_COPY)
    early = device.drain()
    late = device.save()
    return _cut_off(device, early + late, len(early) + len(late) // 2)


def _cut_off(device: Device, data: bytes, count: int) -> str:
    device.set_state(DeviceState.RESUMING)
    device.write_data(data[:count])
    error = device.try_state(DeviceState.STOP)
    if not error:
        raise Failure(f"{count} of {len(data)} bytes are taken for a state")
    state = device.get_state()
    if device.ask(Command.DEVICE_RESET).error:
        raise Unknown(f"refused with {name_of_error(error)}; then in {state.name}, where DEVICE_RESET is refused")
    if (now := device.get_state()) is not DeviceState.RUNNING:
        device.set_state(DeviceState.RUNNING)
    return f"refused with {name_of_error(error)}; {state.name}, after a reset {now.name}"


@check("Whatever is written in RESUMING, a device takes it or refuses it, and goes on to answer.")
def senseless_data(lab: Lab) -> str:
    """Load as many random bytes as a state has."""
    device = lab.device()
    device.need_migration()
    size = min(len(device.save()), 1 << 20)
    data = random.Random(4).randbytes(size)
    device.set_state(DeviceState.RESUMING)
    for offset in range(0, size, SAFE_CHUNK):
        part = data[offset : offset + SAFE_CHUNK]
        if error := device.ask(Command.MIG_DATA_WRITE, MigData(len(part)).pack(), part).error:
            device.get_state()
            return f"refused with {name_of_error(error)}"
    error = device.try_state(DeviceState.STOP)
    state = device.get_state()
    if error:
        return f"refused with {name_of_error(error)}; then in {state.name}"
    raise Unknown("random bytes are taken for a state: nothing in it tells them apart")


def _prepared(lab: Lab) -> Device:
    device = lab.device()
    device.need_migration()
    lab.scribble(device)
    return device


def _move(lab: Lab, source: Device, data: bytes, chunk: int) -> str:
    """Load a state in a second instance, and compare it with the source, which is in STOP."""
    before = source.contents()
    config = source.config(0, 256)
    with lab.second() as target:
        if target.migration_flags != source.migration_flags:
            raise Failure(
                f"two instances have migration flags {int(source.migration_flags)} and {int(target.migration_flags)}"
            )
        target.load(data, chunk)
        # Configuration space is moved by the machine, not by the device.
        other = target.config(0, 256)
        for offset in _CONFIG_WORDS:
            if config[offset : offset + 4] != other[offset : offset + 4]:
                access = RegionAccess(offset, CONFIG_REGION, 4).pack()
                target.ask(Command.REGION_WRITE, access, config[offset : offset + 4])
        other = target.config(0, 256)
        for offset in (0, *_CONFIG_WORDS):
            if config[offset : offset + 4] != other[offset : offset + 4]:
                raise Failure(f"configuration space differs at 0x{offset:x}")
        words = _compared(before, target.contents(), source.contents())
        target.set_state(DeviceState.RUNNING)
    return f"{len(data)} bytes; {words}"


def _compared(before: dict[int, bytes], moved: dict[int, bytes], later: dict[int, bytes]) -> str:
    """Compare regions, except for words that changed by themselves between `before` and `later`."""
    changing = 0
    for index, data in before.items():
        now, last = moved.get(index), later.get(index)
        if now is None or last is None or not len(now) == len(data) == len(last):
            raise Failure(f"region {index} can be read no more")
        first, there, second = (_words(part) for part in (data, now, last))
        differing = np.flatnonzero((first != there) & (first == second))
        if differing.size:
            at = int(differing[0])
            raise Failure(
                f"region {index} differs at 0x{at * _WORD:x}: 0x{int(first[at]):x} before, 0x{int(there[at]):x} after"
            )
        changing += int((first != second).sum())
    regions = ", ".join(map(str, before)) or "none"
    return f"regions compared: {regions}" + (f" without {changing} words that change" if changing else "")


def _words(data: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(data.ljust(-(-len(data) // _WORD) * _WORD, b"\0"), "<u8")
