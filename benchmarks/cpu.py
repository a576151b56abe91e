"""CPU time of processes that run, from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["children_of", "cpu_seconds", "is_alive"]

TICKS = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    # After the command's name, which may contain anything: the fields of proc(5) from the third on.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children_of(root: int) -> set[int]:
    """Return all descendants of a process, zombies too."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    found: set[int] = set()
    new = {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs still: its memory is not free yet."""
    try:
        return _stat(pid)[0] not in "ZX"
    except OSError:
        return False


def cpu_seconds(root: int) -> float:
    """Return the CPU seconds, of user and system, of a process and all its descendants, ended ones too."""
    ticks = 0
    for pid in {root} | children_of(root):
        with suppress(OSError):
            ticks += sum(map(int, _stat(pid)[11:15]))
    return ticks / TICKS
