"""What fails when, and what must become of the machine: plain data, from which the tests are made."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from enum import Enum

SEED = int(os.environ.get("SEED") or 1)

PHASES = {
    "setup": "source.setup",
    "round 0": "source.round0",
    "sync": "source.sync0",
    "paused": "source.paused",
    "stopped": "source.stopped",
    "handover": "source.handover",
    "committing": "source.committing",
    "committed": "destination.committed",
}
"""Points at which the migration is held while something is broken."""

BEFORE = ("setup", "round 0", "sync", "paused", "stopped", "handover")
DEVICES = ("nic", "nvme", "accelerator")


class End(Enum):
    """What becomes of the machine."""

    STAYS = "it goes on at the source, and the next attempt moves it"
    MOVES = "it goes on at the destination"
    FAILED_HERE = "it has failed at the source, says why, and runs nowhere"
    FAILED_THERE = "it is the destination's, which says why it does not run"
    LOST = "its process at the source is gone, and it runs nowhere"
    REVOKED = "the destination could not take it: it goes on at the source"


FAULTS = {
    "source device killed": {
        **dict.fromkeys(BEFORE, End.FAILED_HERE),
        "committing": End.MOVES,
        "committed": End.MOVES,
    },
    "source vCPU killed": {
        **dict.fromkeys(BEFORE, End.FAILED_HERE),
        "committing": End.MOVES,
        "committed": End.MOVES,
    },
    "source machine killed": {
        **dict.fromkeys(BEFORE, End.LOST),
        "committing": End.LOST,
        "committed": End.LOST,
    },
    "destination device killed": {
        **dict.fromkeys(("round 0", "sync", "paused", "stopped", "handover"), End.STAYS),
        "committing": End.REVOKED,
        "committed": End.FAILED_THERE,
    },
    "destination vCPU killed": {
        **dict.fromkeys(("round 0", "sync", "paused", "stopped", "handover"), End.STAYS),
        "committing": End.REVOKED,
        "committed": End.FAILED_THERE,
    },
    "destination machine killed": {
        **dict.fromkeys(("round 0", "sync", "paused", "stopped", "handover"), End.STAYS),
        "committing": End.REVOKED,
        "committed": End.REVOKED,  # nothing of it has run there
    },
    "destination device hung": dict.fromkeys(("round 0", "stopped"), End.STAYS),
    "source device hung": {"stopped": End.FAILED_HERE},
    "destination disk full": {"handover": End.REVOKED},
    "source disk full": {"handover": End.STAYS},
    "destination without memory": {"setup": End.STAYS},
}
"""By fault and phase; a phase that is not there has nothing to strike, or is another's test."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault in one phase, with a device of this kind."""

    fault: str
    phase: str
    device: str
    end: End

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.phase}, {self.device}"


def cells(seed: int) -> list[Cell]:
    """Return all cells; the seed chooses their devices and their order."""
    rng = random.Random(seed)
    found = [
        Cell(fault, phase, rng.choice(DEVICES), end)
        for fault, phases in FAULTS.items()
        for phase, end in phases.items()
    ]
    rng.shuffle(found)
    return found


def sample(seed: int, size: int = 2) -> set[Cell]:
    """Return some cells of a seed in which as many faults and phases are met as fit; hung processes take long."""
    chosen: list[Cell] = []
    left = [cell for cell in cells(seed) if "hung" not in cell.fault]
    while left and len(chosen) < size:
        faults, phases = {cell.fault for cell in chosen}, {cell.phase for cell in chosen}
        best = max(left, key=lambda cell: (cell.fault not in faults) + (cell.phase not in phases))
        chosen.append(best)
        left.remove(best)
    return set(chosen)
