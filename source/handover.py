"""The source's side of the handover, as a pure state machine.

::

    OWNER ──begin──► COMMITTING ──committed──► GONE
      ▲                   │
      └─────revoked───────┘

COMMITTING is recorded before the first COMMIT is sent, and is left only by what the destination says: that it owns the
machine, or that it never will. Not to get an answer is no answer; so at no moment do both sides believe to own it.
"""

from __future__ import annotations

from enum import Enum

from common.machine.record import Ownership

__all__ = ["Event", "after"]


class Event(Enum):
    """What the source learns or decides."""

    BEGIN = "begin"
    COMMITTED = "committed"
    REVOKED = "revoked"


_TABLE = {
    (Ownership.OWNER, Event.BEGIN): Ownership.COMMITTING,
    (Ownership.COMMITTING, Event.COMMITTED): Ownership.GONE,
    (Ownership.COMMITTING, Event.REVOKED): Ownership.OWNER,
}


def after(state: Ownership, event: Event) -> Ownership:
    """Return the state that follows; raise ValueError for an event that the state does not admit."""
    try:
        return _TABLE[state, event]
    except KeyError:
        raise ValueError(f"{event.value} is not possible in {state}") from None
