"""Switchover beside QEMU, plain sockets and iperf3: the same RAM over the same link, in turns.

All that is moved lies in shared memory that was touched before. QEMU and sockets move a file into another one; our
machine has the same bytes in its RAM, and goes to and fro. What each figure means is in docs/benchmarks.md.
"""

from __future__ import annotations

import re
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console

from benchmarks import plain, qemu
from benchmarks.chart import spans
from benchmarks.link import Link, open_link
from benchmarks.our_hosts import OurHosts, UnknownOptionError, open_hosts
from benchmarks.ram_file import ZERO_FRACTION, write_files, write_random
from benchmarks.samples import Sample, read, table, write

__all__ = ["SCENES", "Scene", "compare"]

MIB, GIB = 1 << 20, 1 << 30
# Real files, of which the distribution's packages bring more than any scene needs: programs, libraries, data.
CORPUS = Path("/usr")
SHARED_MEMORY = Path("/dev/shm")  # RAM it is to be


class NotHereError(Exception):
    """A peer is not on this host."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where rows of a scene move RAM: the link, files with the RAM of either end, our hosts."""

    link: Link
    directory: Path
    source_ram: Path
    destination_ram: Path
    hosts: OurHosts


def _require_unlimited(link: Link) -> None:
    if link.limit is not None:
        raise NotHereError("not here: a link with a limit, for which it takes root")


class Row(Protocol):
    """A mover and its options."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    def move(self, stage: Stage) -> Sample:
        """Move all of RAM once. NotHereError without the mover, OSError if it fails."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A bare mover in Python, which `module` is at both ends."""

    name: str
    streams: int
    module: str = "benchmarks.plain"

    def move(self, stage: Stage) -> Sample:
        _require_unlimited(stage.link)
        return plain.move(stage.link, stage.source_ram, stage.destination_ram, self.streams, self.module)


def _sockets(streams: int) -> Plain:
    return Plain(f"plain sockets, {streams}", streams)


@dataclass(frozen=True, slots=True)
class Iperf3:
    """iperf3."""

    streams: int

    @property
    def name(self) -> str:
        return f"iperf3, {self.streams}"

    def move(self, stage: Stage) -> Sample:
        if not plain.has_iperf3():
            raise NotHereError("not here: iperf3")
        _require_unlimited(stage.link)
        return plain.move_by_iperf3(stage.link, stage.source_ram.stat().st_size, self.streams)


@dataclass(frozen=True, slots=True)
class Qemu:
    """QEMU, with capabilities and parameters as its monitor names them."""

    kind: str
    capabilities: Sequence[str] = ()
    parameters: dict[str, str | int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"QEMU, {self.kind}"

    def move(self, stage: Stage) -> Sample:
        program = qemu.find_qemu()
        if program is None:
            raise NotHereError("not here: qemu-system-x86_64")
        files = stage.source_ram, stage.destination_ram
        return qemu.move(program, stage.link, stage.directory, *files, self.capabilities, self.parameters)


@dataclass(frozen=True, slots=True)
class Ours:
    """`switchover migrate` with options."""

    options: str

    @property
    def name(self) -> str:
        return self.options

    def move(self, stage: Stage) -> Sample:
        try:
            return stage.hosts.move(shlex.split(self.options))
        except UnknownOptionError as error:
            raise NotHereError("not here: an option that this version does not have") from error


def _multifd(channels: int, level: int | None = None) -> Qemu:
    parameters: dict[str, str | int] = {"multifd-channels": channels}
    if level is None:
        return Qemu(f"multifd {channels}", ("multifd",), parameters)
    parameters |= {"multifd-compression": "zstd", "multifd-zstd-level": level}
    return Qemu(f"multifd {channels}, zstd {level}", ("multifd",), parameters)


PLAIN_ZSTD = Plain("plain sockets, 2, zstd 1", 2, "benchmarks.plain_zstd")
PLAIN_GRPC = Plain("plain gRPC, 1", 1, "benchmarks.plain_grpc")
DEFAULT = Qemu("default channel")
XBZRLE = Qemu("xbzrle", ("xbzrle",))


@dataclass(frozen=True, slots=True)
class Scene:
    """What is moved over which link (bytes per second; None: loopback), by whom, and whom all are compared with."""

    title: str
    rate: float | None
    files: bool
    ram_bytes: int
    rows: Sequence[Row]
    references: Sequence[Row]


LOOPBACK_ROWS: Sequence[Row] = (
    *(_sockets(1), _sockets(2), _sockets(4), PLAIN_GRPC, Iperf3(1), Iperf3(2)),
    *(DEFAULT, _multifd(2), _multifd(4), _multifd(2, 1), _multifd(4, 1), XBZRLE),
    Ours("--verify off"),
    Ours("--verify off --lanes 2"),
    Ours("--verify deferred"),
    Ours("--verify off --lane-kind tcp"),
    Ours("--verify off --lane-kind tcp --lanes 2"),
    Ours("--verify off --lane-kind tcp --lanes 4"),
    Ours("--verify deferred --lane-kind tcp --lanes 2"),
    Ours("--verify off --lane-kind tcp --lanes 2 --compress auto"),
)
LINK_ROWS: Sequence[Row] = (
    *(_sockets(1), PLAIN_ZSTD, DEFAULT, _multifd(2), _multifd(2, 1), _multifd(4, 1), XBZRLE),
    Ours("--verify off"),
    Ours("--verify off --lane-kind tcp --lanes 2"),
    Ours("--verify off --compress lz4"),
    Ours("--verify off --compress zstd"),
    Ours("--verify off --compress auto"),
    Ours("--verify off --compress auto --lanes 2"),
    Ours("--verify off --compress auto --lane-kind tcp --lanes 2"),
    Ours("--verify deferred --compress auto --lanes 2"),
)
LINK_REFERENCES = (DEFAULT, _multifd(2, 1), _multifd(4, 1))
SCENES = {
    "loopback": Scene(
        "loopback, incompressible",
        None,
        False,
        2 * GIB,
        LOOPBACK_ROWS,
        (DEFAULT, _multifd(2), _multifd(4), _sockets(2), PLAIN_GRPC),
    ),
    "loopback-files": Scene("loopback, real files", None, True, 2 * GIB, LOOPBACK_ROWS, LINK_REFERENCES),
    "link-10G": Scene("10 Gbit/s, real files", 10e9 / 8, True, 2 * GIB, LINK_ROWS, LINK_REFERENCES),
    "link-1G": Scene("1 Gbit/s, real files", 1e9 / 8, True, 1 * GIB, LINK_ROWS, LINK_REFERENCES),
    "link-100M": Scene("100 Mbit/s, real files", 100e6 / 8, True, 256 * MIB, LINK_ROWS, LINK_REFERENCES),
}


def compare(
    runs: int,
    name: str,
    *,
    ram: int | None = None,
    only: Sequence[str] = (),
    kept: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Let the rows of a scene move RAM in turns until each has done so `runs` times, and print the table.

    `only` are patterns of names of rows; without one it is all of them. `kept` is a file of samples: those of earlier
    runs count too, and new ones are added. `plot` is where the chart goes.
    """
    console = Console(width=300)
    scene = SCENES[name]
    rows = [row for row in scene.rows if not only or any(re.search(part, row.name) for part in only)]
    size = ram or scene.ram_bytes
    earlier = read(kept, name) if kept is not None else {}
    found = {row.name: earlier.get(row.name, []) for row in rows}
    missing: dict[str, str] = {}

    def next_row() -> Row | None:
        wanted = [row for row in rows if row.name not in missing and len(found[row.name]) < runs]
        return min(wanted, key=lambda row: len(found[row.name]), default=None)

    if next_row() is not None:
        with ExitStack() as stack:
            stage = _set_up(stack, scene, size)
            while (row := next_row()) is not None:
                try:
                    sample = row.move(stage)
                except NotHereError as error:
                    missing[row.name] = str(error)
                    continue
                found[row.name].append(sample)
                if kept is not None:
                    write(kept, name, row.name, sample)
    title = f"{size / GIB:g} GiB, {scene.title}: median (min–max) of {max(map(len, found.values()), default=0)}"
    by_speed = scene.rate is None
    references = {
        row.name: f"{'speed' if by_speed else 'time'} × {row.name.removeprefix('QEMU, ')}" for row in scene.references
    }
    console.print(table(title, found, missing, references, speed=by_speed))
    if plot is not None:
        plot.write_text(spans({f"{title}, GB/s": _speeds(found)}))


def _set_up(stack: ExitStack, scene: Scene, size: int) -> Stage:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sw-bench-", dir=SHARED_MEMORY)))
    image, source_ram = directory / "image", directory / "source.ram"
    if scene.files:
        report = write_files(image, size, CORPUS)
        print(
            f"{report.bytes >> 20} MiB of {report.files} files of {CORPUS}, no file twice; "
            f"{ZERO_FRACTION:.0%} of the pages are zero"
        )
    else:
        write_random(image, size)
    link = stack.enter_context(open_link(scene.rate))
    hosts = stack.enter_context(open_hosts(link, directory, image, size, source_ram))
    return Stage(link, directory, source_ram, directory / "destination.ram", hosts)


def _speeds(found: dict[str, list[Sample]]) -> dict[str, tuple[float, float, float]]:
    speeds = {
        row: [sample.ram_bytes / sample.transfer_s / 1e9 for sample in samples]
        for row, samples in found.items()
        if samples
    }
    return {row: (statistics.median(values), min(values), max(values)) for row, values in speeds.items()}
