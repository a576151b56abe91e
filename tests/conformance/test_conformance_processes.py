"""Servers as processes: what they do to themselves costs the check in which they do it, and nothing is left behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.conformance.check import Check, Outcome, Result
from common.conformance.lab import run
from common.conformance.probe import Limits
from common.conformance.suite import CHECKS
from common.conformance.target import CommandTarget, SocketTarget, UnreachableError

DOOMED = Path(__file__).with_name("doomed_server.py")
PYTHON = shlex.quote(sys.executable)
LIMITS = Limits(answer=1.0, start=20.0)
VERSION, INFO, FILES = "negotiation.version", "description.device-info", "description.region-files"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("switchover-check-*"))
    assert not alive(str(DOOMED))


def alive(text: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in line and str(DOOMED) in line:
                found.append(line)
    return found


def results(how: str, *names: str) -> list[Result]:
    checks = [check for name in names for check in CHECKS if check.full_name == name]
    return list(run(checks, CommandTarget(f"{PYTHON} {shlex.quote(str(DOOMED))} {how} {{socket}}"), LIMITS))


@pytest.mark.parametrize(
    ("how", "detail"),
    [
        ("die", 'the server died of SIGABRT; its last words: "assertion failed: everything"'),
        ("signal", f"the server died of signal {signal.SIGRTMIN + 3}"),
        ("hang", "the server hangs: no answer within 1 s"),
        ("child", "the server hangs"),
        pytest.param("loop", "the server hangs", marks=pytest.mark.matrix),
        ("garbage", "what came is no message"),
    ],
)
def test_a_server_that_comes_to_harm_costs_one_check(how: str, detail: str) -> None:
    before, harmed, after = results(how, VERSION, INFO, VERSION)
    assert (before.outcome, harmed.outcome, after.outcome) == (Outcome.PASS, Outcome.FAIL, Outcome.PASS)
    assert detail in harmed.detail


def test_memory_that_is_cut_off_kills_nobody() -> None:
    files, after = results("truncate", FILES, VERSION)
    assert (files.outcome, after.outcome) == (Outcome.FAIL, Outcome.PASS)
    assert "the file of region 0 has 0 bytes, and 4096 could be mapped" in files.detail


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(UnreachableError, match='status 3; its last words: "cannot find my configuration"'):
        results("early", VERSION)
    with pytest.raises(UnreachableError, match="No such file"):
        list(run(CHECKS, CommandTarget("/nowhere/server {socket}"), LIMITS))


@pytest.mark.parametrize(("how", "name"), [("die", INFO), ("plain", "messages.size-below-header")])
def test_without_a_command_a_dead_server_stays_dead(tmp_path: Path, how: str, name: str) -> None:
    path = tmp_path / "device.sock"
    with subprocess.Popen([sys.executable, DOOMED, how, path], stderr=subprocess.DEVNULL) as server:
        wait_for(path)
        checks = [check for item in (VERSION, name, VERSION) for check in CHECKS if check.full_name == item]
        before, harmed, after = run(checks, SocketTarget(path), LIMITS)
        server.wait(10)
    assert (before.outcome, harmed.outcome, after.outcome) == (Outcome.PASS, Outcome.FAIL, Outcome.UNKNOWN)
    assert f"after {name} the server serves nobody" in after.detail


def test_without_a_command_a_server_for_one_client_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    arguments = ["nic", "--name", "nic0", "--socket", path]
    with subprocess.Popen([sys.executable, "-m", "common.devices", *arguments]):
        wait_for(path)
        outcomes = [result.outcome for result in run(CHECKS, SocketTarget(path), LIMITS)]
    assert outcomes == [Outcome.PASS, *[Outcome.UNKNOWN] * (len(CHECKS) - 1)]


def test_a_server_that_serves_somebody_else_is_not_called_wrong_for_good(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with socket.socket(socket.AF_UNIX) as listener:  # it accepts nobody as long as it has its client
        listener.bind(str(path))
        listener.listen()
        checks = [check for item in (VERSION, INFO) for check in CHECKS if check.full_name == item]
        first, second = run(checks, SocketTarget(path), Limits(answer=0.2))
    assert first.outcome is Outcome.FAIL and second.outcome is Outcome.UNKNOWN
    assert "or serves another client" in second.detail


def over_a_socket(tmp_path: Path, checks: Sequence[Check]) -> dict[str, Result]:
    """Check a server that goes on for the next client, as ours does with --no-once."""
    path = tmp_path / "device.sock"
    arguments = ["nic", "--name", "nic0", "--socket", path, "--no-once"]
    server = subprocess.Popen([sys.executable, "-m", "common.devices", *arguments])
    try:
        wait_for(path)
        return {result.check.full_name: result for result in run(checks, SocketTarget(path), Limits())}
    finally:
        server.terminate()
        server.wait(10)


def test_a_server_serves_one_client_after_the_other(tmp_path: Path) -> None:
    found = over_a_socket(tmp_path, [check for check in CHECKS if check.subject == "reconnecting"])
    assert {result.outcome for result in found.values()} == {Outcome.PASS}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["nic", "nvme", "accelerator"])
def test_our_processes_pass_every_check(kind: str) -> None:
    command = f"{PYTHON} -m common.devices {kind} --name {kind}0 --socket {{socket}}"
    found = list(run(CHECKS, CommandTarget(command), Limits()))
    assert not [(result.check.full_name, result.detail) for result in found if result.outcome is Outcome.FAIL]


@pytest.mark.matrix
def test_a_socket_is_enough_for_most_checks(tmp_path: Path) -> None:
    found = over_a_socket(tmp_path, CHECKS)
    assert not [(name, result.detail) for name, result in found.items() if result.outcome is Outcome.FAIL]
    unknown = {name for name, result in found.items() if result.outcome is Outcome.UNKNOWN}
    assert unknown == {
        FILES,
        "migration-data.move",
        "migration-data.move-with-pre-copy",
        "migration-data.other-pieces",
    }


def test_a_server_for_one_client_is_restarted() -> None:
    command = f"{PYTHON} -m common.devices nic --name nic0 --socket {{socket}}"
    names = ("migration-data.move", "reconnecting.next-client", "device-dma.logged")
    checks = [check for check in CHECKS if check.full_name in names]
    found = {result.check.full_name: result for result in run(checks, CommandTarget(command), Limits())}
    assert found["migration-data.move"].outcome is Outcome.PASS, found["migration-data.move"].detail
    assert found["device-dma.logged"].outcome is Outcome.PASS
    assert "serves one client and ends" in found["reconnecting.next-client"].detail


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
