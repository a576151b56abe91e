"""Starting devices and connecting to them: processes of ours, and servers of others."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from common.machine.device_config import Attachment, DeviceSpec
from common.vfio_user.client import DeviceError, VfioUserClient

__all__ = ["StartedDevice", "connect", "start"]

# A device that does not answer for so long has died; loading a state may take it half of that.
REQUEST_SECONDS = 60.0
START_SECONDS = 20.0
STOP_SECONDS = 2.0
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


class StartedDevice:
    """A device that is there or will be: its socket, and its process if it is ours to start."""

    def __init__(self, name: str, socket: Path, process: subprocess.Popen[bytes] | None, log: Path) -> None:
        self.name = name
        self.socket = socket
        self.process = process
        self._log = log

    def ended(self) -> str | None:
        """Return how its process has ended, with its last words; None if it has not, or there is none."""
        if self.process is None or self.process.poll() is None:
            return None
        lines = self._log.read_text(errors="replace").strip().splitlines()
        said = f": {lines[-1][:200]}" if lines else ""
        return f"its process has ended with exit code {self.process.returncode}{said}"

    def close(self) -> None:
        """End its process, and whatever that has started."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
                return


def start(spec: DeviceSpec, directory: Path, *, trace: bool) -> StartedDevice:
    """Start the device's process, unless somebody else has; OSError if its command cannot be started.

    To be called in the main thread: the process ends with the thread that has started it.
    """
    path = directory / f"{spec.name}.sock"
    if spec.attachment is None:
        knobs = {**spec.knobs, "trace": True} if trace else spec.knobs
        command = [
            *(sys.executable, "-P", "-m", "common.devices", spec.kind),
            *("--name", spec.name, "--socket", str(path), "--knobs", json.dumps(knobs)),
        ]
    else:
        path = Path(spec.attachment.socket or path)
        command = _command(spec.name, spec.attachment, path)
    log_path = directory / f"{spec.name}.log"
    if not command:
        return StartedDevice(spec.name, path, None, log_path)
    with log_path.open("ab") as log:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=_end_with_the_machine,
            )
        except OSError as error:
            raise OSError(error.errno, f"{spec.name}: {command[0]}: {error.strerror}") from error
    return StartedDevice(spec.name, path, process, log_path)


def _end_with_the_machine() -> None:
    """Die when the machine process does, however it does: that is a device's power failure too."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _command(name: str, attachment: Attachment, path: Path) -> list[str]:
    try:
        words = shlex.split(attachment.command)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"{name}: its command cannot be read: {error}") from error
    return [word.replace("{socket}", str(path)) for word in words]


def connect(started: StartedDevice) -> VfioUserClient:
    """Connect to a device; wait until it listens if we have started it. OSError says why it cannot be had."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return VfioUserClient.connect(started.socket, name=started.name, timeout=REQUEST_SECONDS)
        except DeviceError as error:
            # A server that is about to listen: its socket is not there, or nobody is behind it yet.
            if started.process is None or error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
        ended = started.ended()
        if ended is not None:
            raise OSError(f"{started.name}: {ended}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{started.name}: does not listen at {started.socket} after {START_SECONDS:.0f} s")
        time.sleep(0.002)
