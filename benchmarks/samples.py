"""What was measured of one move of RAM, and the table in which movers stand beside each other."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

__all__ = ["Sample", "read", "spread", "table", "time_ratio", "write"]

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Sample:
    """One move: seconds and bytes; None where a mover has no such thing.

    `transfer_s` is from the first page until all is at the destination and a machine runs there, `whole_s` from the
    command on, with all that is set up first. The CPU seconds are those of `transfer_s`, of all processes of an end.
    `equal_bytes` are pages that were not sent because they equal one that had been.
    """

    ram_bytes: int
    transfer_s: float
    sent_bytes: int
    source_cpu_s: float
    destination_cpu_s: float
    whole_s: float | None = None
    downtime_s: float | None = None
    equal_bytes: int | None = None


def read(path: Path, scene: str) -> dict[str, list[Sample]]:
    """Return the samples of a scene that a file has, by row."""
    found: dict[str, list[Sample]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        kept = json.loads(line)
        if kept["scene"] == scene:
            found.setdefault(kept["row"], []).append(Sample(**kept["sample"]))
    return found


def write(path: Path, scene: str, row: str, sample: Sample) -> None:
    """Append a sample to a file."""
    with path.open("a") as file:
        file.write(json.dumps({"scene": scene, "row": row, "sample": asdict(sample)}) + "\n")


def spread(values: Iterable[float | None], digits: int) -> str:
    """Return median, minimum and maximum; a dash if there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{median(known, digits)} ({min(known):.{digits}f}–{max(known):.{digits}f})"


def median(values: Iterable[float], digits: int) -> str:
    """Return the median."""
    return f"{statistics.median(values):.{digits}f}"


def time_ratio(samples: Sequence[Sample], reference: Sequence[Sample] | None) -> float | None:
    """Return how many times as long as a reference it takes, by medians; None without one of them."""
    if not samples or not reference:
        return None
    time, against = (statistics.median(sample.transfer_s for sample in some) for some in (samples, reference))
    return time / against


def table(
    title: str,
    found: Mapping[str, Sequence[Sample]],
    missing: Mapping[str, str],
    references: Mapping[str, str],
    *,
    speed: bool,
) -> Table:
    """Return a table, as Markdown, of the rows of `found`; `missing` says of some why they are not there.

    `references` are the rows with which all are compared and what the columns are called: by speed, or else by time.
    """
    made = Table(title=title, title_justify="left", box=box.MARKDOWN)
    columns = (
        *("", "GB/s", *references.values(), "transfer s", "whole s", "downtime ms", "MB sent"),
        *("equal pages %", "CPU s/GiB source", "destination"),
    )
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row, samples in found.items():
        if not samples:
            made.add_row(row, missing.get(row, "–"))
            continue
        ratios = [time_ratio(samples, found.get(reference)) for reference in references]
        equal = [sample.equal_bytes for sample in samples]
        made.add_row(
            row,
            spread((sample.ram_bytes / sample.transfer_s / 1e9 for sample in samples), 2),
            *("–" if each is None else f"{1 / each if speed else each:.2f}" for each in ratios),
            spread((sample.transfer_s for sample in samples), 2),
            spread((sample.whole_s for sample in samples), 2),
            spread((None if sample.downtime_s is None else sample.downtime_s * 1000 for sample in samples), 0),
            median((sample.sent_bytes / 1e6 for sample in samples), 0),
            "–" if None in equal else median((100 * (each or 0) / samples[0].ram_bytes for each in equal), 1),
            median((sample.source_cpu_s / sample.ram_bytes * GIB for sample in samples), 2),
            median((sample.destination_cpu_s / sample.ram_bytes * GIB for sample in samples), 2),
        )
    return made
