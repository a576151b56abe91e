"""How a migration ended, for people who have not read the manual: sentences first, then tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from switchover.v1.host_pb2 import Downtime, MigrationResult, PageMismatch

from common.machine.quantities import format_duration, format_size
from common.memory.layout import PAGE_SIZE
from console.daemon import printable

__all__ = ["print_summary", "sentences"]

BAR_WIDTH = 24
SHOWN_MISMATCHES = 8
SHOWN_ROUNDS = 8  # at the beginning, and as many at the end

_PARTS = {
    "pause": "stopping the vCPUs",
    "quiesce": "stopping the devices, peers first",
    "last_sync": "collecting the last dirty pages",
    "last_ram": "sending them",
    "devices": "device states, vCPUs, mappings",
    "verification": "comparing memory and devices",
    "handover": "handing over the ownership",
    "start": "starting the machine",
}


def print_summary(console: Console, result: MigrationResult, source: str) -> None:
    """Print how the migration from the daemon at `source` ended."""
    ended_well = result.result == "completed" and not result.mismatched_pages and result.reason != "DATA_LOSS"
    for number, sentence in enumerate(sentences(result, source)):
        console.print(
            Text(printable(sentence), style=("bold green" if ended_well else "bold red") if not number else "")
        )
    for page in result.mismatches[:SHOWN_MISMATCHES]:
        _print_mismatch(console, page)
    tables = [
        *([_downtime_table(result.downtime)] if result.downtime_ms > 0 else []),
        *([_rounds_table(result)] if result.rounds else []),
        *([_devices_table(result)] if result.devices else []),
    ]
    for table in tables:
        console.print()
        console.print(table)


def sentences(result: MigrationResult, source: str) -> list[str]:
    """Return what a reader should know, the most important first."""
    lines = [_outcome(result, source), _verification(result)]
    if result.downtime_ms > 0:
        lines += [_downtime(result), _guest_gap(result)]
    if result.ram.bytes:
        lines.append(_ram(result))
    if result.reconnects:
        times = "once" if result.reconnects == 1 else f"{result.reconnects} times"
        lines.append(
            f"The connection was lost and restored {times}, and there was none for "
            f"{format_duration(result.disconnected_ms)} in all; nothing was begun again."
        )
    if result.throttle_percent:
        lines.append(f"To converge, the vCPUs were slowed down by up to {result.throttle_percent} %; DMA was not.")
    for tracking in result.dirty_tracking:
        lines.append(
            f'DMA in address space "{tracking.container}" was tracked by {_method(tracking.method)}: {tracking.reason};'
            f" {tracking.dirty_pages:,} dirty pages were found so."
        )
    return lines


def _outcome(result: MigrationResult, source: str) -> str:
    took = format_duration(result.total_ms)
    why = f": {result.error}" if result.error else ""
    code = f" [{result.reason}]" if result.reason else ""
    if result.result == "completed":
        paused = " It was paused, and is paused there." if result.paused else ""
        return f"Completed in {took}: the machine has moved from {source} to {result.destination}{why}{code}.{paused}"
    if result.result == "cancelled":
        return f"Cancelled after {took}{why}{code}. The machine goes on at {source}."
    there = f"The machine is at {result.destination}."
    if result.reason == "RESOLVED":
        there = f"The machine counts as the one of {result.destination}, which has not said whether it runs."
    where = {
        "source": f"The machine goes on at {source}.",
        "destination": there,
        "undecided": f"Whether the machine is at {source} or {result.destination} is not decided yet.",
    }
    return f"Failed after {took}{why}{code}. {where.get(result.owner, '')}".rstrip()


def _verification(result: MigrationResult) -> str:
    differing = [device.name for device in result.devices if device.verified == "differs"]
    if result.mismatched_pages or differing:
        parts = [f"{result.mismatched_pages:,} pages of RAM differ"] if result.mismatched_pages else []
        parts += [f"{_listed(differing)} {'differ' if len(differing) > 1 else 'differs'}"] if differing else []
        return f"NOT EQUAL: {' and '.join(parts)} at the destination."
    if result.verify == "off":
        return "Not verified: verification was off. Nothing says that memory and devices arrived intact."
    if result.verified not in ("true", "transport"):
        return "Not verified: the migration ended before memory could be compared."
    when = (
        "Verified while the machine ran on, against the copy that the source had frozen"
        if result.verify == "deferred"
        else "Verified before the machine ran at the destination"
    )
    line = f"{when}: all {result.ram.bytes // PAGE_SIZE:,} pages of RAM, read back there, equal the source's"
    compared = [device.name for device in result.devices if device.verified == "compared"]
    line += f", and so do{'es' if len(compared) == 1 else ''} {_listed(compared)}." if compared else "."
    unread = [device.name for device in result.devices if device.verified == "transport"]
    if unread:
        line += f" {_listed(unread)} cannot be read from outside: that every record arrived unchanged is all we know."
    return line


def _downtime(result: MigrationResult) -> str:
    line = f"The machine stood still for {format_duration(result.downtime_ms)}"
    moving = max(result.downtime_ms - result.downtime.verification, 0)
    if result.downtime.verification <= 0:
        line += ", from the first vCPU's stop to its start at the destination."
    else:
        line += (
            f": {format_duration(moving)} to be moved, which is what --max-downtime limits, and "
            f"{format_duration(result.downtime.verification)} to be compared."
        )
    if result.expected_downtime_ms >= 0 and moving > result.max_downtime_ms:
        line += (
            f" That is more than the {format_duration(result.max_downtime_ms)} accepted: "
            f"{format_duration(result.expected_downtime_ms)} were expected, by the pages and bytes that were left and "
            "the speed so far; what devices take to load is not known before."
        )
    return line


def _guest_gap(result: MigrationResult) -> str:
    if result.guest_gap_ms < 0:
        if result.paused:
            return "It stood still before and stands still now, so the guest has measured nothing."
        return "No program in the guest keeps time, so there is no measurement from the inside."
    return (
        f"The guest's own clock program saw a gap of {format_duration(result.guest_gap_ms)} "
        f"(± {format_duration(result.guest_gap_error_ms)})."
    )


def _ram(result: MigrationResult) -> str:
    ram = result.ram
    line = (
        f"RAM of {format_size(ram.bytes)}: {format_size(ram.transferred_bytes)} were sent for {ram.pages:,} pages, "
        f"{ram.zero_pages:,} of them zero pages that cost a bit each; {format_size(ram.downtime_bytes)} of it while "
        "the machine stood still."
    )
    saved = {
        "were dirty but had not changed": ram.unchanged_pages,
        "equalled another": ram.equal_pages,
        "went as the difference to what was sent before": ram.delta_pages,
        "were compressed": ram.compressed_pages,
    }
    if any(saved.values()):
        line += f" Of the others {_listed([f'{pages:,} {what}' for what, pages in saved.items() if pages])}."
    return f"{line} {result.mappings:,} vIOMMU mappings moved along." if result.mappings else line


def _method(method: str) -> str:
    return {
        "device": "the devices' own logs",
        "iommu": "the IOMMU",
        "perpetual": "nobody (everything mapped counts as dirty)",
    }.get(method, method)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def _print_mismatch(console: Console, page: PageMismatch) -> None:
    rounds = ", ".join(str(number) for number in page.sent_in_rounds) or "none"
    console.print(Text(f"  page {page.page} at {page.gpa:#x}: sent in rounds {rounds}"))
    for title, lines in (("reported dirty by", page.reported), ("could be written by", page.could_have_written)):
        for line in lines or ["nobody"]:
            console.print(Text(f"      {title} {printable(line)}"))


def _downtime_table(downtime: Downtime) -> Table:
    table = Table("downtime", "ms", "", title="Where the downtime went", title_justify="left", box=None)
    table.columns[1].justify = "right"
    parts = {name: max(getattr(downtime, name), 0.0) for name in _PARTS}
    longest = max(parts.values()) or 1.0
    for name, value in parts.items():
        if name == "verification" and value == 0:
            continue
        table.add_row(_PARTS[name], f"{value:.2f}", "█" * round(BAR_WIDTH * value / longest))
    return table


def _rounds_table(result: MigrationResult) -> Table:
    table = Table(
        *("round", "pages", "zero", "sent", "time", "dirty after it", "decision"),
        title="Rounds of pre-copy",
        title_justify="left",
        box=None,
    )
    for column in table.columns[:6]:
        column.justify = "right"
    hidden = len(result.rounds) - 2 * SHOWN_ROUNDS
    for number, entry in enumerate(result.rounds):
        if hidden > 1 and SHOWN_ROUNDS <= number < SHOWN_ROUNDS + hidden:
            if number == SHOWN_ROUNDS:
                table.add_row("…", *[""] * 5, f"{hidden:,} more rounds, in full with --json")
            continue
        table.add_row(
            str(entry.number),
            f"{entry.pages:,}",
            f"{entry.zero_pages:,}",
            format_size(entry.sent_bytes),
            format_duration(entry.ms),
            f"{entry.dirty_pages:,}",
            Text(printable(entry.decision)),
        )
    return table


def _devices_table(result: MigrationResult) -> Table:
    table = Table(
        *("device", "kind", "sent while it ran", "sent while it stood", "verified"),
        title="Devices",
        title_justify="left",
        box=None,
    )
    for column in table.columns[2:4]:
        column.justify = "right"
    for device in result.devices:
        table.add_row(
            Text(printable(device.name)),
            Text(printable(device.kind)),
            format_size(device.precopy_bytes),
            format_size(device.stop_copy_bytes),
            Text(printable(device.verified)),
        )
    return table
