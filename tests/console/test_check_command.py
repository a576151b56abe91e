from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from common.conformance.check import Check, Outcome, Result
from console import cli
from console.check import document, junit, selected
from console.errors import CommandError

DOOMED = Path(__file__).parents[1] / "conformance" / "doomed_server.py"
CHECK = Check("states", "initial", "A device begins in RUNNING.", lambda _lab: None)
RESULTS = [
    Result(CHECK, Outcome.PASS, "", "a", "b", 0.25),
    Result(CHECK, Outcome.FAIL, "it begins in \x1b[31mSTOP <&>", "DEVICE_FEATURE", "", 0.5),
    Result(CHECK, Outcome.UNKNOWN, "it cannot be migrated", "", "", 0.0),
]


def command(how: str) -> str:
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(DOOMED))} {how} {{socket}}"


def switchover(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["switchover", "check", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        ((), 2, "give SOCKET or --command"),
        (("a.sock", "--command", "b {socket}"), 2, "give SOCKET or --command"),
        (("--command", "server"), 2, "the command has no {socket} in it"),
        (("--command", "'server {socket}"), 2, "No closing quotation"),
        (("a.sock", "--only", "everything"), 2, 'no check is called "everything"'),
        (("a.sock", "--timeout", "0s"), 2, '"0s" is not more than 0'),
        (("a.sock", "--junit", "/nowhere/report.xml"), 2, "--junit /nowhere/report.xml: No such file"),
        (("/nowhere/a.sock",), 6, "there is no server to check: /nowhere/a.sock: No such file"),
        (("--command", "/nowhere/server {socket}"), 6, "there is no server to check: /nowhere/server: No such file"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    problem: str,
) -> None:
    assert switchover(monkeypatch, *arguments) == code
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1
    assert problem in streams.err


def test_checks_are_chosen_by_name_pattern_and_subject() -> None:
    assert [item.full_name for item in selected(["states.initial"])] == ["states.initial"]
    assert {item.subject for item in selected(["dma"])} == {"dma"}
    arcs = [item.name for item in selected(["states.from-*"])]
    assert len(arcs) == 7
    assert len(selected([])) > len(selected(["dma", "states"]))
    with pytest.raises(CommandError):
        selected(["dma", "nothing"])


def test_the_report_for_programs() -> None:
    report = document("a.sock", RESULTS)
    assert (report["pass"], report["fail"], report["unknown"]) == (1, 1, 1)
    assert report["checks"][0] == {
        "name": "states.initial",
        "outcome": "pass",
        "detail": "",
        "specification": "A device begins in RUNNING.",
        "sent": "a",
        "received": "b",
        "seconds": 0.25,
    }


def test_the_report_for_test_harnesses() -> None:
    suite = ET.fromstring(junit("a.sock", RESULTS))
    assert suite.attrib | {"name": ""} == {
        "name": "",
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
        "time": "0.750",
    }
    passed, failed, skipped = suite
    assert (passed.get("classname"), passed.get("name"), len(passed)) == ("vfio-user.states", "initial", 0)
    failure = failed.find("failure")
    assert failure is not None
    assert failure.get("message") == "it begins in  [31mSTOP <&>"
    assert "specification: A device begins in RUNNING." in (failure.text or "")
    assert skipped.find("skipped") is not None


def test_a_run_reports_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--only", "negotiation.version", "--only", "description.device-info", "--timeout", "5s")
    file = tmp_path / "report.xml"
    assert switchover(monkeypatch, "--command", command("die"), *options, "--json", "--junit", str(file)) == 1
    streams = capsys.readouterr()
    checks = json.loads(streams.out)["checks"]
    assert [(item["name"], item["outcome"]) for item in checks] == [
        ("negotiation.version", "pass"),
        ("description.device-info", "fail"),
    ]
    assert "SIGABRT" in checks[1]["detail"]
    assert "DEVICE_GET_INFO" in checks[1]["sent"]
    assert "2 checks: 1 pass, 1 fail, 0 unknown." in streams.err
    assert "specification: DEVICE_GET_INFO tells" in streams.err
    assert ET.parse(file).getroot().get("failures") == "1"
    assert switchover(monkeypatch, "--command", command("die"), "--only", "negotiation.version") == 0


def test_a_report_for_which_there_is_no_room_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--only", "negotiation.version", "--json", "--junit", "/dev/full")
    assert switchover(monkeypatch, "--command", command("plain"), *options) == 1
    streams = capsys.readouterr()
    assert json.loads(streams.out)["pass"] == 1
    assert streams.err.endswith("No space left on device\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_no_server(tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["check", "--command", command("hang"), "--only", "description.device-info", "--timeout", "60s"]
    # A shell that runs tests in the background has them ignore Ctrl-C, and their children with them.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv[0] = 'switchover'; from console.cli import main; main()"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        wait_until(lambda: bool(list(tmp_path.glob("*/device.sock"))))
        time.sleep(0.3)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    wait_until(lambda: not list(tmp_path.iterdir()))
    wait_until(lambda: not any(str(tmp_path).encode() in line for line in command_lines()))


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def command_lines() -> list[bytes]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_bytes())
        except OSError:
            continue
    return found
