"""The transition table against a search of the graph of single steps, written down here once more and otherwise."""

import errno
from collections import deque
from itertools import product

import pytest

from common.vfio.migration import (
    PRECOPY_STATES,
    RUNNING_STATES,
    SAVING_STATES,
    DeviceState,
    InvalidTransition,
    MigrationFlags,
    closes_stream,
    next_state,
    opens_stream,
    path,
    supported,
)

S = DeviceState
FLAG_SETS = [MigrationFlags(value) for value in (1, 3, 5, 7)]
STREAM_READ = {(S.RUNNING, S.PRE_COPY), (S.RUNNING_P2P, S.PRE_COPY_P2P), (S.STOP, S.STOP_COPY)}
STREAM_END = {(S.PRE_COPY, S.RUNNING), (S.PRE_COPY_P2P, S.RUNNING_P2P), (S.STOP_COPY, S.STOP), (S.RESUMING, S.STOP)}


def states(flags: MigrationFlags) -> set[DeviceState]:
    found = {S.STOP, S.RUNNING, S.STOP_COPY, S.RESUMING}
    if flags & MigrationFlags.P2P:
        found.add(S.RUNNING_P2P)
    if flags & MigrationFlags.PRE_COPY:
        found.add(S.PRE_COPY)
        if flags & MigrationFlags.P2P:
            found.add(S.PRE_COPY_P2P)
    return found


def arcs(flags: MigrationFlags) -> set[tuple[DeviceState, DeviceState]]:
    """Single steps that a driver with these flags implements."""
    both = [(S.STOP, S.STOP_COPY), (S.STOP, S.RESUMING)]
    one = []
    if flags & MigrationFlags.P2P:
        both += [(S.RUNNING, S.RUNNING_P2P), (S.RUNNING_P2P, S.STOP)]
    else:
        both += [(S.RUNNING, S.STOP)]
    if flags & MigrationFlags.PRE_COPY:
        both += [(S.RUNNING, S.PRE_COPY)]
        if flags & MigrationFlags.P2P:
            both += [(S.PRE_COPY, S.PRE_COPY_P2P), (S.RUNNING_P2P, S.PRE_COPY_P2P)]
            one += [(S.PRE_COPY_P2P, S.STOP_COPY)]
        else:
            one += [(S.PRE_COPY, S.STOP_COPY)]
    return {*both, *((b, a) for a, b in both), *one}


def shortest(start: DeviceState, target: DeviceState, flags: MigrationFlags) -> tuple[DeviceState, ...] | None:
    """Breadth-first search; a state whose data are being saved lies on the way only between two such states."""
    if not {start, target} <= states(flags) or (start, target) in {(S.STOP_COPY, s) for s in PRECOPY_STATES}:
        return None
    steps = arcs(flags)
    found, queue = [], deque([(start,)])
    while queue:
        way = queue.popleft()
        if found and len(way) > len(found[0]):
            break
        if way[-1] is target:
            found.append(way)
            continue
        if len(way) > 1 and way[-1] in SAVING_STATES and not {start, target} <= SAVING_STATES:
            continue
        queue.extend((*way, after) for before, after in steps if before is way[-1] and after not in way)
    assert len(found) == 1, "the rules leave no choice"
    return found[0][1:]


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_every_cell_is_the_shortest_way(flags: MigrationFlags) -> None:
    for start, target in product(S, S):
        expected = shortest(start, target, flags)
        if expected is None:
            with pytest.raises(InvalidTransition) as caught:
                next_state(start, target, flags)
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(InvalidTransition):
                path(start, target, flags)
        else:
            assert path(start, target, flags) == expected, (start, target)
            assert next_state(start, target, flags) is (expected[0] if expected else start)


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_supported_states(flags: MigrationFlags) -> None:
    assert {state for state in S if supported(state, flags)} == states(flags)


def test_a_device_without_migration_has_no_state() -> None:
    assert not any(supported(state, MigrationFlags(0)) for state in S)


def test_ways_that_a_kernel_takes() -> None:
    full = MigrationFlags(7)
    assert path(S.PRE_COPY, S.RESUMING, full) == (S.RUNNING, S.RUNNING_P2P, S.STOP, S.RESUMING)
    assert path(S.STOP, S.PRE_COPY, full) == (S.RUNNING_P2P, S.RUNNING, S.PRE_COPY)
    assert path(S.PRE_COPY, S.STOP_COPY, MigrationFlags(5)) == (S.STOP_COPY,)
    assert path(S.RUNNING, S.STOP_COPY, MigrationFlags(1)) == (S.STOP, S.STOP_COPY)


def test_streams_open_and_close_on_single_steps_only() -> None:
    every = set().union(*(arcs(flags) for flags in FLAG_SETS))
    for step in product(S, S):
        expected = "write" if step == (S.STOP, S.RESUMING) else "read" if step in STREAM_READ else None
        assert opens_stream(*step) == expected
        assert closes_stream(*step) == (step in STREAM_END)
        if opens_stream(*step) or closes_stream(*step):
            assert step in every


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_a_way_never_holds_two_streams(flags: MigrationFlags) -> None:
    for start, target in product(states(flags), states(flags)):
        if shortest(start, target, flags) is None:
            continue
        held, state = start in SAVING_STATES | {S.RESUMING}, start
        for after in path(start, target, flags):
            if opens_stream(state, after):
                assert not held
                held = True
            elif closes_stream(state, after):
                assert held
                held = False
            state = after
        assert held == (target in SAVING_STATES | {S.RESUMING})


def test_groups_of_states() -> None:
    assert {S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY} == SAVING_STATES
    assert {S.RUNNING, S.RUNNING_P2P, S.PRE_COPY, S.PRE_COPY_P2P} == RUNNING_STATES


def test_a_refusal_names_both_states() -> None:
    with pytest.raises(InvalidTransition, match=r"no way from STOP_COPY to PRE_COPY$"):
        next_state(S.STOP_COPY, S.PRE_COPY, MigrationFlags(7))
