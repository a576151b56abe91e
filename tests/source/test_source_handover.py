from __future__ import annotations

from itertools import product

import pytest

from common.machine.record import Ownership
from source import handover
from source.handover import Event, after, incarnation_after

FOLLOWS = {
    (Ownership.OWNER, Event.BEGIN): Ownership.COMMITTING,
    (Ownership.COMMITTING, Event.COMMITTED): Ownership.GONE,
    (Ownership.COMMITTING, Event.REVOKED): Ownership.OWNER,
    (Ownership.COMMITTING, Event.DECLARED_HERE): Ownership.OWNER,
    (Ownership.COMMITTING, Event.DECLARED_THERE): Ownership.GONE,
}


@pytest.mark.parametrize(("state", "event"), list(product(Ownership, Event)))
def test_every_state_and_event(state: Ownership, event: Event) -> None:
    if (state, event) in FOLLOWS:
        assert after(state, event) is FOLLOWS[state, event]
    else:
        with pytest.raises(ValueError, match=f"^{event.value} is not possible in {state.name}$"):
            after(state, event)


def test_gone_is_for_ever() -> None:
    assert not [cell for cell in handover._TABLE if cell[0] is Ownership.GONE]


@pytest.mark.parametrize("event", Event)
def test_a_destination_that_was_passed_over_knows_its_incarnation(event: Event) -> None:
    """What comes next must be higher than what it was offered and may have recorded: 4 after 3."""
    assert incarnation_after(event, 3) == (4 if event is Event.DECLARED_HERE else 3)
