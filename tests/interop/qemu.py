"""QEMU with one of our devices, as a vfio-user client, and its monitor (QMP)."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
SLOT = 5  # where guest.S looks for the device


class Qemu:
    """A running QEMU; its guest's debug console is written to `console`."""

    def __init__(self, directory: Path, process: subprocess.Popen[str], monitor: socket.socket) -> None:
        self.console = directory / "console"
        self._process = process
        self._monitor = monitor.makefile("rw")
        assert "QMP" in json.loads(self._monitor.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Carry out a command of the monitor."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while "event" in (answer := json.loads(self._monitor.readline())):
            pass
        assert "error" not in answer, answer
        return answer["return"]

    def pci(self) -> dict[str, Any]:
        """Return what the guest sees of our device, once the firmware has placed its BARs."""

        def find() -> dict[str, Any] | None:
            devices = (device for bus in self.execute("query-pci") for device in bus["devices"])
            (device,) = (device for device in devices if device["slot"] == SLOT)
            return device if all(region["address"] != -1 for region in device["regions"]) else None

        device: dict[str, Any] = self.wait(find, "the firmware has not placed the device's BARs")
        return device

    def read_memory(self, gpa: int, size: int, directory: Path) -> bytes:
        """Return guest physical memory."""
        path = directory / "memory"
        self.execute("pmemsave", val=gpa, size=size, filename=str(path))
        return path.read_bytes()

    def read_words(self, gpa: int, words: int) -> list[int]:
        """Return 32-bit words as a CPU reads them, from memory or a device."""
        shown: str = self.execute("human-monitor-command", **{"command-line": f"xp /{words}xw {gpa:#x}"})
        return [int(word, 16) for line in shown.splitlines() for word in line.partition(":")[2].split()]

    def wait(self, look: Callable[[], Any], otherwise: str) -> Any:
        """Return what `look` sees as soon as it is something."""
        end = time.monotonic() + START_SECONDS
        while not (seen := look()):
            assert self._process.poll() is None, "QEMU has ended"
            assert time.monotonic() < end, otherwise
            time.sleep(0.1)
        return seen


@contextmanager
def running(qemu: Path, directory: Path, device: Path, *options: str) -> Iterator[Qemu]:
    """Run QEMU with the device that listens at a socket."""
    path = directory / "qmp.sock"
    attached = {"driver": "vfio-user-pci", "addr": f"{SLOT:x}", "socket": {"type": "unix", "path": str(device)}}
    command = [qemu, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64", "-device", json.dumps(attached)]
    command += ["-qmp", f"unix:{path},server=on,wait=off", "-debugcon", f"file:{directory / 'console'}", *options]
    with (directory / "qemu.log").open("w") as log, socket.socket(socket.AF_UNIX) as monitor:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        try:
            end = time.monotonic() + START_SECONDS
            while monitor.connect_ex(str(path)):
                assert process.poll() is None, (directory / "qemu.log").read_text()
                assert time.monotonic() < end, "its monitor does not answer"
                time.sleep(0.05)
            yield Qemu(directory, process, monitor)
        finally:
            process.terminate()
            process.wait()
