"""What the soak does, step by step: plain data, which nothing but the seed decides."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Flag, auto
from pathlib import Path
from typing import Any

import numpy as np
from cells import DEVICES
from rig import machine_toml
from switchover.v1 import host_pb2, migration_pb2

__all__ = ["FAULTS", "End", "Step", "machine", "step"]


class End(Flag):
    """What may become of the machine in a step."""

    MOVES = auto()  #: it goes on at the other host
    STAYS = auto()  #: it goes on where it was
    DIES = auto()  #: it runs nowhere, and its host says why


ALIVE = End.MOVES | End.STAYS

FAULTS: dict[str, tuple[int, End]] = {
    "nothing": (10, End.MOVES),
    "slow network": (4, End.MOVES),
    "source device stopped": (4, End.MOVES),
    "destination device stopped": (4, End.MOVES),
    "source daemon stopped": (2, ALIVE),
    "destination daemon stopped": (2, ALIVE),
    "cancelled": (6, ALIVE),
    "network cut": (5, ALIVE),
    "network stalled": (4, ALIVE),
    "network without answers": (2, ALIVE),
    "network without requests": (2, ALIVE),
    "source daemon killed": (5, ALIVE),
    "destination daemon killed": (5, ALIVE),
    "source daemon told to end": (2, ALIVE),
    "destination daemon told to end": (2, ALIVE),
    "source device killed": (1, End.MOVES | End.DIES),
    "source vCPU killed": (1, End.MOVES | End.DIES),
    "source machine killed": (1, End.MOVES | End.DIES),
    "destination device killed": (1, ALIVE | End.DIES),
    "destination vCPU killed": (1, ALIVE | End.DIES),
    "destination machine killed": (1, ALIVE | End.DIES),
}
"""How often each fault is drawn, and what may follow from it at whichever moment it strikes."""

POINTS = (
    "source.setup",
    "source.precopy",
    "source.round0",
    "source.sync0",
    "source.paused",
    "source.stopped",
    "source.handover",
    "source.committing",
    "destination.initial_data",
    "destination.committed",
)
MAX_ROUNDS = 5
STRATEGIES = ("auto", "aperture", "minmax", "mapped")
IMAGE = Path(np.__file__).parent


@dataclass(frozen=True, slots=True)
class Step:
    """One migration from wherever the machine is to the other host, and what is broken in it."""

    number: int
    fault: str
    device: str  #: the kind of device that is struck, if one is
    point: str  #: the fault strikes when this is reached; empty: `after` so many seconds
    after: float
    lasts: float  #: seconds after which it is repaired
    verify: str
    lane_kind: str
    lanes: int
    compress: str
    max_downtime_ms: float
    bandwidth_limit: float
    reconnect_s: float

    @property
    def may_end(self) -> End:
        return FAULTS[self.fault][1]

    def __str__(self) -> str:
        when = f"at {self.point}" if self.point else f"after {self.after} s"
        what = f"{self.fault} ({self.device})" if "device" in self.fault else self.fault
        how = f"{self.verify}, {self.lanes} {self.lane_kind} lanes, compress {self.compress}"
        limit = f", {self.bandwidth_limit / 1e6:.0f} MB/s" if self.bandwidth_limit else ""
        limit += f", reconnects for {self.reconnect_s} s" if self.reconnect_s else ""
        return f"step {self.number}: {what} {when} for {self.lasts} s; {how}, {self.max_downtime_ms} ms{limit}"

    def request(self) -> dict[str, Any]:
        """Return the fields of the MigrateRequest. A machine that does not converge is moved all the same."""
        return {
            "verify": migration_pb2.VerifyMode.Value(f"VERIFY_MODE_{self.verify.upper()}"),
            "lane_kind": migration_pb2.LaneKind.Value(f"LANE_KIND_{self.lane_kind.upper()}"),
            "lanes": self.lanes,
            "compression": host_pb2.Compression.Value(f"COMPRESSION_{self.compress.upper()}"),
            "max_downtime_ms": self.max_downtime_ms,
            "bandwidth_limit": self.bandwidth_limit,
            "reconnect_s": self.reconnect_s,
            "max_rounds": MAX_ROUNDS,
            "on_timeout": host_pb2.ON_TIMEOUT_SWITCH_OVER,
        }


def step(seed: int, number: int) -> Step:
    """Return one step of a seed's plan, which has no end."""
    rng = random.Random(f"{seed} step {number}")
    fault = rng.choices(list(FAULTS), [often for often, _ in FAULTS.values()])[0]
    return Step(
        number,
        fault,
        device=rng.choice(DEVICES),
        point=rng.choice(POINTS) if rng.random() < 0.5 else "",
        after=round(rng.uniform(0, 2), 2),
        lasts=rng.choice((0.1, 0.5, 1.0, 2.0, 2.0, 4.0) if rng.random() < 0.9 else (15.0,)),
        verify=rng.choice(("strict", "deferred")),
        lane_kind=rng.choice(("grpc", "tcp")),
        lanes=rng.randint(1, 4),
        compress=rng.choice(("off", "lz4", "zstd", "auto")),
        max_downtime_ms=rng.choice((100, 300, 1000)),
        bandwidth_limit=rng.choice((0, 0, 100e6)),
        reconnect_s=rng.choice((0, 3, 20)),
    )


def machine(seed: int, number: int) -> str:
    """Return the file of one of the machines that a seed's plan needs, one after the other has died."""
    rng = random.Random(f"{seed} machine {number}")
    return machine_toml(
        devices=DEVICES,
        ram="64MiB",
        image=IMAGE,
        viommu=f'strategy = "{rng.choice(STRATEGIES)}"',
        pattern=rng.choice(("random", "sequential")),
        rate=rng.choice(("1MB/s", "5MB/s", "10MB/s")),
        mappings=500,
        extra={"nic": 'rate = "5MB/s"', "nvme": "blocks = 4096\nlatency_us = 1000", "accelerator": 'memory = "2MiB"'},
    )
