from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import grpc
import pytest
from fake_host import SESSION, FakeHost, Serving, result, story
from rich.console import Console
from switchover.v1 import host_pb2 as pb
from switchover.v1.host_pb2_grpc import HostServiceStub

from console import migration
from console.errors import CommandError
from console.exit_codes import ExitCode
from console.progress import LiveProgress, PlainProgress, open_progress


def followed(host: FakeHost, stream: io.StringIO) -> pb.MigrationResult:
    with Serving(host) as address, grpc.insecure_channel(address) as channel:
        display = open_progress(Console(file=stream, width=200))
        assert isinstance(display, PlainProgress)
        return migration.migrate(HostServiceStub(channel), pb.MigrateRequest(destination="b:1"), display)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "RETRY_S", 0.0)


def test_plain_lines_are_few_and_say_what_matters() -> None:
    stream = io.StringIO()
    assert followed(FakeHost(story(result())), stream) == result()
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    assert [line.split("  ")[1] for line in lines] == [
        "setup",
        "precopy",
        "round 0",
        "round 1",
        "worth [31m a line",
        "switchover",
        "done",
    ]
    assert lines[2] == (
        "0.2 s  round 0  0 of 16,384 pages (0 %)  0 B/s applied  0 B/s dirtied  0 B sent  expected downtime 55.0 ms"
    )


def test_a_long_round_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    display = PlainProgress(Console(file=stream, width=200))
    for second in range(12):
        progress = pb.Progress(phase="precopy", round=0, round_pages=100, round_done_pages=second)
        display.feed(pb.WatchEventsResponse(unix_ms=1_000 * second + 1, progress=progress))
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["0.0", "5.0", "10.0"]


def test_plain_lines_have_nothing_that_is_not_known() -> None:
    stream = io.StringIO()
    display = PlainProgress(Console(file=stream, width=200))
    display.feed(pb.WatchEventsResponse(progress=pb.Progress(phase="precopy", dirty_rate=-1, expected_downtime_ms=-1)))
    assert "applied" in stream.getvalue()
    assert "dirtied" not in stream.getvalue() and "downtime" not in stream.getvalue()


def test_a_lost_connection_is_taken_up_again_without_repeating_lines() -> None:
    events = story(result())
    host = FakeHost([*events[:50], ConnectionError("gone")], events)
    stream = io.StringIO()
    assert followed(host, stream).result == "completed"
    text = stream.getvalue()
    assert text.count("round 0") == 1 and text.count("setup") == 1 and text.count("switchover") == 1
    assert "the connection to the daemon is lost; trying again" in text
    assert [request.session_id for request in host.requests[1:]] == [SESSION, SESSION]


def test_a_daemon_that_does_not_come_back_ends_it() -> None:
    host = FakeHost(*[[ConnectionError("gone")] for _ in range(migration.ATTEMPTS)])
    with pytest.raises(CommandError, match="the daemon cannot be reached any more") as error:
        followed(host, io.StringIO())
    assert error.value.code is ExitCode.UNREACHABLE
    assert host.streams == []


def test_a_stream_without_a_result_is_an_error() -> None:
    with pytest.raises(CommandError, match="the daemon has ended before the migration"):
        followed(FakeHost(story(result())[:-1]), io.StringIO())


class Impatient(PlainProgress):
    """An operator who presses Ctrl-C when the second round begins."""

    pressed = False

    def feed(self, event: pb.WatchEventsResponse) -> None:
        if event.progress.round == 1 and not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        super().feed(event)


def test_ctrl_c_cancels_and_waits_for_what_comes_of_it() -> None:
    asked = threading.Event()

    def after_cancel() -> Iterator[pb.WatchEventsResponse]:
        asked.set()
        assert host.cancelled.wait(10)
        yield story(result(result="cancelled"))[-1]

    host = FakeHost(story(result()), after_cancel())
    stream = io.StringIO()
    with Serving(host) as address, grpc.insecure_channel(address) as channel:
        display = Impatient(Console(file=stream, width=200))
        ended = migration.migrate(HostServiceStub(channel), pb.MigrateRequest(), display)
    assert asked.is_set()
    assert ended.result == "cancelled"
    assert "cancelling; Ctrl-C again to leave the migration to itself" in stream.getvalue()


def test_the_live_display_shows_devices_and_leaves_nothing() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=True)
    display = open_progress(console)
    assert isinstance(display, LiveProgress)
    with display:
        for event in story(result())[:-1]:
            display.feed(event)
        display._live.refresh()
    text = stream.getvalue()
    assert "STOP_COPY" in text and "round 1" in text and "expected downtime" in text
    assert "worth [31m a line" in text
    assert text.endswith("\x1b[2K")  # the last thing is to wipe the display's last line


def test_the_bar_has_a_line_of_its_own() -> None:
    stream = io.StringIO()
    with LiveProgress(Console(file=stream, width=80, force_terminal=True, color_system=None)) as display:
        for event in story(result())[:-1]:
            display.feed(event)
        display._live.refresh()
    headers = [line for line in stream.getvalue().splitlines() if "to read now" in line]
    assert headers and not any("━" in line for line in headers)


def test_a_lost_connection_is_shown_until_it_is_there_again() -> None:
    lost = pb.Progress(phase="precopy", round_pages=100, disconnected_ms=2500)
    again = pb.Progress(phase="precopy", round_pages=100, reconnects=2)
    stream = io.StringIO()
    with LiveProgress(Console(file=stream, width=200, force_terminal=True)) as display:
        for progress, shown in ((lost, "reconnecting, for 2.50 s by now"), (again, "reconnected 2 times")):
            display.feed(pb.WatchEventsResponse(progress=progress))
            display._live.refresh()
            assert shown in stream.getvalue()
    plain = io.StringIO()
    lines = PlainProgress(Console(file=plain, width=200))
    for progress in (lost, again):
        lines.feed(pb.WatchEventsResponse(progress=progress))
    assert plain.getvalue().count("\n") == 1 and "reconnected 2 times" in plain.getvalue()
