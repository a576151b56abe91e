"""A daemon and its machine, and events as they happen, for people."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text
from switchover.v1.host_pb2 import GetMachineResponse, Machine, WatchEventsResponse

from common.machine.quantities import format_duration, format_rate, format_size
from console.daemon import printable

__all__ = ["event_line", "print_status", "programs_table"]


def print_status(console: Console, address: str, status: GetMachineResponse) -> None:
    """Print what the daemon at `address` says of itself and its machine."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style))

    line(f"{address}: Switchover {status.version}, {status.role}", "bold")
    if status.migrating:
        line(f"Migration {status.session_id} is running.")
    if status.ownership == "COMMITTING":
        line(
            f"Who owns the machine is not decided until {status.peer} answers (see switchover resolve).", "bold yellow"
        )
    if not status.HasField("machine"):
        line(f"No machine; it went to {status.gone_to}." if status.gone_to else "No machine.")
        return
    machine = status.machine
    line(f'Machine "{machine.name}" ({machine.uuid}) is {machine.state}; process {machine.pid}.')
    if machine.failure:
        line(f"It has failed: {machine.failure}", "bold red")
    line(f"RAM: {format_size(machine.ram_bytes)}, of which {format_size(machine.ram_allocated_bytes)} hold data.")
    for table in _tables(machine):
        console.print(table)
    for device in machine.devices:
        for note in device.notes:
            line(f"{device.name}: {note}", "yellow")
    for blocker in machine.blockers:
        line(f"It cannot migrate: {blocker}", "bold red")
    for program in machine.programs:
        for error in program.errors:
            line(f"{program.name} has found an error: {error}", "bold red")


def event_line(event: WatchEventsResponse) -> str:
    """Return an event as one line."""
    # The operator reads this beside a wall clock.
    moment = datetime.fromtimestamp(event.unix_ms / 1000).astimezone().strftime("%H:%M:%S.%f")[:-3]
    return printable(f"{moment}  {event.session_id[:8] or '-':8}  {_event_text(event)}")


def programs_table(machine: Machine) -> Table:
    """Return what the guest's programs have counted."""
    table = Table("guest program", "counters", box=None)
    for program in machine.programs:
        # A program's errors are told in words.
        counters = [f"{name} {count:,}" for name, count in sorted(program.counters.items()) if name != "errors"]
        table.add_row(*_cells(program.name, "  ".join(counters)))
    return table


def _tables(machine: Machine) -> list[Table]:
    devices = Table("device", "kind", "state", "migration", "logs its DMA", "address space", box=None)
    for device in machine.devices:
        logs = "yes" if device.dma_logging else "no"
        migration = " ".join(device.migration) or "not supported"
        devices.add_row(*_cells(device.name, device.kind, device.state, migration, logs, device.container))
    containers = Table("address space", "mappings", "tracking", "because", box=None)
    for container in machine.containers:
        containers.add_row(
            *_cells(container.name, f"{container.mappings:,}", container.tracking or "-", container.reason)
        )
    programs = programs_table(machine)
    return [table for table in (devices, containers, programs) if table.row_count]


def _cells(*texts: str) -> list[Text]:
    return [Text(printable(text)) for text in texts]


def _event_text(event: WatchEventsResponse) -> str:
    match event.WhichOneof("event"):
        case "phase":
            return f"phase: {event.phase}"
        case "progress":
            progress = event.progress
            expected = progress.expected_downtime_ms
            downtime = format_duration(expected) if expected >= 0 else "not known"
            dirtied = format_rate(progress.dirty_rate) if progress.dirty_rate >= 0 else "not known what is"
            return (
                f"round {progress.round}: {progress.round_done_pages:,} of {progress.round_pages:,} pages, "
                f"{format_rate(progress.bandwidth)} applied, {dirtied} dirtied, expected downtime {downtime}"
            )
        case "device_state":
            return f"device {event.device_state.name}: {event.device_state.state}"
        case "message":
            return event.message
        case "result":
            result = event.result
            return f"result: {result.result}" + (f": {result.error}" if result.error else "")
        case "machine_state":
            return f"machine: {event.machine_state}"
    return "an event that this version does not know"
