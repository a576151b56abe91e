"""Switchover as a mover of RAM: two host daemons, and a machine without devices that goes to and fro between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu import children_of, cpu_seconds, is_alive
from benchmarks.link import End, Link
from benchmarks.samples import Sample
from common.machine.client import MachineClient
from common.memory.layout import PAGE_SIZE
from console.exit_codes import ExitCode
from console.launch import LISTENING

__all__ = ["ENVIRONMENT", "OurHosts", "UnknownOptionError", "hosts", "open_hosts"]

START_S = 120.0
STOP_S = 15.0
US = (sys.executable, "-P", "-m", "console")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "SWITCHOVER_TLS"}


class UnknownOptionError(Exception):
    """The command has no such option."""


@dataclass(frozen=True, slots=True)
class Host:
    """A daemon that runs: its process and its address."""

    end: End
    pid: int
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Return a command that runs at its end."""
        return [*self.end.prefix, *US, *arguments]


class OurHosts:
    """`holder` has the machine, `other` waits for it."""

    def __init__(self, holder: Host, other: Host, limit: float | None) -> None:
        self.holder, self.other = holder, other
        self._limit = [] if limit is None else ["--bandwidth", f"{limit:.0f}"]

    def migrate(self, options: Sequence[str]) -> dict[str, Any]:
        """Migrate once; return what the command tells. OSError if that fails."""
        command = [*self.holder.command("migrate", "--source", self.holder.address), "--json", *self._limit, *options]
        done = subprocess.run(
            [*command, "--destination", self.other.address],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            check=False,
        )
        if done.returncode == ExitCode.USAGE:
            raise UnknownOptionError(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise OSError(f"switchover: {(done.stdout + done.stderr).strip()}")
        self._let_go()
        self.holder, self.other = self.other, self.holder
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def move(self, options: Sequence[str]) -> Sample:
        """The same, as a sample, with the CPU seconds of both ends."""
        watch = self.holder.command("watch", self.holder.address, "--json")
        with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as watcher:
            cpu = _Cpu(watcher, (self.holder.pid, self.other.pid))
            try:
                told = self.migrate(options)
                source_cpu, destination_cpu = cpu.wait()
            finally:
                watcher.kill()
        return Sample(
            ram_bytes=told["ram"]["bytes"],
            transfer_s=(sum(each["ms"] for each in told["rounds"]) + told["downtime_ms"]) / 1000,
            sent_bytes=told["ram"]["transferred_bytes"],
            source_cpu_s=source_cpu,
            destination_cpu_s=destination_cpu,
            whole_s=told["total_ms"] / 1000,
            downtime_s=told["downtime_ms"] / 1000,
            equal_bytes=told["ram"]["equal_pages"] * PAGE_SIZE,
        )

    def _let_go(self) -> None:
        """Wait until nothing is left of the machine where it was."""
        deadline = time.monotonic() + STOP_S
        while any(map(is_alive, children_of(self.holder.pid))):
            if time.monotonic() > deadline:
                raise TimeoutError("the machine has gone, and its process has not")
            time.sleep(0.05)


class _Cpu:
    """Reads the CPU time of daemons and machines when pages begin to go, and when a migration has its result."""

    def __init__(self, watcher: subprocess.Popen[str], pids: Sequence[int]) -> None:
        self._watcher = watcher
        self._pids = pids
        self._spent: list[float] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._watcher.stdout is not None
        began: list[float] = []
        for line in self._watcher.stdout:
            event = json.loads(line)
            if event.get("phase") == "precopy":
                began = [cpu_seconds(pid) for pid in self._pids]
            elif "result" in event:
                self._spent = [cpu_seconds(pid) - before for pid, before in zip(self._pids, began, strict=True)]
                return

    def wait(self) -> list[float]:
        """Return the seconds, by process."""
        self._thread.join(STOP_S)
        if not self._spent:
            raise OSError("a daemon has not told how its migration went")
        return self._spent


@contextmanager
def open_hosts(link: Link, directory: Path, image: Path, size: int, ram_copy: Path) -> Iterator[OurHosts]:
    """Run two hosts, the first with a machine full of a file, which is removed; its RAM is copied to `ram_copy`."""
    lines = ['name = "bench"', "[ram]", f"size = {size}", f"image = [{json.dumps(str(image))}]", "zero_fraction = 0.0"]
    with hosts(link, directory, "\n".join([*lines, "[[guest]]", 'program = "idle"']) + "\n") as opened:
        client = _running_machine(directory / "a" / "run" / "boot")
        with client.ram(writable=False) as ram, ram_copy.open("wb") as file:
            file.write(ram.view)
        client.close()
        image.unlink()
        yield opened


@contextmanager
def hosts(
    link: Link, directory: Path, machine: str, environment: Mapping[str, str] = ENVIRONMENT
) -> Iterator[OurHosts]:
    """Run two hosts, the first with a machine of this description."""
    file = directory / "machine.toml"
    file.write_text(machine)
    with ExitStack() as stack:
        holder = stack.enter_context(_host(link.source, directory / "a", environment, "--machine", str(file)))
        other = stack.enter_context(_host(link.destination, directory / "b", environment))
        _running_machine(directory / "a" / "run" / "boot").close()
        yield OurHosts(holder, other, link.limit)


def _running_machine(directory: Path) -> MachineClient:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            client = MachineClient.connect(directory)
            if client.describe().state == "running":
                return client
            client.close()
        time.sleep(0.1)
    raise TimeoutError(f"the machine does not run in {START_S:.0f} s")


@contextmanager
def _host(end: End, directory: Path, environment: Mapping[str, str], *options: str) -> Iterator[Host]:
    listen = ["--listen", f"{end.address}:0", "--insecure", "--state-dir", str(directory)]
    command = [*end.prefix, *US, "host", *listen, *options]
    with (directory.with_suffix(".log")).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=environment,
        )
    assert process.stdout is not None
    address = ""
    try:
        line = process.stdout.readline()
        if not line.startswith(LISTENING):
            raise OSError(f"a daemon does not start: {directory.with_suffix('.log').read_text().strip()}")
        address = line.removeprefix(LISTENING).strip()
        yield Host(end, process.pid, address)
    finally:
        if address:
            # A machine outlives its daemon, so it must be told itself.
            stop = [*end.prefix, *US, "stop", address]
            subprocess.run(stop, capture_output=True, env=ENVIRONMENT, check=False)
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
