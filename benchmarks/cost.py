"""What a migration costs: time of an idle machine, growth with RAM, a sparse machine of 1 TiB, memory of processes."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from switchover.v1.host_pb2 import MigrateRequest, MigrationResult, WatchEventsRequest
from switchover.v1.migration_pb2 import VERIFY_MODE_DEFERRED, VERIFY_MODE_OFF, VERIFY_MODE_STRICT

from console.daemon import daemon
from console.demo import corpus
from console.launch import running_host, wait_until_it_runs

__all__ = ["growth", "idle", "memory", "sparse"]

GIB = 1 << 30
VERIFICATIONS = {"strict": VERIFY_MODE_STRICT, "deferred": VERIFY_MODE_DEFERRED, "off": VERIFY_MODE_OFF}
MORE_FILES = ("/usr",)  # the interpreter's own libraries do not fill 4 GiB
ALL_DEVICES = ("nic", "nvme", "accelerator")


@contextmanager
def two_hosts(ram: int, devices: Sequence[str] = (), *, full: bool = True) -> Iterator[tuple[str, str, Path]]:
    """Run two host daemons, the first with a machine (`full`: of real files); yield their addresses and directory."""
    images = json.dumps(list(map(str, [*corpus(), *MORE_FILES])) if full else [])
    lines = ['name = "bench"', "[ram]", f"size = {ram}", f"image = {images}"]
    lines += ["[[guest]]", 'program = "clock"']
    for kind in devices:
        lines += ["[[device]]", f'kind = "{kind}"', "[[guest]]", 'program = "driver"', f'device = "{kind}0"']
    with tempfile.TemporaryDirectory(prefix="sw-bench-") as workspace:
        directory = Path(workspace)
        machine = directory / "machine.toml"
        machine.write_text("\n".join(lines) + "\n")
        with running_host(directory / "a", machine) as a, running_host(directory / "b", None) as b:
            wait_until_it_runs(a, directory / "a")
            yield a, b, directory


def move(source: str, destination: str, verify: str) -> MigrationResult:
    """Migrate once; raise RuntimeError unless it completes."""
    with daemon(source) as stub:
        request = MigrateRequest(destination=destination, verify=VERIFICATIONS[verify])
        session_id = stub.Migrate(request).session_id
        for event in stub.WatchEvents(WatchEventsRequest(session_id=session_id)):
            if event.HasField("result"):
                if event.result.result != "completed":
                    raise RuntimeError(event.result.error)
                return event.result
    raise RuntimeError("no result")


def table(title: str, *columns: str) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def median(values: Sequence[float]) -> str:
    """Return median, minimum and maximum."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def ping_pong(ram: int, runs: int, devices: Sequence[str] = ()) -> dict[str, list[MigrationResult]]:
    """Move a machine to and fro, each verification in turn, and return the results by verification."""
    results: dict[str, list[MigrationResult]] = {verify: [] for verify in VERIFICATIONS}
    with two_hosts(ram, devices) as (a, b, _):
        for _ in range(runs):
            for verify, found in results.items():
                found.append(move(a, b, verify))
                a, b = b, a
    return results


def _rows(made: Table, label: str, results: dict[str, list[MigrationResult]]) -> None:
    for verify, found in results.items():
        made.add_row(
            f"{label}, {verify}",
            median([result.total_ms for result in found]),
            median([result.downtime_ms for result in found]),
            median([result.downtime.verification for result in found]),
            median([result.guest_gap_ms for result in found]),
            median([result.ram.transferred_bytes / 1e6 for result in found]),
        )


COLUMNS = ("machine, verification", "total ms", "downtime ms", "of it verification", "guest's gap ms", "MB sent")


def idle(runs: int) -> None:
    """Time an idle 1 GiB machine over localhost, without and with devices."""
    made = table(f"Idle machine of 1 GiB over localhost: median (min-max) of {runs}", *COLUMNS)
    _rows(made, "no devices", ping_pong(GIB, runs))
    _rows(made, "nic, nvme, accelerator", ping_pong(GIB, runs, ALL_DEVICES))
    Console(width=120).print(made)


def growth(runs: int) -> None:
    """Time machines of 1, 2 and 4 GiB."""
    made = table(f"Growth with RAM, no devices: median (min-max) of {runs}", *COLUMNS)
    for gib in (1, 2, 4):
        _rows(made, f"{gib} GiB", ping_pong(gib * GIB, runs))
    Console(width=120).print(made)


def sparse(runs: int) -> None:
    """Move a machine of 1 TiB that hardly uses any of it: what grows is bitmaps (limit: 100 ms more downtime)."""
    made = table(
        f"A nic and a machine that uses little of its RAM, deferred verification: median (min-max) of {runs}, ms",
        *("RAM", "total", "downtime", "of it last sync", "last RAM", "devices", "handover", "guest's gap"),
    )
    for name, ram in (("1 GiB", GIB), ("1 TiB", GIB << 10)):
        with two_hosts(ram, ("nic",), full=False) as (a, b, _):
            found = []
            for _ in range(runs):
                found.append(move(a, b, "deferred"))
                a, b = b, a
        parts = [
            [result.total_ms for result in found],
            [result.downtime_ms for result in found],
            *([getattr(result.downtime, part) for result in found] for part in ("last_sync", "last_ram", "devices")),
            [result.downtime.handover for result in found],
            [result.guest_gap_ms for result in found],
        ]
        made.add_row(name, *map(median, parts))
    Console(width=150).print(made)


def memory(runs: int) -> None:
    """Measure what daemons and machine processes hold beside guest RAM, after `runs` migrations (limit: 256 MiB)."""
    made = table(f"Memory beside guest RAM after {runs} migrations of 1 GiB, all devices", "host", "Pss MiB")
    with two_hosts(GIB, ALL_DEVICES) as (a, b, directory):
        for _ in range(runs):
            move(a, b, "strict")
            a, b = b, a
        for name in ("a", "b"):
            made.add_row(f"{name}: daemon and machine process", f"{_pss(directory / name) / (1 << 20):.0f}")
    Console(width=120).print(made)


def _pss(state_dir: Path) -> int:
    """Return the Pss, in bytes, of a host's daemon and machine process without guest RAM."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            ours = os.fsencode(state_dir) in b" ".join(command) and any(
                module in command for module in (b"console", b"common.machine")
            )
            maps = (entry / "smaps").read_text() if ours else ""
        except OSError:
            continue
        counted = True
        for line in maps.splitlines():
            first = line.split(maxsplit=1)[0]
            if "-" in first:
                counted = "memfd:switchover-ram" not in line
            elif first == "Pss:" and counted:
                total += int(line.split()[1]) * 1024
    return total
