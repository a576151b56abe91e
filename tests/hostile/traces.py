"""What a daemon has of the host: processes, descriptors, threads; and what it has said in its log."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from rig import Daemon, Rig, wait_for

SETTLE = 30.0


class Traces:
    """What a daemon holds now; `are_gone` waits until it holds no more than that."""

    def __init__(self, rig: Rig, daemon: Daemon) -> None:
        self._rig = rig
        self._daemon = daemon
        self._before = self._look()

    def _look(self) -> tuple[int, int, int]:
        directory = Path(f"/proc/{self._daemon.process.pid}")
        descriptors = _targets(directory / "fd")
        memory = sum("memfd:" in target for target in descriptors)
        # Connections of the test itself come and go when they like.
        kept = sum(not target.startswith("socket:") for target in descriptors)
        return len(self._rig.processes()), kept, memory

    def are_gone(self) -> None:
        """Fail if the daemon has died, left something behind, or said in its log that it has a defect."""
        assert self._daemon.process.poll() is None, f"the daemon has died: {self._daemon.log.read_text()[-2000:]}"
        wait_for(lambda: not self._daemon.look().migrating, "a migration is still there", SETTLE)
        wait_for(
            lambda: all(now <= before for now, before in zip(self._look(), self._before, strict=True)),
            f"left behind: {self._before} (processes, descriptors, memory) have become {self._look()}",
            SETTLE,
        )
        said_nothing_wrong(self._daemon)


def said_nothing_wrong(daemon: Daemon) -> None:
    """Fail if there is a traceback in a daemon's log."""
    log = daemon.log.read_text()
    # What a peer says stands in a line of ours.
    assert not re.search(r"^Traceback|defect", log, re.MULTILINE), log[-4000:]


def _targets(directory: Path) -> list[str]:
    targets = []
    for entry in directory.iterdir():
        with suppress(OSError):  # it has been closed meanwhile
            targets.append(os.readlink(entry))
    return targets
