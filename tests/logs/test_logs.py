"""Lines for people and for programs, and whose they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
import structlog

from common.logs import LOG_FORMAT, LogFormat, configure_logs, enter_session, leave_session


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(LOG_FORMAT, raising=False)
    yield
    leave_session()
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    streams = capsys.readouterr()
    assert streams.out == ""
    return [json.loads(line) for line in streams.err.splitlines()]


def test_a_line_says_which_migration_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogFormat.JSON)
    log = structlog.get_logger()
    enter_session("5e55")
    log.info("phase", phase="setup")
    other = threading.Thread(target=lambda: log.info("of nobody"))
    other.start()
    other.join()
    leave_session()
    log.warning("between")
    first, of_nobody, between = lines(capsys)
    assert (first["event"], first["phase"], first["session"], first["level"]) == ("phase", "setup", "5e55", "info")
    assert "session" not in of_nobody and "session" not in between
    assert str(first["timestamp"]).endswith("Z")


def test_a_process_of_one_migration_says_it_for_all_its_threads(capsys: pytest.CaptureFixture[str]) -> None:
    running = "5e55"
    configure_logs(LogFormat.JSON, session=lambda: running)
    structlog.get_logger().info("one")
    enter_session("0c0")
    structlog.get_logger().info("two")
    leave_session()
    running = ""
    structlog.get_logger().info("three")
    assert [line.get("session") for line in lines(capsys)] == ["5e55", "0c0", None]


def test_an_exception_is_one_line_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogFormat.JSON)
    try:
        raise OSError("disk full")
    except OSError:
        structlog.get_logger().exception("defect")
    (line,) = lines(capsys)
    assert "disk full" in json.dumps(line["exception"])


def test_children_log_as_their_daemon_does(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogFormat.JSON)
    configure_logs()  # as the machine process does
    structlog.get_logger().info("child")
    assert lines(capsys)[0]["event"] == "child"
    configure_logs(LogFormat.CONSOLE)
    structlog.get_logger().info("for people", device="nic0")
    text = capsys.readouterr().err
    assert "for people" in text and "device=nic0" in text
