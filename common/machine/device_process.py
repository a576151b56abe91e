"""Starting devices and connecting to them: processes of ours, and servers of others."""

from __future__ import annotations

import ctypes
import errno
import json
import shlex
import signal
import sys
import time
from pathlib import Path

from common.machine.device_config import Attachment, DeviceSpec
from common.vfio_user.client import DeviceError, VfioUserClient
from common.vfio_user.server_process import ServerProcess

__all__ = ["StartedDevice", "connect", "start"]

# A device that does not answer for so long has died; loading a state may take it half of that.
REQUEST_SECONDS = 60.0
START_SECONDS = 20.0
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


class StartedDevice:
    """A device that is there or will be: its socket, and its process if it is ours to start."""

    def __init__(self, name: str, socket: Path, process: ServerProcess | None) -> None:
        self.name = name
        self.socket = socket
        self.process = process

    def ended(self, seconds: float | None = 0) -> str | None:
        """Wait so long for the end of its process; return how it has ended, with its last words.

        None if it has not, or there is none.
        """
        status = None if self.process is None else self.process.wait(seconds)
        if self.process is None or status is None:
            return None
        words = self.process.last_words()
        return f"its process has ended with exit code {status}{f': {words}' if words else ''}"

    def close(self) -> None:
        """End its process, and whatever that has started."""
        if self.process is not None:
            self.process.stop()


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
    if not command:
        return StartedDevice(spec.name, path, None)
    try:
        process = ServerProcess(command, _end_with_the_machine)
    except OSError as error:
        raise OSError(error.errno, f"{spec.name}: {command[0]}: {error.strerror}") from error
    return StartedDevice(spec.name, path, process)


def _end_with_the_machine() -> None:
    """Die when the machine process does, however it does: that is a device's power failure too.

    A server that has started another one dies alone: the kernel tells nobody but a process's own children.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _command(name: str, attachment: Attachment, path: Path) -> list[str]:
    try:
        words = shlex.split(attachment.command)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"{name}: its command cannot be read: {error}") from error
    return [word.replace("{socket}", str(path)) for word in words]


def connect(started: StartedDevice) -> VfioUserClient:
    """Connect to a device; wait until it listens if we have started it. OSError says why it cannot be had."""
    if started.process is not None:
        started.process.attend()
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
