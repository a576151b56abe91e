from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.ipc.channel import ClosedError
from common.machine import SOCKET
from common.machine import launch as launch_module
from common.machine.client import MachineClient
from common.machine.config import MachineSpec, ViommuSpec, from_json
from common.machine.launch import launch

SPEC = MachineSpec("vm", "6f2c9e0a-0000-4000-8000-000000000001", 64 << 20, (), 0.4, ViommuSpec(), (), ())


class Process:
    """A process that ends after a while, or comes up, or hangs."""

    returncode = 3

    def __init__(self, directory: Path, log: str, *, comes_up: bool = False, hangs: bool = False) -> None:
        self._directory, self._log, self._comes_up, self._hangs = directory, log, comes_up, hangs
        self.arguments: list[str] = []
        self.options: dict[str, Any] = {}
        self.polls = 0
        self.killed = False

    def __call__(self, arguments: list[str], **options: Any) -> Process:
        self.arguments, self.options = arguments, options
        options["stdout"].write(self._log.encode())
        return self

    def poll(self) -> int | None:
        self.polls += 1
        if self._comes_up and self.polls == 2:
            (self._directory / SOCKET).touch()
        return None if self._comes_up or self._hangs or self.polls < 2 else self.returncode

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Process], MachineClient]:
    def run(process: Process, **options: Any) -> MachineClient:
        moments = iter(range(0, 10_000, 50))
        monkeypatch.setattr(
            launch_module, "time", SimpleNamespace(monotonic=lambda: next(moments), sleep=lambda _: None)
        )
        fake = SimpleNamespace(Popen=process, DEVNULL=subprocess.DEVNULL)
        monkeypatch.setattr(launch_module, "subprocess", fake)
        machine = launch(SPEC, tmp_path, tmp_path / "record.json", incarnation=4, **options)
        machine.close()
        return machine

    return run


def test_a_machine_comes_up(tmp_path: Path, start: Callable[..., MachineClient]) -> None:
    process = Process(tmp_path, "", comes_up=True)
    assert start(process, incoming=True).directory == tmp_path
    assert from_json((tmp_path / "machine.json").read_bytes()) == SPEC
    (connection,) = process.options["pass_fds"]
    assert process.arguments[1:] == [
        *("-P", "-m", "common.machine", "--directory", str(tmp_path), "--record", str(tmp_path / "record.json")),
        *("--incarnation", "4", "--connection", str(connection), "--incoming"),
    ]
    # It outlives the daemon, and Ctrl-C in the daemon's terminal is not for it.
    assert process.options["start_new_session"] and process.options["stdin"] is subprocess.DEVNULL


def test_a_machine_that_is_not_incoming(tmp_path: Path, start: Callable[..., MachineClient]) -> None:
    process = Process(tmp_path, "", comes_up=True)
    start(process)
    assert "--incoming" not in process.arguments


@pytest.mark.parametrize(("log", "said"), [("starting\nno memory\n", "no memory"), ("", "exit code 3")])
def test_a_machine_that_does_not_start_says_why(
    tmp_path: Path, start: Callable[..., MachineClient], log: str, said: str
) -> None:
    with pytest.raises(OSError, match=f"^the machine did not start: {said}$"):
        start(Process(tmp_path, log))


def test_a_machine_that_hangs_is_given_up(tmp_path: Path, start: Callable[..., MachineClient]) -> None:
    process = Process(tmp_path, "", hangs=True)
    with pytest.raises(TimeoutError, match="did not start in 120 s"):
        start(process)
    assert process.killed


@pytest.mark.parametrize("left", [True, False], ids=["a socket is left", "nothing is left"])
def test_there_is_no_other_connection_to_a_machine_that_has_ended(tmp_path: Path, *, left: bool) -> None:
    path = tmp_path / SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        machine = MachineClient.connect(tmp_path)
    if not left:
        path.unlink()
    assert machine.has_ended()
    with pytest.raises(ClosedError, match="the machine process has ended"):
        machine.another()
    machine.close()
