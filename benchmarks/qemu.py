"""QEMU as a mover of RAM: two processes without a guest operating system, and their monitors (QMP).

Its vCPU runs and is halted, so that nothing but the migration takes time or changes memory.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cpu import cpu_seconds
from benchmarks.link import End, Link
from benchmarks.ram_file import clear, differing_pages
from benchmarks.samples import Sample

__all__ = ["find_qemu", "move"]

START_S = 60.0
MOVE_S = 600.0
# 64 KiB of firmware whose first instructions, at the reset vector, are cli; hlt; and to hlt again.
FIRMWARE = bytes(0xFFF0) + b"\xfa\xf4\xeb\xfd" + bytes(12)
ANY = 0


def find_qemu() -> str | None:
    """Return QEMU's path: SWITCHOVER_QEMU, or from PATH."""
    return shutil.which(os.environ.get("SWITCHOVER_QEMU", "qemu-system-x86_64"))


class Qemu:
    """A running QEMU. OSError if it says no, ends, or says nothing for too long."""

    def __init__(self, process: subprocess.Popen[bytes], monitor: socket.socket, log: Path) -> None:
        self.pid = process.pid
        self._log = log
        self._monitor = monitor.makefile("rw")
        self._events: list[dict[str, Any]] = []
        self._receive()
        self.execute("qmp_capabilities")

    def _receive(self) -> dict[str, Any]:
        line = self._monitor.readline()
        if not line:
            raise OSError(f"QEMU has ended: {self._log.read_text(errors='replace').strip()}")
        received: dict[str, Any] = json.loads(line)
        return received

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Carry out a command."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
        self._monitor.flush()
        while "event" in (answer := self._receive()):
            self._events.append(answer)
        if "error" in answer:
            raise OSError(f"QEMU, {command}: {answer['error']['desc']}")
        return answer["return"]

    def wait(self, name: str, status: Sequence[str] = ()) -> dict[str, Any]:
        """Return the next event of that name, and with one of these statuses, if any are named."""
        while True:
            event = self._events.pop(0) if self._events else self._receive()
            if event.get("event") == name and (not status or event["data"]["status"] in status):
                return event


@contextmanager
def running(qemu: str, end: End, directory: Path, ram: Path, *options: str) -> Iterator[Qemu]:
    """Run QEMU at an end with a file as its RAM, all of it touched."""
    size = ram.stat().st_size
    path, log, firmware = directory / "qmp.sock", directory / "qemu.log", directory / "firmware"
    firmware.write_bytes(FIRMWARE)
    path.unlink(missing_ok=True)
    backend = {"qom-type": "memory-backend-file", "id": "ram", "size": size, "mem-path": str(ram)}
    command = [
        *(*end.prefix, qemu, "-nodefaults", "-no-user-config", "-display", "none", "-bios", str(firmware)),
        *("-accel", "kvm", "-accel", "tcg", "-machine", "q35,memory-backend=ram", "-m", f"{size >> 20}M"),
        *("-object", json.dumps(backend | {"share": True, "prealloc": True})),
        *("-qmp", f"unix:{path},server=on,wait=off", *options),
    ]
    with log.open("wb") as output, socket.socket(socket.AF_UNIX) as monitor:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + START_S
            while monitor.connect_ex(str(path)):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise OSError(f"QEMU does not start: {log.read_text(errors='replace').strip()}")
                time.sleep(0.02)
            monitor.settimeout(MOVE_S)
            yield Qemu(process, monitor, log)
        finally:
            process.kill()
            process.wait()


def move(
    qemu: str,
    link: Link,
    directory: Path,
    source_ram: Path,
    destination_ram: Path,
    capabilities: Sequence[str],
    parameters: Mapping[str, Any],
) -> Sample:
    """Migrate once from one file to another; OSError if that fails, or if memory differs afterwards."""
    clear(destination_ram, source_ram.stat().st_size)
    both = [{"capability": name, "state": True} for name in ("events", *capabilities)]
    with ExitStack() as stack:
        ends = []
        for name, end, ram, options in (
            ("source", link.source, source_ram, ()),
            ("destination", link.destination, destination_ram, ("-incoming", "defer")),
        ):
            (directory / name).mkdir(exist_ok=True)
            ends.append(stack.enter_context(running(qemu, end, directory / name, ram, *options)))
        source, destination = ends
        for one in ends:
            one.execute("migrate-set-capabilities", {"capabilities": both})
            one.execute("migrate-set-parameters", {"max-bandwidth": int(link.limit or 0), **parameters})
        destination.execute("migrate-incoming", {"uri": f"tcp:{link.destination.address}:{ANY}"})
        (listening,) = destination.execute("query-migrate")["socket-address"]
        before = [cpu_seconds(one.pid) for one in ends]
        began = time.monotonic()
        source.execute("migrate", {"uri": f"tcp:{listening['host']}:{listening['port']}"})
        ended = source.wait("MIGRATION", ("completed", "failed"))
        if ended["data"]["status"] == "failed":
            raise OSError(f"QEMU: {source.execute('query-migrate').get('error-desc', 'the migration has failed')}")
        destination.wait("RESUME")
        whole_s = time.monotonic() - began
        source_cpu, destination_cpu = (cpu_seconds(one.pid) - was for one, was in zip(ends, before, strict=True))
        told = source.execute("query-migrate")
    if differing := differing_pages(source_ram, destination_ram):
        raise OSError(f"QEMU: {differing} pages differ at the destination")
    return Sample(
        ram_bytes=source_ram.stat().st_size,
        transfer_s=(told["total-time"] - told["setup-time"]) / 1000,
        sent_bytes=told["ram"]["transferred"],
        source_cpu_s=source_cpu,
        destination_cpu_s=destination_cpu,
        whole_s=whole_s,
        downtime_s=told["downtime"] / 1000,
    )
