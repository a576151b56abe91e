"""Device migration states and the steps between them.

A device changes state only when it is told to, and a request for a state that is not next to the present one is carried
out step by step. `_NEXT` is the whole state machine: its cell says which single step to take towards a target, for a
device that has every state; a device that lacks the step's state takes the step after it.

    RESUMING ── STOP ── RUNNING_P2P ── RUNNING
                 │           │            │
                 │      PRE_COPY_P2P ── PRE_COPY
                 │           ▼
                 └────── STOP_COPY

Every line but the arrow goes both ways. Data streams open and close on these single steps too.
"""

from __future__ import annotations

import errno
from enum import IntEnum, IntFlag
from typing import Final, Literal

__all__ = [
    "PRECOPY_STATES",
    "RUNNING_STATES",
    "SAVING_STATES",
    "DeviceState",
    "InvalidTransition",
    "MigrationFlags",
    "closes_stream",
    "next_state",
    "opens_stream",
    "path",
    "supported",
]


class DeviceState(IntEnum):
    """State of a device's migration (kernel: enum vfio_device_mig_state)."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


class MigrationFlags(IntFlag):
    """What a device's migration can do (kernel: VFIO_MIGRATION_*); 0 is a device that cannot be migrated."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class InvalidTransition(OSError):  # noqa: N818 - named as the kernel names what EINVAL means here
    """The device has no way from its state to the one asked for (errno EINVAL)."""

    def __init__(self, current: DeviceState, target: DeviceState) -> None:
        super().__init__(errno.EINVAL, f"no way from {current.name} to {target.name}")


PRECOPY_STATES: Final = frozenset({DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P})
"""The device runs and its state can be read."""

SAVING_STATES: Final = PRECOPY_STATES | {DeviceState.STOP_COPY}
"""The device's state can be read; moving between these continues one stream."""

RUNNING_STATES: Final = PRECOPY_STATES | {DeviceState.RUNNING, DeviceState.RUNNING_P2P}
"""The device may change its state and do DMA; in the P2P ones it initiates none to peers."""

_E = DeviceState.ERROR
_STOP = DeviceState.STOP
_RUN = DeviceState.RUNNING
_COPY = DeviceState.STOP_COPY
_RESUME = DeviceState.RESUMING
_RUN_P2P = DeviceState.RUNNING_P2P
_PRE = DeviceState.PRE_COPY
_PRE_P2P = DeviceState.PRE_COPY_P2P

# Rows: present state; columns: target; both in the order of DeviceState. ERROR means that there is no way: nobody may
# ask for ERROR, only a reset leaves it, and from STOP_COPY nobody goes back to PRE_COPY.
_NEXT: Final = (
    # ERROR STOP      RUNNING   STOP_COPY RESUMING  RUN_P2P   PRE_COPY  PRE_COPY_P2P
    (_E, _E, _E, _E, _E, _E, _E, _E),  # ERROR
    (_E, _STOP, _RUN_P2P, _COPY, _RESUME, _RUN_P2P, _RUN_P2P, _RUN_P2P),  # STOP
    (_E, _RUN_P2P, _RUN, _RUN_P2P, _RUN_P2P, _RUN_P2P, _PRE, _RUN_P2P),  # RUNNING
    (_E, _STOP, _STOP, _COPY, _STOP, _STOP, _E, _E),  # STOP_COPY
    (_E, _STOP, _STOP, _STOP, _RESUME, _STOP, _STOP, _STOP),  # RESUMING
    (_E, _STOP, _RUN, _STOP, _STOP, _RUN_P2P, _RUN, _PRE_P2P),  # RUNNING_P2P
    (_E, _RUN, _RUN, _PRE_P2P, _RUN, _RUN, _PRE, _PRE_P2P),  # PRE_COPY
    (_E, _RUN_P2P, _RUN_P2P, _COPY, _RUN_P2P, _RUN_P2P, _PRE, _PRE_P2P),  # PRE_COPY_P2P
)

_REQUIRED: Final = {
    _STOP: MigrationFlags.STOP_COPY,
    _RUN: MigrationFlags.STOP_COPY,
    _COPY: MigrationFlags.STOP_COPY,
    _RESUME: MigrationFlags.STOP_COPY,
    _RUN_P2P: MigrationFlags.STOP_COPY | MigrationFlags.P2P,
    _PRE: MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY,
    _PRE_P2P: MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY,
}

_OPENS: Final[dict[tuple[DeviceState, DeviceState], Literal["read", "write"]]] = {
    (_RUN, _PRE): "read",
    (_RUN_P2P, _PRE_P2P): "read",
    (_STOP, _COPY): "read",
    (_STOP, _RESUME): "write",
}
_CLOSES: Final = frozenset({(_PRE, _RUN), (_PRE_P2P, _RUN_P2P), (_COPY, _STOP), (_RESUME, _STOP)})


def supported(state: DeviceState, flags: MigrationFlags) -> bool:
    """Tell whether a device with `flags` has `state`; ERROR is no state that anybody may ask for or leave."""
    required = _REQUIRED.get(state)
    return required is not None and flags & required == required


def next_state(current: DeviceState, target: DeviceState, flags: MigrationFlags) -> DeviceState:
    """Return the next single step from `current` to `target` (`target` itself once it is reached).

    Raise `InvalidTransition` if either state is not supported or the way is blocked (STOP_COPY to PRE_COPY*).
    Source: kernel: vfio_mig_get_next_state, with its fix for blocked ways, which else never return.
    """
    if not (supported(current, flags) and supported(target, flags)):
        raise InvalidTransition(current, target)
    step = _NEXT[current][target]
    while step is not DeviceState.ERROR and not supported(step, flags):
        step = _NEXT[step][target]
    if step is DeviceState.ERROR:
        raise InvalidTransition(current, target)
    return step


def path(current: DeviceState, target: DeviceState, flags: MigrationFlags) -> tuple[DeviceState, ...]:
    """Return the steps from `current` to `target`: without the first, with the last, empty if they are the same.

    Raise `InvalidTransition` as `next_state` does.
    """
    steps = []
    state = next_state(current, target, flags)
    while state is not current:
        steps.append(state)
        current, state = state, next_state(state, target, flags)
    return tuple(steps)


def opens_stream(previous: DeviceState, state: DeviceState) -> Literal["read", "write"] | None:
    """Return the direction, seen from the user, of the data stream that this single step opens, or None."""
    return _OPENS.get((previous, state))


def closes_stream(previous: DeviceState, state: DeviceState) -> bool:
    """Tell whether this single step ends the data stream; leaving RESUMING is what commits what was written."""
    return (previous, state) in _CLOSES
