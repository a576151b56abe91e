"""Each component fails once in each phase: never two machines, never none without a cause that is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from cells import PHASES, SEED, Cell, End, cells, sample
from rig import Daemon, Rig, assert_completed, machine_toml, wait_for
from switchover.v1 import host_pb2
from test_journey_localhost import goes_on
from victims import SmallDisk, hang, kill, victim

from common.machine.client import MachineClient

HANG = 100.0
SAMPLE = sample(SEED)
SMALL = {"nvme": "blocks = 1024\nlatency_us = 100", "nic": "", "accelerator": 'memory = "64KiB"'}


class Stage:
    """Two hosts, a machine that is about to leave, and what is to be broken."""

    def __init__(self, rig: Rig, cell: Cell, held: ExitStack) -> None:
        self.rig = rig
        self.disks: dict[str, SmallDisk] = {}
        for role in ("source", "destination"):
            if cell.fault == f"{role} disk full":
                disk = self.disks[role] = SmallDisk(rig.directory / role)
                held.callback(disk.close)
        scarce = cell.fault == "destination without memory"
        prefix = ("prlimit", f"--as={8 << 30}") if scarce else ()
        machine = machine_toml(devices=(cell.device,), extra=SMALL, ram="16GiB" if scarce else "64MiB")
        self.source = rig.start("source", machine, state="source")
        self.destination = rig.start("destination", state="destination", prefix=prefix)
        self.before = goes_on(self.source)

    def strike(self, cell: Cell) -> None:
        """Break what the cell says."""
        role, _, what = cell.fault.partition(" ")
        daemon = self.source if role == "source" else self.destination
        match what.split():
            case [component, "killed"]:
                kill(daemon, component)
                if component in ("device", "vCPU"):
                    # Nobody could fail for what nobody has noticed: all is at the destination by the handover, and a
                    # machine that is committed is not given back.
                    machines = daemon.state_dir / "run"
                    wait_for(lambda: not any(map(goes_on_there, machines.iterdir())), "it has not noticed", HANG)
            case [component, "hung"]:
                hang(daemon, component)
            case ["disk", "full"]:
                self.disks[role].fill()

    def repair(self) -> None:
        for disk in self.disks.values():
            disk.free()


def goes_on_there(directory: Path) -> bool:
    """Ask a machine behind its daemon's back, which tells of none before it has it."""
    try:
        machine = MachineClient.connect(directory)
    except OSError:
        return False
    try:
        return not machine.describe().failure
    except OSError:
        return False
    finally:
        machine.close()


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell.name, marks=() if cell in SAMPLE else pytest.mark.matrix) for cell in cells(SEED)],
)
def test_something_fails(rig: Rig, held: ExitStack, cell: Cell) -> None:
    if "disk" in cell.fault and os.geteuid() != 0:
        pytest.skip("needs root for a small file system")
    stage = Stage(rig, cell, held)
    with rig.held(PHASES[cell.phase]) as arrived:
        session = stage.source.begin(stage.destination.address)
        arrived()
        stage.strike(cell)
    if stage.disks.get("destination") is not None:
        wait_for(lambda: stage.source.asks(session, HANG), "nobody is asked", HANG)
        stage.repair()
    result = stage.source.follow(session, HANG)
    stage.repair()
    wait_for(lambda: not stage.destination.look().migrating, "the destination has not let go", HANG)
    ENDS[cell.end](stage, result)
    for daemon in (stage.source, stage.destination):
        assert daemon.process.poll() is None
        log = daemon.log.read_text()
        assert "Traceback" not in log and "defect" not in log, log[-3000:]


def told(result: host_pb2.MigrationResult) -> None:
    assert result.result == "failed" and result.reason != "INTERNAL", result
    assert result.error and result.error.isprintable() and "Traceback" not in result.error


def runs_nowhere(daemon: Daemon) -> None:
    try:
        assert daemon.look().machine.state != "running"
    except grpc.RpcError as error:  # until the daemon has noticed that the process is gone
        assert "has ended" in str(error)  # noqa: PT017


def stays(stage: Stage, result: host_pb2.MigrationResult) -> None:
    told(result)
    assert result.owner == "source"
    machine = stage.source.look().machine
    assert (machine.state, {device.state for device in machine.devices}) == ("running", {"RUNNING"})
    runs_nowhere(stage.destination)
    before = goes_on(stage.source, stage.before)
    other = stage.rig.start("destination")
    assert_completed(stage.source.migrate(other.address))
    goes_on(other, before)


def moves(stage: Stage, result: host_pb2.MigrationResult) -> None:
    assert result.owner == "destination", result
    runs_nowhere(stage.source)
    goes_on(stage.destination, stage.before)


def failed_here(stage: Stage, result: host_pb2.MigrationResult) -> None:
    told(result)
    assert result.owner == "source"
    machine = stage.source.look().machine
    assert machine.state == "failed" and machine.failure
    runs_nowhere(stage.destination)


def failed_there(stage: Stage, result: host_pb2.MigrationResult) -> None:
    told(result)
    assert result.owner == "destination" and result.reason == "NOT_STARTED"
    runs_nowhere(stage.source)
    runs_nowhere(stage.destination)


def lost(stage: Stage, result: host_pb2.MigrationResult) -> None:
    assert result.reason != "INTERNAL", result
    runs_nowhere(stage.source)
    if result.owner == "destination":
        goes_on(stage.destination, stage.before)
    else:
        told(result)
        runs_nowhere(stage.destination)


def revoked(stage: Stage, result: host_pb2.MigrationResult) -> None:
    assert result.reason == "REVOKED", result
    stays(stage, result)


ENDS: dict[End, Callable[[Stage, host_pb2.MigrationResult], None]] = {
    End.STAYS: stays,
    End.MOVES: moves,
    End.FAILED_HERE: failed_here,
    End.FAILED_THERE: failed_there,
    End.LOST: lost,
    End.REVOKED: revoked,
}


def test_nobody_can_cut_memory_off_that_is_shared(rig: Rig) -> None:
    source = rig.start("source", machine_toml(devices=("nic",)))
    before = goes_on(source)
    shared = 0
    for what in ("machine", "vCPU", "device"):
        pid = victim(source, what)
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed by now
                if "memfd:switchover-ram" in os.readlink(path):
                    with pytest.raises(PermissionError):
                        os.truncate(path, 4096)
                    shared += 1
    assert shared >= 3
    goes_on(source, before)
