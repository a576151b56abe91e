"""Host daemons as children of this process, for the demo and the benchmarks: each with its machine, until they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
from switchover.v1.host_pb2 import GetMachineRequest, Machine, StopMachineRequest
from switchover.v1.host_pb2_grpc import HostServiceStub

from common.rpc.channel import open_channel
from console.daemon import QUICK_CALL_S, daemon, printable
from console.errors import CommandError
from console.exit_codes import ExitCode

__all__ = ["running_host", "wait_until_it_runs"]

START_S = 120.0  # until a daemon listens, until its machine runs
STOP_S = 15.0
LISTENING = "switchover host: listening on "


@contextmanager
def running_host(directory: Path, machine: Path | None) -> Iterator[str]:
    """Run a daemon with both roles in `directory`; yield its address; end it and its machine."""
    directory.mkdir()
    # -P: a folder named console in the current directory is not ours.
    command = [sys.executable, "-P", "-m", "console", "host", "--listen", "127.0.0.1:0", "--state-dir", str(directory)]
    command += ["--machine", str(machine)] if machine else []
    environment = {
        name: value for name, value in os.environ.items() if name != "SWITCHOVER_TLS"
    }  # it stays on loopback
    with (directory / "stdout").open("wb") as stdout, (directory / "stderr").open("wb") as stderr:
        # In a session of its own, so that Ctrl-C on the terminal reaches us alone.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True, env=environment
        )
    address = None
    try:
        address = _listening(process, directory)
        yield address
    finally:
        if address is not None:
            # A machine may outlive its daemon, so it must be told itself.
            with suppress(grpc.RpcError), open_channel(address) as channel:
                HostServiceStub(channel).StopMachine(StopMachineRequest(), timeout=STOP_S)
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listening(process: subprocess.Popen[bytes], directory: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        lines = (directory / "stdout").read_text(errors="replace").splitlines(keepends=True)
        if lines and lines[0].endswith("\n"):
            if not lines[0].startswith(LISTENING):
                break
            return lines[0].removeprefix(LISTENING).strip()
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise CommandError(f"the daemon has not started: {_last_line(directory)}", ExitCode.FAILED)


def wait_until_it_runs(address: str, directory: Path) -> Machine:
    """Wait for the machine of a daemon that was started so; raise `CommandError` if it does not run."""
    deadline = time.monotonic() + START_S
    with daemon(address) as stub:
        while time.monotonic() < deadline:
            machine = stub.GetMachine(GetMachineRequest(), timeout=QUICK_CALL_S).machine
            if machine.state == "running":
                return machine
            if machine.state == "failed":
                raise CommandError(f"the machine has failed: {printable(machine.failure)}", ExitCode.FAILED)
            time.sleep(0.05)
    raise CommandError(f"the machine does not run: {_last_line(directory)}", ExitCode.FAILED)


def _last_line(directory: Path) -> str:
    lines = (directory / "stderr").read_text(errors="replace").split("\n")
    return printable(next((line for line in reversed(lines) if line.strip()), "it has said nothing"))
