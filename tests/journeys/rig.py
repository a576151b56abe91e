"""Real daemons as a user launches them: processes, addresses, state directories, and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
from switchover.v1 import host_pb2, host_pb2_grpc

from common.rpc.channel import open_channel
from console.report import report

START_SECONDS = 60.0
T = TypeVar("T")

GUEST = """
[[guest]]
program = "clock"
[[guest]]
program = "writer"
pattern = "{pattern}"
rate = "{rate}"
region = "16MiB"
"""


def machine_toml(
    name: str = "m",
    *,
    ram: str = "64MiB",
    image: Path | None = None,
    devices: tuple[str, ...] = (),
    drivers: bool = True,
    pattern: str = "random",
    rate: str = "5MB/s",
    viommu: str = "",
    guest: str = GUEST,
    mappings: int = 0,
    extra: dict[str, str] | None = None,
) -> str:
    """Return a machine file with a clock, a writer, and a driver for each device; `extra` adds lines to a device."""
    lines = [f'name = "{name}"', "[ram]", f'size = "{ram}"']
    if image is not None:
        lines.append(f'image = ["{image}"]')
    lines += ["[viommu]", viommu or "enabled = true", guest.format(pattern=pattern, rate=rate)]
    for kind in devices:
        lines += ["[[device]]", f'kind = "{kind}"', (extra or {}).get(kind, "")]
    counts: dict[str, int] = {}
    for kind in devices if drivers else ():
        number = counts.setdefault(kind, 0)
        counts[kind] += 1
        lines += ["[[guest]]", 'program = "driver"', f'device = "{kind}{number}"']
    if mappings:
        lines += ["[[guest]]", 'program = "mapper"', f'device = "{devices[0]}0"', f"mappings = {mappings}"]
    return "\n".join(lines) + "\n"


class Daemon:
    """A daemon process; `address` is where it says that it listens."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        state_dir: Path,
        log: Path,
        reach: str | None,
        credentials: grpc.ChannelCredentials | None,
        *,
        scraped: bool,
    ) -> None:
        self.process = process
        self.state_dir = state_dir
        self.log = log
        assert process.stdout is not None
        line = process.stdout.readline()
        if ": listening on " not in line:
            process.wait()
            process.stdout.close()
            raise AssertionError(f"the daemon did not start: {line}{log.read_text()}")
        self.address = line.strip().rpartition(" ")[2]
        self.said = process.stdout.readline().strip()
        self.metrics = process.stdout.readline().strip().rpartition(" ")[2] if scraped else ""
        self.port = self.address.rpartition(":")[2]
        self.channel = open_channel(f"{reach}:{self.port}" if reach else self.address, credentials)
        self.stub = host_pb2_grpc.HostServiceStub(self.channel)

    def await_line(self, part: str) -> str:
        """Return the next line on its standard output that has this in it; fail if it ends without."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if part in line:
                return line
        raise AssertionError(f"it has not said {part!r}: {self.log.read_text()}")

    def look(self) -> host_pb2.GetMachineResponse:
        """Ask for the machine."""
        return self.stub.GetMachine(host_pb2.GetMachineRequest(), timeout=20)

    def counters(self) -> dict[str, dict[str, int]]:
        """Return what the guest's programs count; fail if one has found something wrong."""
        programs = self.look().machine.programs
        errors = [(program.name, list(program.errors)) for program in programs if program.errors]
        assert not errors, errors
        return {program.name: dict(program.counters) for program in programs}

    def migrate(self, destination: str, **options: Any) -> host_pb2.MigrationResult:
        """Migrate the machine away and wait for the result."""
        return self.follow(self.begin(destination, **options))

    def begin(self, destination: str, **options: Any) -> str:
        """Start a migration; return its session."""
        request = host_pb2.MigrateRequest(destination=destination, **options)
        return self.stub.Migrate(request, timeout=20).session_id

    def follow(self, session_id: str, seconds: float = 120) -> host_pb2.MigrationResult:
        """Return a session's result; fail if there is none for so long that there never will be one."""
        for event in self.stub.WatchEvents(host_pb2.WatchEventsRequest(session_id=session_id), timeout=seconds):
            if event.HasField("result"):
                return event.result
        raise AssertionError("the events have ended without a result")

    def asks(self, session_id: str, seconds: float) -> bool:
        """Whether it has said that it does not know who has the machine, and goes on asking, before a result."""
        return self.tells(session_id, lambda event: "is not known until" in event.message, seconds)

    def tells(
        self, session_id: str, what: Callable[[host_pb2.WatchEventsResponse], bool], seconds: float = START_SECONDS
    ) -> bool:
        """Wait for an event of a session that is what it should be; return False if there is none before the result."""
        events = self.stub.WatchEvents(host_pb2.WatchEventsRequest(session_id=session_id), timeout=seconds)
        for event in events:
            found = what(event)
            if found or event.HasField("result"):
                events.cancel()
                return found
        return False

    def kill(self) -> None:
        """Kill the daemon; its machine goes on."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End the daemon as Ctrl-C does; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def close(self) -> None:
        """Let go of it."""
        self.channel.close()
        if self.process.poll() is None:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Hold:
    """A point at which everyone is held until `release`, or the end of a with block; call it to wait for the first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._arrived = path.with_name(f"{path.name}.reached")
        self._arrived.unlink(missing_ok=True)
        path.touch()

    def __call__(self) -> None:
        wait_for(self._arrived.exists, f"nobody came to {self._path.name}")

    def release(self) -> None:
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Rig:
    """A place for daemons; `close` ends everything and fails if anything is left."""

    def __init__(self) -> None:
        # Unix sockets have short paths.
        self.directory = Path(tempfile.mkdtemp(prefix="sw-"))
        self.hooks = self.directory / "hooks"
        self.hooks.mkdir()
        self._daemons: list[Daemon] = []

    def start(
        self,
        role: str,
        machine: str | None = None,
        *,
        state: str | None = None,
        listen: str = "127.0.0.1:0",
        command: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
        reach: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> Daemon:
        """Start a daemon; `machine` is the text of its machine file, `prefix` what the command is run by.

        `reach` is the host by which the test reaches it, if that is not where it listens; `credentials` are the test's,
        if it speaks TLS.
        """
        name = state or f"{role}{len(self._daemons)}"
        arguments = [*prefix, *(command or (sys.executable, "-m", "console", role)), "--listen", listen, *options]
        if machine is not None:
            path = self.directory / f"{name}.toml"
            path.write_text(machine)
            arguments += ["--machine", str(path)]
        state_dir = self.directory / name
        log = self.directory / f"{name}.log"
        with log.open("a") as file:
            process = subprocess.Popen(
                [*arguments, "--state-dir", str(state_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "SWITCHOVER_HOOKS": str(self.hooks)},
            )
        daemon = Daemon(process, state_dir, log, reach, credentials, scraped="--metrics" in options)
        self._daemons.append(daemon)
        return daemon

    def run(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Run a program of somebody else's, which may use what is ours; it must have ended when the rig is closed."""
        environment = {**os.environ, "SWITCHOVER_HOOKS": str(self.hooks)}
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)

    def held(self, point: str) -> Hold:
        """Hold whoever comes to a point from now on."""
        return Hold(self.hooks / point)

    def processes(self) -> list[str]:
        """Return the command lines of all processes that belong to this rig."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if f"SWITCHOVER_HOOKS={self.hooks}".encode() in environment and line:
                    found.append(f"{entry.name} {line}")
        return found

    def close(self) -> None:
        """Stop machines and daemons; fail if a process stays."""
        for daemon in self._daemons:
            if daemon.process.poll() is None:
                with suppress(grpc.RpcError):  # it has none
                    daemon.stub.StopMachine(host_pb2.StopMachineRequest(), timeout=20)
                daemon.stop()
            daemon.close()
        try:
            wait_for(lambda: not self.processes(), f"left behind: {self.processes()}", seconds=10)
        finally:
            for line in self.processes():
                os.kill(int(line.split()[0]), signal.SIGKILL)
            shutil.rmtree(self.directory, ignore_errors=True)


def wait_for(condition: Callable[[], T], complaint: str, seconds: float = START_SECONDS) -> T:
    """Wait until a condition holds, and return it; fail with the complaint if it never does."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(complaint)
        time.sleep(0.02)


def switchover(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "console", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def switchover_json(*arguments: str) -> dict[str, Any]:
    """Run the command with --json; fail if it does not exit with 0."""
    done = switchover(*arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def assert_completed(result: host_pb2.MigrationResult) -> None:
    """Fail with the whole result unless the migration has completed and everything was compared."""
    assert (result.result, result.verified) == ("completed", "true"), json.dumps(report(result), indent=1)
