from __future__ import annotations

from itertools import product

import pytest

from destination.handover import COMMITTED, PREPARING, READY, REVOKED, RUNNING, STARTING, Event, State, after

STATES = (PREPARING, READY, COMMITTED, STARTING, RUNNING, REVOKED)
FOLLOWS = {
    (PREPARING, Event.LOADED): READY,
    (PREPARING, Event.REVOKE): REVOKED,
    (READY, Event.COMMIT): COMMITTED,
    (READY, Event.REVOKE): REVOKED,
    (COMMITTED, Event.COMMIT): COMMITTED,
    (COMMITTED, Event.START): STARTING,
    (COMMITTED, Event.LOST): REVOKED,
    (STARTING, Event.COMMIT): STARTING,
    (STARTING, Event.STARTED): RUNNING,
    (RUNNING, Event.COMMIT): RUNNING,
    (REVOKED, Event.REVOKE): REVOKED,
}


@pytest.mark.parametrize(("state", "event"), list(product(STATES, Event)))
def test_every_state_and_event(state: State.ValueType, event: Event) -> None:
    if (state, event) in FOLLOWS:
        assert after(state, event) == FOLLOWS[state, event]
    else:
        name = State.Name(state).removeprefix("SESSION_STATE_")
        with pytest.raises(ValueError, match=f"^{event.value} is not possible in {name}$"):
            after(state, event)


def test_no_session_is_no_state() -> None:
    for event in Event:
        with pytest.raises(ValueError, match="UNSPECIFIED"):
            after(State.SESSION_STATE_UNSPECIFIED, event)
