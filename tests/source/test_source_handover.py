from __future__ import annotations

from itertools import product

import pytest

from common.machine.record import Ownership
from source import handover
from source.handover import Event, after

FOLLOWS = {
    (Ownership.OWNER, Event.BEGIN): Ownership.COMMITTING,
    (Ownership.COMMITTING, Event.COMMITTED): Ownership.GONE,
    (Ownership.COMMITTING, Event.REVOKED): Ownership.OWNER,
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
