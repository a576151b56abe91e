"""Dirty tracking: a machine of 1 TiB, 100 000 mappings, and what each strategy costs as a guest maps more and more."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.chart import bars
from benchmarks.cost import table
from common.iommu.container import Container
from common.iommu.ranges import Strategy
from common.iommu.tracking import DeviceTraits
from common.iommu.viommu import Viommu
from common.machine.config import parse
from common.machine.launch import launch
from common.memory.bitmap import DirtyBitmap, Words, pages_of
from common.memory.layout import PAGE_SIZE
from common.memory.ram import GuestRam
from common.vfio.feature import Range
from common.vfio_user.client import VfioUserClient

__all__ = ["large", "mappings", "strategies"]

TIB = 1 << 40
GIB = 1 << 30
MACHINE = """
name = "large"
ram.size = "1TiB"
viommu.enabled = {viommu}
[[device]]
kind = "nic"
[[guest]]
program = "driver"
device = "nic0"
"""


def milliseconds(values: Sequence[float]) -> str:
    """Return median, minimum and maximum of seconds."""
    return f"{statistics.median(values) * 1e3:.1f} ({min(values) * 1e3:.1f}-{max(values) * 1e3:.1f})"


def large(runs: int) -> None:
    """Time the collection of all logs of a machine of 1 TiB that hardly uses any of it (limit: 100 ms)."""
    made = table(
        f"1 TiB of sparse RAM, one nic: median (min-max) of {runs} syncs",
        *("machine", "collected, ms", "merged, ms", "dirty pages", "RAM with data before, after, KiB"),
    )
    for viommu in ("true", "false"):
        with tempfile.TemporaryDirectory(prefix="sw-bench-") as workspace:
            directory = Path(workspace)
            file = directory / "machine.toml"
            file.write_text(MACHINE.format(viommu=viommu))
            spec = replace(parse(file), uuid=str(uuid.uuid4()))
            machine = launch(spec, directory, directory / "record.json", incarnation=1)
            machine.resume()
            time.sleep(1)
            machine.begin("bench")
            machine.start_tracking()
            before = machine.describe().ram_allocated_bytes
            collected, merged, pages = [], [], []
            for _ in range(runs):
                time.sleep(0.2)
                began = time.perf_counter()
                report = machine.sync()
                done = time.perf_counter()
                union = report.union()
                merged.append(time.perf_counter() - done)
                collected.append(done - began)
                pages.append(union.count())
            after = machine.describe().ram_allocated_bytes
            machine.end()
            machine.shutdown()
        made.add_row(
            "vIOMMU: one REPORT" if viommu == "true" else "no vIOMMU: all RAM is mapped, 9 REPORTs",
            milliseconds(collected),
            milliseconds(merged),
            f"{statistics.median(pages):.0f}",
            f"{before >> 10}, {after >> 10}",
        )
    Console(width=120).print(made)


class CountedDevice:
    """A device of another process (benchmarks.log_device) and what it is asked for about its log."""

    name = "log0"

    def __init__(self, client: VfioUserClient) -> None:
        self._client = client
        self.dma_map = client.dma_map
        self.requests = 0
        self.bitmap_bytes = 0

    def _counted(self, words: Words | None) -> Words | None:
        self.bitmap_bytes += 0 if words is None else words.nbytes
        return words

    def dma_unmap(self, iova: int, size: int, *, bitmap: bool) -> Words | None:
        return self._counted(self._client.dma_unmap(iova, size, bitmap=bitmap))

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        self.requests += 1
        return self._client.logging_start(page_size, ranges)

    def logging_stop(self) -> None:
        self.requests += 1
        self._client.logging_stop()

    def logging_report(self, iova: int, length: int, page_size: int) -> Words:
        self.requests += 1
        words = self._client.logging_report(iova, length, page_size)
        self._counted(words)
        return words

    def write(self, iovas: Sequence[int]) -> None:
        """Let it log writes to pages."""
        self._client.region_write(0, 0, np.array(iovas, "<u8").tobytes())


@contextmanager
def device() -> Iterator[CountedDevice]:
    """Run a device in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="sw-bench-") as workspace:
        path = Path(workspace) / "device.sock"
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.log_device", str(path)])
        while not path.exists():
            time.sleep(0.01)
        with VfioUserClient.connect(path, "log0", timeout=20) as client:
            yield CountedDevice(client)
        process.wait()


def container(card: CountedDevice, ram: GuestRam, strategy: Strategy, *, logs: bool = True) -> Container:
    """Return an address space behind a vIOMMU of 48 bits; without `logs` the device is not asked."""
    traits = DeviceTraits(card.name, dma_logging=logs, report_ranges=True)
    return Container("bench", ram, [card], [traits], viommu=Viommu(48), strategy=strategy)


def mappings(runs: int) -> None:
    """Time one sync with 100 000 live mappings, one of which has changed since the last (limit: 100 ms)."""
    made = table(
        f"One sync with 100 000 live mappings of a page: median (min-max) of {runs}",
        *("IOVAs, pages written", "ms", "REPORTs"),
    )
    with GuestRam.create(GIB) as ram, device() as card:
        for name, step in (("side by side", PAGE_SIZE), ("1 MiB apart", 1 << 20)):
            for written in (1000, 100_000):
                space = container(card, ram, "auto")
                iovas = [index * step for index in range(100_000)]
                for index, iova in enumerate(iovas):
                    space.map(iova, PAGE_SIZE, index * PAGE_SIZE)
                dirty = DirtyBitmap(ram.layout.pages)
                space.start_tracking(dirty)
                chance = random.Random(1)
                times, reports = [], 0
                for _ in range(runs):
                    sample = chance.sample(iovas, written)
                    for at in range(0, written, 50_000):
                        card.write(sample[at : at + 50_000])
                    changed = chance.randrange(len(iovas))
                    space.unmap(iovas[changed], PAGE_SIZE)
                    space.map(iovas[changed], PAGE_SIZE, changed * PAGE_SIZE)
                    began = time.perf_counter()
                    reports = space.sync().reports
                    times.append(time.perf_counter() - began)
                    if dirty.take().any() != bool(written):
                        raise RuntimeError("what was written is not dirty")
                space.stop_tracking()
                made.add_row(f"{name}, {written}", milliseconds(times), str(reports))
    Console(width=120).print(made)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a guest uses `LIVE` mappings of a page: how many change between two syncs, and where the new ones are."""

    name: str
    changes: int
    # From the number of the mapping, counted from the first one ever, to its IOVA.
    place: Callable[[int], int]


LIVE = 500
WRITES = 200
SYNCS = 10
TOP = 0xFFF0_0000
STRATEGIES: tuple[Strategy | str, ...] = ("auto", "aperture", "minmax", "mapped", "perpetual")


def _down(number: int) -> int:
    """Go down from the top of 32 bits, a page free beside each, and never back."""
    return TOP - 2 * PAGE_SIZE * (number + 1)


def _again(number: int) -> int:
    """Use the addresses of what is gone again."""
    return _down(number % LIVE)


def _scattered(number: int) -> int:
    """Lie anywhere in 40 bits."""
    return (number * 0x9E37_79B1 & 0xFFF_FFFF) * PAGE_SIZE


BEHAVIOURS = (
    Behaviour("calm", 0, _down),
    Behaviour("remapping", LIVE // 10, _again),
    Behaviour("moving", LIVE // 10, _down),
    Behaviour("churning", LIVE, _down),
    Behaviour("scattered", LIVE // 10, _scattered),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a strategy costs for one sync, on average: requests, bytes of bitmaps, pages, seconds."""

    requests: float
    bitmap_bytes: float
    excess_pages: float
    sync_s: float


def _measure(card: CountedDevice, ram: GuestRam, behaviour: Behaviour, strategy: str) -> Cost:
    logs = strategy != "perpetual"
    space = container(card, ram, strategy if logs else "auto", logs=logs)  # type: ignore[arg-type]  # a Strategy
    chance = random.Random(7)
    live: dict[int, int] = {}  # IOVA → RAM page
    count = 0

    def map_one() -> None:
        nonlocal count
        iova, page = behaviour.place(count), count % ram.layout.pages
        space.map(iova, PAGE_SIZE, page * PAGE_SIZE)
        live[iova] = page
        count += 1

    def write(iovas: Sequence[int]) -> None:
        card.write(iovas)
        written.update(live[iova] for iova in iovas)

    for _ in range(LIVE):
        map_one()
    dirty = DirtyBitmap(ram.layout.pages)
    card.requests = card.bitmap_bytes = excess = 0
    spent = 0.0
    space.start_tracking(dirty)
    for _ in range(SYNCS):
        written: set[int] = set()
        write(chance.sample(list(live), WRITES // 2))
        for iova in list(live)[: behaviour.changes]:
            space.unmap(iova, PAGE_SIZE)
            del live[iova]
            map_one()
        write(chance.sample(list(live), WRITES // 2))
        began = time.perf_counter()
        space.sync()
        spent += time.perf_counter() - began
        marked = set(pages_of(dirty.take()).tolist())
        if not written <= marked:
            raise RuntimeError(f"{behaviour.name}, {strategy}: {len(written - marked)} pages are lost")
        excess += len(marked) - len(written)
    space.stop_tracking()
    for iova in live:
        space.unmap(iova, PAGE_SIZE)
    return Cost(card.requests / SYNCS, card.bitmap_bytes / SYNCS, excess / SYNCS, spent / SYNCS)


def strategies(runs: int, plot: Path | None = None) -> None:
    """Compare strategies over guests from calm to churning; `plot` is where the chart goes."""
    made = table(
        f"{LIVE} mappings of a page, {WRITES} pages written between two syncs, per sync: medians of {runs}",
        *("guest", "strategy", "requests", "bitmaps, KiB", "pages in excess", "sync, ms"),
    )
    excess: dict[str, dict[str, float]] = {}
    spent: dict[str, dict[str, float]] = {}
    with GuestRam.create(GIB) as ram, device() as card:
        for behaviour in BEHAVIOURS:
            excess[behaviour.name], spent[behaviour.name] = {}, {}
            for strategy in STRATEGIES:
                costs = [_measure(card, ram, behaviour, strategy) for _ in range(runs)]
                requests, bitmap_bytes, pages, seconds = (
                    statistics.median(getattr(cost, name) for cost in costs) for name in Cost.__slots__
                )
                excess[behaviour.name][strategy] = pages
                spent[behaviour.name][strategy] = seconds * 1e3
                made.add_row(
                    *(behaviour.name, strategy, f"{requests:.1f}", f"{bitmap_bytes / 1024:.0f}"),
                    *(f"{pages:.1f}", f"{seconds * 1e3:.2f}"),
                )
    Console(width=120).print(made)
    if plot is not None:
        panels = {"pages marked in excess of those written, per sync": excess, "milliseconds for a sync": spent}
        plot.write_text(bars(panels, STRATEGIES))
