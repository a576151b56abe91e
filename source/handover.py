"""The source's side of the handover, as a pure state machine.

::

    OWNER ──begin──► COMMITTING ──committed, declared there──► GONE
      ▲                   │
      └───────────────────┘
       revoked, declared here

COMMITTING is recorded before the first COMMIT is sent, and is left only by what the destination says: that it owns the
machine and has begun to start it, or that it never will. Not to get an answer is no answer; so at no moment do both
sides believe to own it. Only where the destination will never answer again, an operator declares instead who owns the
machine (`switchover resolve`), and answers for it that this is so.
"""

from __future__ import annotations

from enum import Enum

from common.machine.record import Ownership

__all__ = ["Event", "after", "incarnation_after"]


class Event(Enum):
    """What the source learns or decides."""

    BEGIN = "begin"
    COMMITTED = "committed"
    REVOKED = "revoked"
    DECLARED_HERE = "declared here"
    DECLARED_THERE = "declared there"


_TABLE = {
    (Ownership.OWNER, Event.BEGIN): Ownership.COMMITTING,
    (Ownership.COMMITTING, Event.COMMITTED): Ownership.GONE,
    (Ownership.COMMITTING, Event.REVOKED): Ownership.OWNER,
    (Ownership.COMMITTING, Event.DECLARED_HERE): Ownership.OWNER,
    (Ownership.COMMITTING, Event.DECLARED_THERE): Ownership.GONE,
}


def after(state: Ownership, event: Event) -> Ownership:
    """Return the state that follows; raise ValueError for an event that the state does not admit."""
    try:
        return _TABLE[state, event]
    except KeyError:
        raise ValueError(f"{event.value} is not possible in {state}") from None


def incarnation_after(event: Event, incarnation: int) -> int:
    """Return the incarnation of the machine here after an event.

    A destination that was passed over may have recorded the one that it was offered, and must not take it for new.
    """
    return incarnation + 1 if event is Event.DECLARED_HERE else incarnation
