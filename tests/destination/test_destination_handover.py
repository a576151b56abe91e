"""The destination's table, and a walk through all that can happen between both tables when messages are late or lost.

The walk is small and complete. A message that was sent may arrive at any later time, again and again, or never; the
destination may revoke by itself whenever its table allows. What is asked of every situation that can come about: never
two owners, and while the hosts can talk, a way to exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest

from common.machine.record import Ownership
from destination import handover as destination
from destination.handover import COMMITTED, PREPARING, READY, REVOKED, RUNNING, STARTING, Event, State, after
from source import handover as source

STATES = (PREPARING, READY, COMMITTED, STARTING, RUNNING, REVOKED)
FOLLOWS = {
    (PREPARING, Event.LOADED): READY,
    (PREPARING, Event.REVOKE): REVOKED,
    (READY, Event.COMMIT): COMMITTED,
    (READY, Event.REVOKE): REVOKED,
    (COMMITTED, Event.COMMIT): COMMITTED,
    (COMMITTED, Event.START): STARTING,
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


@dataclass(frozen=True)
class Situation:
    """Both hosts' states, and every message that may still arrive (the network forgets none and may repeat all)."""

    source: Ownership = Ownership.OWNER
    destination: int = PREPARING
    begun: bool = False
    messages: frozenset[str] = frozenset()

    @property
    def owners(self) -> int:
        """How many hosts would run the machine."""
        return (self.source is Ownership.OWNER) + (self.destination in (COMMITTED, STARTING, RUNNING))

    def says(self, *messages: str) -> Situation:
        """Send messages."""
        return replace(self, messages=self.messages | set(messages))


def at_destination(now: Situation, event: Event, *, yes: str | None = None, no: str | None = None) -> list[Situation]:
    """Let an event happen there, if the table admits it; answer `yes` or else `no`."""
    try:
        state = after(State.ValueType(now.destination), event)
    except ValueError:
        return [now.says(no)] if no else []
    then = replace(now, destination=int(state))
    return [then.says(yes) if yes else then]


def at_source(now: Situation, event: source.Event) -> list[Situation]:
    """Let an event happen here, if the table admits it."""
    try:
        return [replace(now, source=source.after(now.source, event))]
    except ValueError:
        return []


def nexts(now: Situation) -> Iterator[Situation]:
    """All that can happen next. One migration is one session, so the source begins it once."""
    for event in (Event.LOADED, Event.START, Event.STARTED, Event.REVOKE):  # what it does by itself
        yield from at_destination(now, event)
    if not now.begun:
        for begun in at_source(now, source.Event.BEGIN):
            yield replace(begun, begun=True).says("COMMIT")
        yield now.says("ABORT")  # the source is cancelled, or something fails, before it begins
    if now.source is Ownership.COMMITTING:
        yield now.says("COMMIT", "RESOLVE")  # no answer came: ask again
    if "COMMIT" in now.messages:
        yield from at_destination(now, Event.COMMIT, yes="committed", no="refused")
    if "RESOLVE" in now.messages:
        yield from at_destination(now, Event.REVOKE, yes="revoked", no="committed")
    if "ABORT" in now.messages:
        yield from at_destination(now, Event.REVOKE)
    if "committed" in now.messages:
        yield from at_source(now, source.Event.COMMITTED)
    if "revoked" in now.messages:
        yield from at_source(now, source.Event.REVOKED)


def walk() -> dict[Situation, set[Situation]]:
    """Return every situation that can come about, with those that can follow; fail on one with two owners."""
    seen: dict[Situation, set[Situation]] = {}
    new = [Situation()]
    while new:
        now = new.pop()
        if now in seen:
            continue
        assert now.owners < 2, f"two owners: {now}"
        seen[now] = set(nexts(now))
        new += seen[now]
    return seen


def stuck(seen: dict[Situation, set[Situation]]) -> list[Situation]:
    """Return the situations from which nothing leads to exactly one owner who knows it."""
    good = {now for now in seen if now.owners == 1 and now.source is not Ownership.COMMITTING}
    while more := {now for now, then in seen.items() if now not in good and then & good}:
        good |= more
    return [now for now in seen if now not in good]


def test_no_interleaving_has_two_owners_or_no_way_to_one() -> None:
    seen = walk()
    assert not stuck(seen)
    reached = {(now.source, now.destination) for now in seen}
    assert {(Ownership.GONE, RUNNING), (Ownership.OWNER, REVOKED), (Ownership.COMMITTING, STARTING)} <= reached
    # Whoever is told that the machine has gone is told so by its new owner.
    assert {there for here, there in reached if here is Ownership.GONE} == {COMMITTED, STARTING, RUNNING}


@pytest.mark.parametrize(
    ("cell", "state"),
    [
        ((REVOKED, Event.COMMIT), COMMITTED),  # a late COMMIT overrules the decision
        ((RUNNING, Event.REVOKE), RUNNING),  # revoked is said, and not done
        ((READY, Event.REVOKE), READY),
    ],
)
def test_the_walk_notices_a_broken_table_of_the_destination(
    monkeypatch: pytest.MonkeyPatch, cell: tuple[State.ValueType, Event], state: State.ValueType
) -> None:
    monkeypatch.setitem(destination._TABLE, cell, state)
    with pytest.raises(AssertionError, match="two owners"):
        walk()


@pytest.mark.parametrize(
    ("cell", "state"),
    [
        ((Ownership.OWNER, source.Event.BEGIN), Ownership.OWNER),  # COMMIT is sent by one who stays the owner
        ((Ownership.COMMITTING, source.Event.COMMITTED), Ownership.OWNER),
        ((Ownership.GONE, source.Event.COMMITTED), Ownership.OWNER),
    ],
)
def test_the_walk_notices_a_broken_table_of_the_source(
    monkeypatch: pytest.MonkeyPatch, cell: tuple[Ownership, source.Event], state: Ownership
) -> None:
    monkeypatch.setitem(source._TABLE, cell, state)
    with pytest.raises(AssertionError, match="two owners"):
        walk()


@pytest.mark.parametrize(
    "cell", [(Ownership.COMMITTING, event) for event in (source.Event.COMMITTED, source.Event.REVOKED)]
)
def test_the_walk_notices_a_machine_that_nobody_gets(
    monkeypatch: pytest.MonkeyPatch, cell: tuple[Ownership, source.Event]
) -> None:
    """Without a way out of COMMITTING for one of the answers the machine stands still for ever."""
    monkeypatch.delitem(source._TABLE, cell)
    assert stuck(walk())


@pytest.mark.parametrize("state", [COMMITTED, STARTING, RUNNING])
def test_the_walk_notices_a_decision_that_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, state: State.ValueType
) -> None:
    """The source has heard of the decision and let go, and then nobody has the machine."""
    monkeypatch.setitem(destination._TABLE, (state, Event.REVOKE), REVOKED)
    assert stuck(walk())
