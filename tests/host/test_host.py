from __future__ import annotations

import dataclasses
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from switchover.v1 import host_pb2

from common.host import daemon
from common.host import host as host_module
from common.host.host import COMMITTED, REVOKED, Host, HostError, default_state_dir
from common.host.service import HostServicer
from common.machine import record
from common.machine.client import MachineClient
from common.machine.config import MachineSpec, ViommuSpec
from common.machine.record import Ownership, Record
from common.rpc.errors import RefusalError

UUID = "6f2c9e0a-0000-4000-8000-000000000001"
CONTEXT = cast("grpc.ServicerContext", SimpleNamespace(add_callback=lambda _: True))


class FakeMachine:
    """Remembers what it was told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **_: self.told.append(" ".join([name, *map(str, args)]))

    def describe(self) -> host_pb2.Machine:
        return host_pb2.Machine(name="vm", state="running")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host("destination", tmp_path / "state")
    yield made
    made.close()


@pytest.fixture
def spec() -> MachineSpec:
    return MachineSpec("vm", UUID, 64 << 20, (), 0.4, ViommuSpec(), (), ())


@pytest.fixture
def machine(host: Host, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """What is started or found instead of a machine process."""
    fake = FakeMachine(host.directory / "run" / "boot")
    monkeypatch.setattr(host_module, "launch", lambda *_, **__: fake)
    monkeypatch.setattr(MachineClient, "connect", lambda _: fake)
    return fake


def known(host: Host, ownership: Ownership, **changes: Any) -> None:
    members = Record(UUID, "vm", 3, ownership, str(host.directory / "run" / "s"), "5e55", "b:1")
    record.write(host.record_path, dataclasses.replace(members, **changes))


def nobody(_: Path) -> MachineClient:
    raise ConnectionRefusedError(111, "nobody listens")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the second one is never a host
def test_a_state_directory_has_one_daemon(tmp_path: Path) -> None:
    first = Host("source", tmp_path)
    with pytest.raises(HostError, match="is in use by another daemon"):
        Host("source", tmp_path)
    first.close()
    Host("source", tmp_path).close()


def test_the_state_directory_is_ours_alone(host: Host) -> None:
    assert host.directory.stat().st_mode & 0o077 == 0


def test_where_state_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state_dir("source") == tmp_path / "switchover" / "source"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert default_state_dir("source") == Path.home() / ".local" / "state" / "switchover" / "source"


def test_a_run_directory_is_empty_and_goes(host: Host) -> None:
    path = host.run_directory("5e55")
    (path / "left").touch()
    assert list(host.run_directory("5e55").iterdir()) == []
    host.remove_run_directory("5e55")
    host.remove_run_directory("5e55")
    assert not path.exists()


def test_one_migration_at_a_time(host: Host) -> None:
    host.begin_migration("first")
    assert host.migrating
    with pytest.raises(RefusalError, match="migration first runs here already") as refused:
        host.begin_migration("second")
    assert (refused.value.reason, host.session_id) == ("MIGRATION_RUNS", "first")
    with pytest.raises(RefusalError), host.not_migrating():
        pass
    assert host.migrating
    host.end_migration()
    with host.not_migrating(), pytest.raises(RefusalError):
        host.begin_migration("third")
    assert not host.migrating
    host.begin_migration("fourth")


def test_an_operator_who_fails_leaves_the_host_free(host: Host) -> None:
    with pytest.raises(OSError), host.not_migrating():
        raise OSError
    assert not host.migrating


def test_no_machine_is_a_refusal(host: Host) -> None:
    assert host.open_machine(None) == "no machine"
    with pytest.raises(RefusalError) as refused:
        host.require_machine()
    assert refused.value.reason == "NO_MACHINE"


def test_a_machine_is_owned_before_it_runs(host: Host, spec: MachineSpec, machine: FakeMachine) -> None:
    assert host.open_machine(spec) == "machine vm started"
    assert machine.told == ["record OWNER", "resume"]
    assert cast("FakeMachine", host.require_machine()) is machine


def test_a_machine_that_runs_is_found_again(host: Host, spec: MachineSpec, machine: FakeMachine) -> None:
    known(host, Ownership.OWNER)
    assert host.open_machine(spec) == "machine vm found running"
    assert machine.told == []


def test_a_machine_that_has_moved_is_never_started_again(host: Host, spec: MachineSpec, machine: FakeMachine) -> None:
    """GONE: not even if a description is given, and whoever may answer at its socket."""
    known(host, Ownership.GONE)
    assert host.open_machine(spec) == "machine vm is not started: it has moved to b:1"
    assert host.machine is None and "resume" not in machine.told


@pytest.mark.parametrize("ownership", [Ownership.COMMITTING, Ownership.COMMITTED, Ownership.STARTING])
@pytest.mark.parametrize("described", [False, True])
def test_a_machine_whose_owner_is_not_known_is_not_started(
    host: Host,
    spec: MachineSpec,
    machine: FakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    ownership: Ownership,
    described: bool,
) -> None:
    known(host, ownership)
    monkeypatch.setattr(MachineClient, "connect", nobody)
    with pytest.raises(HostError, match=f"was {ownership} when its process ended"):
        host.open_machine(spec if described else None)
    assert host.machine is None and machine.told == []


def test_a_machine_that_was_switched_off_is_started_if_described(
    host: Host, spec: MachineSpec, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(host, Ownership.OWNER)
    monkeypatch.setattr(MachineClient, "connect", nobody)
    assert host.open_machine(None) == "machine vm was switched off"
    assert host.machine is None
    assert host.open_machine(spec) == "machine vm started"


def test_a_machine_whose_handover_is_not_decided_stands_still(host: Host, machine: FakeMachine) -> None:
    known(host, Ownership.COMMITTING)
    assert host.open_machine(None) == "machine vm found; whether it is at b:1 now is being asked"
    assert machine.told == []


@pytest.mark.parametrize("ownership", [Ownership.COMMITTED, Ownership.STARTING])
def test_a_machine_that_was_committed_here_is_taken_over(
    host: Host, machine: FakeMachine, ownership: Ownership
) -> None:
    known(host, ownership)
    assert host.open_machine(None) == "machine vm found running"
    assert machine.told == ["take_over", "record OWNER"] and host.decision("5e55") == COMMITTED


def test_another_machine_is_not_taken_for_the_one_described(
    host: Host, spec: MachineSpec, machine: FakeMachine
) -> None:
    known(host, Ownership.OWNER, name="other")
    with pytest.raises(HostError, match="holds machine other, not vm"):
        host.open_machine(spec)


def test_dropping_a_machine_leaves_nothing(host: Host) -> None:
    host.drop_machine()
    fake = FakeMachine(host.run_directory("5e55"))
    host.adopt(cast("MachineClient", fake))
    host.drop_machine()
    assert fake.told == ["shutdown"] and host.machine is None and not fake.directory.exists()


def test_decisions_are_remembered(host: Host) -> None:
    assert host.decision("5e55") is None
    host.decide("5e55", REVOKED)
    host.decide("0c0", COMMITTED)
    assert (host.decision("5e55"), host.decision("0c0"), host.decision("a")) == (REVOKED, COMMITTED, None)


@pytest.mark.parametrize("ownership", Ownership)
def test_what_the_record_says_of_a_session_that_came_here(host: Host, ownership: Ownership) -> None:
    """COMMITTING and GONE are of a session that leaves."""
    known(host, ownership)
    arrived = ownership in (Ownership.COMMITTED, Ownership.STARTING, Ownership.OWNER)
    assert host.decision("5e55") == (COMMITTED if arrived else None)
    assert host.decision("another") is None


def test_the_servicer_tells_what_is_here(host: Host) -> None:
    servicer = HostServicer(host)
    empty = servicer.GetMachine(host_pb2.GetMachineRequest(), CONTEXT)
    assert (empty.role, empty.HasField("machine"), empty.migrating, empty.gone_to) == ("destination", False, False, "")
    host.adopt(cast("MachineClient", FakeMachine(host.directory)))
    host.begin_migration("5e55")
    known(host, Ownership.OWNER)
    full = servicer.GetMachine(host_pb2.GetMachineRequest(), CONTEXT)
    assert (full.machine.name, full.migrating, full.session_id, full.gone_to) == ("vm", True, "5e55", "")
    known(host, Ownership.GONE)
    assert servicer.GetMachine(host_pb2.GetMachineRequest(), CONTEXT).gone_to == "b:1"


def ask(servicer: HostServicer, name: str) -> object:
    return getattr(servicer, name)(getattr(host_pb2, f"{name}Request")(), CONTEXT)


@pytest.mark.parametrize(
    ("name", "told", "state"),
    [("Pause", "pause", "paused"), ("Resume", "resume", "running"), ("StopMachine", "shutdown", "off")],
)
def test_an_operator_is_obeyed_unless_a_migration_runs(host: Host, name: str, told: str, state: str) -> None:
    servicer = HostServicer(host)
    with pytest.raises(RefusalError) as refused:
        ask(servicer, name)
    assert refused.value.reason == "NO_MACHINE"
    fake = FakeMachine(host.run_directory("5e55"))
    host.adopt(cast("MachineClient", fake))
    known(host, Ownership.OWNER)
    host.begin_migration("5e55")
    with pytest.raises(RefusalError) as refused:
        ask(servicer, name)
    assert refused.value.reason == "MIGRATION_RUNS" and fake.told == []
    host.end_migration()
    ask(servicer, name)
    assert fake.told == [told] and not host.migrating
    assert [event.machine_state for event in host.events._past] == [state]
    assert host.record_path.exists() is (name != "StopMachine")


@pytest.mark.parametrize("name", ["Migrate", "Cancel"])
def test_only_a_source_moves_machines_away(host: Host, name: str) -> None:
    with pytest.raises(RefusalError, match="this daemon is a destination") as refused:
        ask(HostServicer(host), name)
    assert refused.value.reason == "NOT_A_SOURCE"


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[..., None]]:
    """Handlers as the daemon sets them, without touching those of pytest."""
    handlers: dict[int, Callable[..., None]] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(daemon, "tune_allocator", lambda: None)
    return handlers


def serve(host: Host, opening: Callable[[], str], closing: Callable[[], None], listen: str = "127.0.0.1:0") -> int:
    return daemon.serve(host, listen, lambda _: None, [], opening=opening, closing=closing)


def test_a_daemon_serves_until_a_signal(
    host: Host, signals: dict[int, Callable[..., None]], capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def opening() -> str:
        order.append("opening")
        # The signal comes while it waits: from another thread, as soon as it can.
        threading.Timer(0.05, lambda: signals[signal.SIGTERM](signal.SIGTERM, None)).start()
        return "machine vm started"

    assert serve(host, opening, lambda: order.append("closing")) == 0
    assert order == ["opening", "closing"] and set(signals) == {signal.SIGINT, signal.SIGTERM}
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("switchover destination: listening on 127.0.0.1:") and not first.endswith(":0")
    assert second == "switchover destination: machine vm started"
    Host("destination", host.directory).close()  # it has let go of the directory


def test_a_daemon_that_cannot_open_its_machine_says_so_in_a_line(
    host: Host, signals: dict[int, Callable[..., None]], capsys: pytest.CaptureFixture[str]
) -> None:
    host.record_path.write_text("nonsense")
    assert serve(host, lambda: host.open_machine(None), lambda: None) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("switchover: ") and printed.err.count("\n") == 1


def test_a_daemon_whose_port_is_taken_does_not_open_the_machine(
    host: Host, signals: dict[int, Callable[..., None]], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert serve(host, lambda: pytest.fail("opened"), lambda: None, address) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and f"switchover: cannot listen on {address}" in printed.err
