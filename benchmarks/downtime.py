"""How long a busy machine with large devices stands still, and what each feature does about it.

Four accelerators of 128 MiB, the power of two above 100 MiB, a nic that writes 100 MB/s behind the vIOMMU, and vCPUs
that write 200 MB/s, over a link of 10 Gbit/s. The nic has an address space of its own, as each device has behind QEMU's
vIOMMU. The machine goes to and fro; the rows of one machine take turns. A feature is taken away by an option, by the
machine file, or, where there is no reason to offer a choice, as a guard is (common/hooks.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.link import open_link
from benchmarks.our_hosts import ENVIRONMENT, hosts

__all__ = ["downtime"]

DEVICES, DEVICE_MEMORY = 4, 128 << 20
TEN_GBIT = 10e9 / 8
MACHINE = """
name = "busy"
ram.size = "1GiB"
[[guest]]
program = "clock"
[[guest]]
program = "writer"
rate = "200MB/s"
region = "128MiB"
[[device]]
kind = "nic"
container = "{container}"
rate = "100MB/s"
packet = 65536
[[guest]]
program = "driver"
device = "nic0"
"""
ACCELERATOR = """
[[device]]
kind = "accelerator"
memory = {memory}
pre_copy = "{pre_copy}"
"""
OPTIONS = (
    "--lane-kind",
    "tcp",
    "--lanes",
    "2",
    "--max-downtime",
    "300ms",
    "--timeout",
    "20s",
    "--on-timeout",
    "switch-over",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A way to move the machine: which features it goes without."""

    name: str
    options: tuple[str, ...] = ("--verify", "deferred")
    without: str = ""  # the guard that is switched off


WITH_PRE_COPY = (
    Row("all features"),
    Row("without switchover-ack", without="switchover-ack"),
    Row("device streams one after the other", without="parallel-device-streams"),
    Row("--verify strict", ("--verify", "strict")),
    Row("--verify off", ("--verify", "off")),
)
ONE_SPACE = (Row("one address space for all devices"),)
WITHOUT_PRE_COPY = (Row("without device pre-copy"),)


def downtime(runs: int) -> None:
    """Time `runs` migrations of each row; the guest measures (to be: 80 ms with all features)."""
    for container, pre_copy, rows in (
        ("net", "auto", WITH_PRE_COPY),
        ("default", "auto", ONE_SPACE),
        ("net", "off", WITHOUT_PRE_COPY),
    ):
        accelerators = ACCELERATOR.format(memory=DEVICE_MEMORY, pre_copy=pre_copy) * DEVICES
        machine = MACHINE.format(container=container) + accelerators
        found: dict[str, list[dict[str, Any]]] = {}
        for row, told in _moves(machine, rows, runs):
            found.setdefault(row.name, []).append(told)
        Console(width=170).print(_table(found, runs))


def _moves(machine: str, rows: Sequence[Row], runs: int) -> list[tuple[Row, dict[str, Any]]]:
    moves = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sw-bench-")))
        (guards := directory / "guards").mkdir()
        link = stack.enter_context(open_link(TEN_GBIT))
        ours = stack.enter_context(hosts(link, directory, machine, {**ENVIRONMENT, "SWITCHOVER_HOOKS": str(guards)}))
        for _ in range(runs):
            for row in rows:
                guard = guards / f"{row.without}.off"
                if row.without:
                    guard.touch()
                told = ours.migrate([*OPTIONS, *row.options])
                guard.unlink(missing_ok=True)
                moves.append((row, told))
    return moves


def _table(found: dict[str, list[dict[str, Any]]], runs: int) -> Table:
    made = Table(
        title=f"{DEVICES} accelerators of {DEVICE_MEMORY >> 20} MiB, a nic at 100 MB/s, vCPUs at 200 MB/s, 10 Gbit/s: "
        f"{runs} migrations each, ms",
        title_justify="left",
        box=box.MARKDOWN,
    )
    made.add_column("")
    for name in ("guest's gap p50", "p90", "p99", "max", "downtime p50", "devices p50", "last RAM p50", "total p50"):
        made.add_column(name, justify="right")
    made.add_column("device MB in it", justify="right")
    for row, told in found.items():
        gaps = np.percentile([each["guest_gap_ms"] for each in told], [50, 90, 99, 100])
        middle = [
            np.median([each["downtime_ms"] for each in told]),
            np.median([each["downtime"]["devices"] for each in told]),
            np.median([each["downtime"]["last_ram"] for each in told]),
            np.median([each["total_ms"] for each in told]),
            np.median([sum(device["stop_copy_bytes"] for device in each["devices"]) for each in told]) / 1e6,
        ]
        made.add_row(row, *(f"{value:.0f}" for value in (*gaps, *middle)))
    return made
