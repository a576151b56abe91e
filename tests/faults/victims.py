"""Finds the processes of a daemon's machine, and breaks things."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from rig import Daemon, wait_for


def victim(daemon: Daemon, what: str) -> int:
    """Return the process of a daemon's machine that is its "machine", "vCPU" or a "device"; wait until there is one."""
    return wait_for(lambda: find(daemon, what), f"there is no process of a {what}")


def find(daemon: Daemon, what: str) -> int:
    """Return that process, 0 if there is none now; a device may also be said by its kind."""
    machine = _machine_of(daemon)
    if what == "machine" or not machine:
        return machine
    part = {"vCPU": "common.guest", "device": "common.devices"}.get(what, f"common.devices {what}")
    return next((pid for pid in _pids() if _parent(pid) == machine and part in _command(pid)), 0)


def _machine_of(daemon: Daemon) -> int:
    return next(
        (pid for pid in _pids() if "common.machine" in _command(pid) and str(daemon.state_dir) in _command(pid)), 0
    )


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill(daemon: Daemon, what: str) -> None:
    """End a process as if it had crashed, and wait until it is no more."""
    pid = victim(daemon, what)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not _command(pid), f"the {what} does not end")


def hang(daemon: Daemon, what: str) -> None:
    """Stop a process: it is there, and never answers."""
    os.kill(victim(daemon, what), signal.SIGSTOP)


class SmallDisk:
    """A file system of its own under a directory, which can be filled; needs root."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(path)], check=True)

    def fill(self) -> None:
        """Leave no room."""
        with (self.path / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Make room again."""
        (self.path / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Take it away."""
        subprocess.run(["umount", "-l", str(self.path)], check=True)
