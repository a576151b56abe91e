"""The ownership record: what this host knows about who owns its machine, on disk before anyone acts on it.

One file in the daemon's state directory. It is replaced whole: temporary file, fsync, rename, fsync of the directory,
so after a power failure it holds either the old record or the new one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

__all__ = ["Ownership", "Record", "read", "write", "write_durably"]


class Ownership(StrEnum):
    """Who owns the machine, as far as this host has decided or learned (docs/architecture.md, handover)."""

    OWNER = "OWNER"  #: this host; it was booted here or has arrived here for good
    COMMITTING = "COMMITTING"  #: a COMMIT may have been sent; the peer decides
    GONE = "GONE"  #: the peer; the copy here is kept
    RELEASED = "RELEASED"  #: the peer; the copy here was let go
    COMMITTED = "COMMITTED"  #: this host, by a COMMIT; nothing has left STOP yet
    STARTING = "STARTING"  #: this host; devices may have left STOP
    OFF = "OFF"  #: nobody: its operator has ended it here
    FORGOTTEN = "FORGOTTEN"  #: not this host: its operator has let go of what was kept of it here


@dataclass(frozen=True, slots=True)
class Record:
    """One decision. `incarnation` grows with every handover; `directory` is the machine process's.

    `judged`: the verifier has passed the machine, or was off; the copy here is not needed once it runs at the peer.
    """

    machine_uuid: str
    name: str
    incarnation: int
    ownership: Ownership
    directory: str
    session_id: str = ""
    peer: str = ""
    judged: bool = True


_KINDS = {
    **dict.fromkeys(("machine_uuid", "name", "ownership", "directory"), str),
    "incarnation": int,
    "session_id": str,
    "peer": str,
    "judged": bool,
}
_LATER = {"session_id": "", "peer": "", "judged": True}  # that earlier versions did not write


def read(path: Path) -> Record | None:
    """Return the record, None if there never was one; raise ValueError if it cannot be understood."""
    try:
        members = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not an ownership record: not JSON") from None
    members = {**_LATER, **members} if isinstance(members, dict) else {}
    if set(members) != set(_KINDS) or any(type(members[name]) is not kind for name, kind in _KINDS.items()):
        kinds = ", ".join(f"{name} ({kind.__name__})" for name, kind in _KINDS.items())
        raise ValueError(f"{path}: not an ownership record, which has {kinds}")
    try:
        return Record(**{**members, "ownership": Ownership(members["ownership"])})
    except ValueError:
        raise ValueError(f"{path}: not an ownership record: of an unknown ownership") from None


def write(path: Path, record: Record) -> None:
    """Make the record durable (about 0.6 ms)."""
    write_durably(path, json.dumps(asdict(record), indent=1))


def write_durably(path: Path, text: str) -> None:
    """Replace a file whole; when this returns it survives a power failure."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
