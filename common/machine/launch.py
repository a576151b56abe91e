"""Starting a machine process, which outlives the daemon that starts it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

from common.ipc.channel import Client
from common.machine import SOCKET
from common.machine.client import MachineClient
from common.machine.config import MachineSpec, to_json

__all__ = ["launch"]

START_SECONDS = 120.0  # filling a large RAM from files takes its time


def launch(
    spec: MachineSpec, directory: Path, record_path: Path, *, incarnation: int, incoming: bool = False
) -> MachineClient:
    """Start the machine in `directory` and connect to it; raise OSError with its own words if it does not start.

    It has the connection from its birth: when that closes before anything was recorded of it, it ends.
    """
    (directory / "machine.json").write_text(to_json(spec))
    log_path = directory / "machine.log"
    ours, theirs = socket.socketpair()
    with log_path.open("ab") as log, theirs:
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "common.machine"),
                *("--directory", str(directory), "--record", str(record_path), "--incarnation", str(incarnation)),
                *("--connection", str(theirs.fileno())),
                *(["--incoming"] if incoming else []),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    client = MachineClient(directory, Client(ours))
    deadline = time.monotonic() + START_SECONDS
    while not (directory / SOCKET).exists():
        if process.poll() is not None:
            client.close()
            lines = log_path.read_text(errors="replace").strip().splitlines()
            raise OSError(f"the machine did not start: {lines[-1] if lines else f'exit code {process.returncode}'}")
        if time.monotonic() > deadline:
            client.close()
            process.kill()
            raise TimeoutError(f"the machine did not start in {START_SECONDS:.0f} s")
        time.sleep(0.005)
    return client
