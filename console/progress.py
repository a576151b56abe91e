"""A migration as it goes on: a live display on a terminal, a few lines elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from switchover.v1.host_pb2 import DeviceProgress, Progress, WatchEventsResponse

from common.machine.quantities import format_duration, format_rate, format_size
from console.daemon import printable

__all__ = ["LiveProgress", "PlainProgress", "ProgressDisplay", "open_progress"]

PLAIN_INTERVAL_MS = 5_000
REFRESH_PER_SECOND = 8
BAR_WIDTH = 40


class ProgressDisplay(Protocol):
    """Shows the events of one migration; a context manager that leaves the screen as it should be."""

    def feed(self, event: WatchEventsResponse) -> None:
        """Take the next event."""

    def note(self, text: str) -> None:
        """Show a line of our own."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_progress(console: Console) -> LiveProgress | PlainProgress:
    """Return the display that suits where `console` goes."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class PlainProgress(AbstractContextManager["PlainProgress"]):
    """A line for each phase and each round, and one every five seconds inside a long round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_ms: int | None = None
        self._now_ms = 0
        self._round: tuple[str, int] | None = None
        self._shown_ms = 0

    def __exit__(self, *_: object) -> None:
        """Nothing to restore."""

    def feed(self, event: WatchEventsResponse) -> None:
        """Print the event if it is worth a line."""
        self._started_ms = event.unix_ms if self._started_ms is None else self._started_ms
        self._now_ms = event.unix_ms
        match event.WhichOneof("event"):
            case "phase":
                self.note(event.phase)
            case "message":
                self.note(event.message)
            case "device_state" if event.device_state.state == "ERROR":
                self.note(f"{event.device_state.name} is in state ERROR")
            case "progress":
                self._progress(event.progress)

    def note(self, text: str) -> None:
        """Print a line with the time since the first event."""
        elapsed = (self._now_ms - (self._started_ms or self._now_ms)) / 1000
        self._console.print(Text(f"{elapsed:7.1f} s  {printable(text)}"), soft_wrap=True)

    def _progress(self, progress: Progress) -> None:
        if progress.phase != "precopy":
            return
        this_round = (progress.phase, progress.round)
        if progress.disconnected_ms:
            return  # it was said, and so will be what comes of it
        if this_round == self._round and self._now_ms - self._shown_ms < PLAIN_INTERVAL_MS:
            return
        self._round, self._shown_ms = this_round, self._now_ms
        self.note("  ".join(_facts(progress)))


class LiveProgress(AbstractContextManager["LiveProgress"]):
    """A display that is drawn anew several times a second, and gone when the migration has ended."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=REFRESH_PER_SECOND, transient=True)
        self._phase = "setup"
        self._progress = Progress()
        self._device_states: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def feed(self, event: WatchEventsResponse) -> None:
        """Show the event."""
        match event.WhichOneof("event"):
            case "phase":
                self._phase = event.phase
            case "message":
                self.note(event.message)
            case "device_state":
                self._device_states[event.device_state.name] = event.device_state.state
            case "progress":
                self._progress = event.progress
                self._device_states |= {device.name: device.state for device in event.progress.devices if device.state}
        self._live.update(self._picture())

    def note(self, text: str) -> None:
        """Print a line above the display."""
        self._live.console.print(Text(printable(text), style="dim"))

    def _picture(self) -> Group:
        progress = self._progress
        if not progress.round_pages:
            return Group(Text(printable(self._phase), style="bold cyan"))
        head = Text.assemble((printable(self._phase), "bold cyan"), "  ", "  ".join(_facts(progress)))
        if progress.disconnected_ms:
            lost = f"reconnecting, for {format_duration(progress.disconnected_ms)} by now"
            head = Text.assemble(head, "  ", (lost, "bold red"))
        bar = Table.grid()  # by itself a bar does not end its line
        bar.add_row(ProgressBar(max(progress.round_pages, 1), progress.round_done_pages, width=BAR_WIDTH))
        devices = Table("device", "state", "sent", "to read now", "if stopped now", "initial data", box=None)
        known = {device.name: device for device in progress.devices}
        for name, state in self._device_states.items():
            devices.add_row(Text(printable(name)), Text(printable(state)), *_device_facts(known.get(name)))
        decision = Text(printable(progress.decision), style="dim")
        return Group(head, bar, *([devices] if self._device_states else []), decision)


def _facts(progress: Progress) -> list[str]:
    percent = 100 * progress.round_done_pages // max(progress.round_pages, 1)
    facts = [
        f"round {progress.round}",
        f"{progress.round_done_pages:,} of {progress.round_pages:,} pages ({percent} %)",
        f"{format_rate(progress.bandwidth)} applied",
        *([f"{format_rate(progress.dirty_rate)} dirtied"] if progress.dirty_rate >= 0 else []),
        f"{format_size(progress.sent_bytes)} sent",
    ]
    if progress.compression not in ("", "none"):
        facts.append(f"compressed with {progress.compression}")
    if progress.expected_downtime_ms >= 0:
        facts.append(f"expected downtime {format_duration(progress.expected_downtime_ms)}")
    if progress.reconnects:
        facts.append(f"reconnected {progress.reconnects} times" if progress.reconnects > 1 else "reconnected once")
    if progress.throttle_percent:
        facts.append(f"vCPUs slowed by {progress.throttle_percent} %")
    return facts


def _device_facts(device: DeviceProgress | None) -> tuple[str, str, str, str]:
    if device is None:
        return "", "", "", ""
    left = format_size(device.stop_copy_length) if device.stop_copy_length >= 0 else "not known"
    loaded = "loaded" if device.initial_data_loaded else "-"
    return format_size(device.sent_bytes), format_size(device.pending_bytes), left, loaded
