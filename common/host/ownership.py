"""What the ownership record means to a daemon: pure functions of what is on disk and of what runs.

Who may do what before the record is written is the business of the two tables (source/handover.py and
destination/handover.py); what follows from a record, after whatever has happened to daemon and machine, is here.
"""

from __future__ import annotations

from enum import Enum

from common.machine.record import Ownership, Record

__all__ = ["ARRIVED", "COMMITTED", "OPEN", "REVOKED", "Opening", "decision_of", "is_new", "opening", "why_kept"]

OPEN, COMMITTED, REVOKED = "OPEN", "COMMITTED", "REVOKED"  #: what is noted of a session that comes here

ARRIVED = (Ownership.COMMITTED, Ownership.STARTING, Ownership.OWNER, Ownership.OFF, Ownership.FORGOTTEN)
"""Where the session in the record is one that came here; in the others it leaves."""


class Opening(Enum):
    """What a daemon that starts does about the machine in its record."""

    BOOT = "boot"  #: start the machine that was described to it, from its image
    HOLD = "hold"  #: take the process over as it is
    ASK = "ask"  #: leave it as it is until its destination has said whose it is
    TAKE_OVER = "take over"  #: it was committed to this host: start it, if the last daemon did not come to that
    END = "end"  #: end the process; the rest is as if there were none
    GIVE_BACK = "give back"  #: nothing of it has run here and nothing is left of it: revoke its session
    LOST = "lost"  #: it was this host's, and nothing is left of it
    NONE = "none"  #: start nothing


def opening(known: Record | None, *, runs: bool, described: str | None, left: bool = False) -> Opening:
    """Return what to do at the start of a daemon.

    `runs`: the machine's process is there. `described`: the name of the machine that the daemon was given, if any.
    `left`: that one has left here, and since then another machine was here, of which the record is.
    """
    if left and described is not None and (known is None or known.name != described):
        described = None
    if known is None:
        return Opening.BOOT if described is not None else Opening.NONE
    match known.ownership:
        case Ownership.OWNER if runs:
            return Opening.HOLD
        case Ownership.OWNER | Ownership.OFF | Ownership.FORGOTTEN:
            if runs:
                return Opening.END
            return Opening.BOOT if described is not None else Opening.NONE
        case Ownership.GONE if runs:
            return Opening.HOLD
        case Ownership.GONE | Ownership.RELEASED:
            if runs:
                return Opening.END
            return Opening.BOOT if described not in (None, known.name) else Opening.NONE
        case Ownership.COMMITTING:
            return Opening.ASK
        case Ownership.COMMITTED:
            return Opening.TAKE_OVER if runs else Opening.GIVE_BACK
        case Ownership.STARTING:
            return Opening.TAKE_OVER if runs else Opening.LOST


def decision_of(known: Record | None, session_id: str, noted: str | None) -> str | None:
    """Return how a session that came here was decided: COMMITTED, REVOKED, or None if that is open.

    A COMMIT is decided by the record already; `noted` is what was noted apart, for when the record has moved on.
    """
    if known is not None and known.session_id == session_id and known.ownership in ARRIVED:
        return COMMITTED
    return None if noted == OPEN else noted


def is_new(known: Record | None, session_id: str, noted: str | None) -> bool:
    """Return whether a session has never come here.

    One that has, and of which the daemon remembers nothing, must not come again: a COMMIT of the first time may still
    be on its way, and its source may know by now that it was not taken.
    """
    return noted is None and decision_of(known, session_id, noted) is None


def why_kept(ownership: Ownership | None, *, state: str | None) -> str | None:
    """Return why a machine must not be forgotten; None: it may.

    `ownership` is that of the record, `state` the machine's, None if its process has ended.
    """
    match ownership:
        case None | Ownership.OFF | Ownership.FORGOTTEN:
            return "nothing is kept here"
        case Ownership.COMMITTING:
            return "who owns it is not decided: switchover resolve"
        case Ownership.GONE | Ownership.RELEASED:
            return None
        case Ownership.OWNER | Ownership.COMMITTED | Ownership.STARTING:
            if state in (None, "failed"):
                return None
            return f"it is this host's, and {state}: switchover stop ends it"
