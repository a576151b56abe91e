"""The destination's side of the handover, as a pure state machine.

::

    PREPARING ──loaded──► READY ──commit──► COMMITTED ──start──► STARTING ──started──► RUNNING
        │                   │                   │
        └──────revoke───────┴──► REVOKED ◄─lost─┘

COMMITTED is recorded before anything leaves STOP, STARTING before the first device does, REVOKED before anyone is told
of it. COMMIT may come again (its answer may have been lost) and changes nothing then; after REVOKED it is refused. A
machine whose process ends in COMMITTED has not run here: it is given back.
"""

from __future__ import annotations

from enum import Enum

from switchover.v1 import migration_pb2

__all__ = ["Event", "State", "after"]

State = migration_pb2.SessionState
UNKNOWN = migration_pb2.SESSION_STATE_UNSPECIFIED
PREPARING = migration_pb2.SESSION_STATE_PREPARING
READY = migration_pb2.SESSION_STATE_READY
COMMITTED = migration_pb2.SESSION_STATE_COMMITTED
STARTING = migration_pb2.SESSION_STATE_STARTING
RUNNING = migration_pb2.SESSION_STATE_RUNNING
REVOKED = migration_pb2.SESSION_STATE_REVOKED


class Event(Enum):
    """What the destination is told or decides."""

    LOADED = "loaded"
    COMMIT = "commit"
    START = "start"
    STARTED = "started"
    REVOKE = "revoke"
    LOST = "lost"


_TABLE = {
    (PREPARING, Event.LOADED): READY,
    (READY, Event.COMMIT): COMMITTED,
    (COMMITTED, Event.COMMIT): COMMITTED,
    (STARTING, Event.COMMIT): STARTING,
    (RUNNING, Event.COMMIT): RUNNING,
    (COMMITTED, Event.START): STARTING,
    (COMMITTED, Event.LOST): REVOKED,
    (STARTING, Event.STARTED): RUNNING,
    (PREPARING, Event.REVOKE): REVOKED,
    (READY, Event.REVOKE): REVOKED,
    (REVOKED, Event.REVOKE): REVOKED,
}


def after(state: State.ValueType, event: Event) -> State.ValueType:
    """Return the state that follows; raise ValueError for an event that the state does not admit."""
    try:
        return _TABLE[state, event]
    except KeyError:
        name = State.Name(state).removeprefix("SESSION_STATE_")
        raise ValueError(f"{event.value} is not possible in {name}") from None
