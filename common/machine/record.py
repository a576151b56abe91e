"""The ownership record: what this host knows about who owns its machine, on disk before anyone acts on it.

One file in the daemon's state directory with room for two records, each with a number and a check sum: of those that
are whole the one with the higher number counts. A new one is written over the other, the earlier one, so that a power
failure at any moment leaves either the old record or the new one.

Why the file is not replaced, but by its first record: a new file, a new name for it and the directory's fsync are two
commits of the file system's journal, and three records are written while a machine stands still. A block that is there
already takes one flush of the disk: 0.8 ms where the other way took 2.0 (docs/benchmarks.md).
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

__all__ = ["Ownership", "Record", "read", "slot", "write", "write_durably"]


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
_ROOM = 4096  # bytes for each of the two: a block of the file system. A directory that has a socket has a short path


def read(path: Path) -> Record | None:
    """Return the record, None if there never was one; raise ValueError if it cannot be understood."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    number, text = max(_slots(data))
    try:
        members = json.loads(text if number else data)  # earlier versions wrote nothing but the record
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


def _slots(data: bytes) -> list[tuple[int, bytes]]:
    """Return number and text of both records of a file; 0 and nothing for one that is not there, or not whole."""
    found = []
    for at in (0, _ROOM):
        check, _, line = data[at : at + _ROOM].partition(b"\n")[0].partition(b" ")
        number, _, text = line.partition(b" ")
        whole = check == b"%08x" % zlib.crc32(line) and number.isdigit()
        found.append((int(number), text) if whole else (0, b""))
    return found


def slot(number: int, text: str) -> bytes:
    """Return what stands in a file for its record of that number."""
    line = f"{number} {text}".encode()
    return b"%08x %s\n" % (zlib.crc32(line), line)


def write(path: Path, record: Record) -> None:
    """Make the record durable. OSError: it may not be, and whoever reads finds the one before."""
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        before = b""
    numbers = [number for number, _ in _slots(before)]
    written = slot(max(numbers) + 1, json.dumps(asdict(record)))
    if len(written) > _ROOM:
        raise OSError(errno.ENAMETOOLONG, f"a record of {len(written)} bytes, at most {_ROOM} are possible")
    if not any(numbers):
        # All of it is there from the start, and what is written over it later takes no new blocks.
        write_durably(path, written.decode().ljust(2 * _ROOM))
        return
    at = _ROOM * numbers.index(min(numbers))
    fd = os.open(path, os.O_WRONLY)
    try:
        # In one call: whoever ends this process cannot do so in between. What was written and is not on the disk would
        # be taken for the later one, and the next record would be written over the only one that is.
        os.pwritev(fd, [written], at, os.RWF_DSYNC)
    except OSError:
        with suppress(OSError):
            os.pwrite(fd, before[at : at + len(written)], at)
        raise
    finally:
        os.close(fd)


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
