from __future__ import annotations

import dataclasses
import os
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
from common.host.host import Host, HostError, default_state_dir
from common.host.network import Network
from common.host.ownership import COMMITTED, OPEN, REVOKED, why_kept
from common.host.service import HostServicer
from common.ipc.channel import ClosedError, RequestError
from common.machine import record
from common.machine.client import MachineClient
from common.machine.config import MachineSpec, ViommuSpec
from common.machine.record import Ownership, Record
from common.rpc.errors import RefusalError
from common.rpc.server import Server

UUID = "6f2c9e0a-0000-4000-8000-000000000001"
CONTEXT = cast("grpc.ServicerContext", SimpleNamespace(add_callback=lambda _: True))


class FakeMachine:
    """Remembers what it was told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.told: list[str] = []
        self.failure = ""
        self.changes = [[("nic0", "PRE_COPY"), ("nvme0", "STOP")], [], [("nic0", "STOP_COPY")]]
        self.told_states = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **_: self.told.append(" ".join([name, *map(str, args)]))

    def another(self) -> SimpleNamespace:
        return SimpleNamespace(state_changes=self._state_changes, close=self.told_states.set)

    def _state_changes(self, after: int | None) -> tuple[int, list[tuple[str, str]]]:
        if after is None:
            return 7, []
        if after - 7 == len(self.changes):
            raise ClosedError  # the process has ended
        return after + 1, self.changes[after - 7]

    def describe(self) -> host_pb2.Machine:
        return host_pb2.Machine(name="vm", state="failed" if self.failure else "running", failure=self.failure)


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

    def launch(spec: MachineSpec, *_: object, incarnation: int) -> FakeMachine:
        fake.told.append(f"launched {spec.name} {incarnation}")
        return fake

    monkeypatch.setattr(host_module, "launch", launch)
    monkeypatch.setattr(MachineClient, "connect", lambda _: fake)
    return fake


def known(host: Host, ownership: Ownership, **changes: Any) -> None:
    members = Record(UUID, "vm", 3, ownership, str(host.directory / "run" / "s"), "5e55", "b:1")
    record.write(host.record_path, dataclasses.replace(members, **changes))


def nobody(_: Path) -> MachineClient:
    raise ConnectionRefusedError(111, "nobody listens")


@pytest.fixture
def published(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What this host tells: of which session, and what."""
    seen: list[tuple[str, Any]] = []

    def publish(session_id: str = "", **event: Any) -> None:
        seen.append((session_id, *event.values()))

    monkeypatch.setattr(host.events, "publish", publish)
    return seen


@pytest.fixture
def lost(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """The process of the machine that was here has ended; what is started instead is this."""
    monkeypatch.setattr(MachineClient, "connect", nobody)
    return machine


def test_a_state_directory_has_one_daemon(tmp_path: Path) -> None:
    first = Host("source", tmp_path)
    with pytest.raises(HostError, match="is in use by another daemon"):
        Host("source", tmp_path)
    first.close()
    Host("source", tmp_path).close()


def test_the_state_directory_is_ours_alone(host: Host) -> None:
    host.decide("5e55", COMMITTED)
    host.run_directory("boot")
    found = {str(path.relative_to(host.directory)): path.stat().st_mode & 0o777 for path in host.directory.rglob("*")}
    assert found.pop("lock") == found.pop("decisions/5e55") == 0o600
    assert found == {"decisions": 0o700, "run": 0o700, "run/boot": 0o700}
    assert host.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_state_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(HostError, match="others than its owner may write to it: chmod 700"):
        Host("host", directory)
    assert list(directory.iterdir()) == []
    directory.chmod(0o755)
    Host("host", directory).close()


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
    assert machine.told == ["launched vm 1", "record OWNER", "resume"]
    assert cast("FakeMachine", host.require_machine()) is machine


@pytest.mark.parametrize(("migrating", "session_id"), [(False, ""), (True, "5e55")])
def test_what_devices_do_is_told_until_the_machine_ends(
    host: Host, machine: FakeMachine, published: list[tuple[str, Any]], migrating: bool, session_id: str
) -> None:
    host.session_id = "5e55"
    if migrating:
        host.begin_migration("5e55")
    host.tell_states(cast("MachineClient", machine))
    assert machine.told_states.wait(10)
    assert [(session, event.name, event.state) for session, event in published] == [
        (session_id, "nic0", "PRE_COPY"),
        (session_id, "nvme0", "STOP"),
        (session_id, "nic0", "STOP_COPY"),
    ]


def test_a_machine_that_runs_is_found_again(host: Host, spec: MachineSpec, machine: FakeMachine) -> None:
    known(host, Ownership.OWNER)
    assert host.open_machine(spec) == "machine vm found running"
    assert machine.told == ["end"]


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    ("ownership", "said"),
    [
        (Ownership.OWNER, "machine vm found running"),
        (Ownership.COMMITTING, "machine vm found; whether it is at b:1 now is being asked"),
        (Ownership.GONE, "machine vm has moved to b:1; its copy here is kept"),
    ],
)
def test_a_machine_that_is_there_is_held_and_left_as_it_is(
    host: Host, spec: MachineSpec, machine: FakeMachine, ownership: Ownership, said: str, described: bool
) -> None:
    """Above all none is started: not beside it, and not again."""
    known(host, ownership)
    before = host.record()
    assert host.open_machine(spec if described else None) == said
    assert machine.told == (["end"] if ownership is Ownership.OWNER else []) and host.record() == before
    assert cast("FakeMachine", host.machine) is machine


def test_a_machine_that_was_released_is_let_go(host: Host, spec: MachineSpec, machine: FakeMachine) -> None:
    """The last daemon ended before the process did. Whoever may answer there is not ours any more."""
    known(host, Ownership.RELEASED)
    assert host.open_machine(spec) == "machine vm is not started: it has moved to b:1"
    assert machine.told == ["shutdown"] and host.machine is None


@pytest.mark.parametrize(
    ("ownership", "said"), [(Ownership.OFF, "was switched off"), (Ownership.FORGOTTEN, "was forgotten")]
)
def test_a_machine_that_was_ended_is_ended(host: Host, machine: FakeMachine, ownership: Ownership, said: str) -> None:
    """Likewise."""
    known(host, ownership)
    assert host.open_machine(None) == f"machine vm {said}"
    assert machine.told == ["shutdown"] and host.machine is None


@pytest.mark.parametrize("ownership", [Ownership.COMMITTED, Ownership.STARTING])
def test_a_machine_that_was_committed_here_is_taken_over(
    host: Host, machine: FakeMachine, ownership: Ownership
) -> None:
    known(host, ownership)
    assert host.open_machine(None) == "machine vm found running"
    assert machine.told == ["take_over", "record OWNER"]
    known(host, Ownership.COMMITTING, session_id="another")  # it moves on, and the source of then may still ask
    assert host.decision("5e55") == COMMITTED


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("ownership", [Ownership.GONE, Ownership.RELEASED])
def test_a_machine_that_has_moved_is_never_started_again(
    host: Host, spec: MachineSpec, lost: FakeMachine, ownership: Ownership, described: bool
) -> None:
    known(host, ownership)
    assert host.open_machine(spec if described else None) == "machine vm is not started: it has moved to b:1"
    assert host.machine is None and lost.told == []


@pytest.mark.parametrize("ownership", [Ownership.GONE, Ownership.RELEASED])
def test_a_host_that_a_machine_has_left_starts_another(
    host: Host, spec: MachineSpec, lost: FakeMachine, ownership: Ownership
) -> None:
    known(host, ownership, name="other")
    assert host.open_machine(spec) == "machine vm started"
    assert lost.told == ["launched vm 1", "record OWNER", "resume"]


@pytest.mark.parametrize("ownership", [None, *Ownership])
def test_a_machine_that_has_left_is_not_started_whoever_was_here_since(
    host: Host, spec: MachineSpec, lost: FakeMachine, ownership: Ownership | None
) -> None:
    known(host, Ownership.GONE)
    host.set_aside()
    if ownership is None:
        host.record_path.unlink()
    else:
        known(host, ownership, name="other", peer="c:1")
    host.open_machine(spec)
    assert host.machine is None and lost.told == []
    # It came back, and was ended here: now it may be started.
    known(host, Ownership.OWNER)
    host.release(Ownership.OFF)
    known(host, Ownership.OFF, name="other")
    assert host.open_machine(spec) == "machine vm started"


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    ("ownership", "said"),
    [
        (Ownership.COMMITTING, "machine vm was lost here; whether it is at b:1 now is being asked"),
        (Ownership.STARTING, "machine vm was lost while it was started here: its process has ended"),
    ],
)
def test_a_lost_machine_whose_owner_is_not_known_is_not_started(
    host: Host, spec: MachineSpec, lost: FakeMachine, ownership: Ownership, said: str, described: bool
) -> None:
    """Nor is anything decided of it, which is the destination's or, for STARTING, was done already."""
    known(host, ownership)
    before = host.record()
    assert host.open_machine(spec if described else None) == said
    assert host.machine is None and lost.told == [] and host.record() == before


@pytest.mark.parametrize("described", [False, True])
def test_a_machine_lost_before_anything_of_it_ran_goes_on_at_its_source(
    host: Host, spec: MachineSpec, lost: FakeMachine, described: bool
) -> None:
    known(host, Ownership.COMMITTED)
    said = host.open_machine(spec if described else None)
    assert said == "machine vm was lost before it was started here; it goes on at its source"
    assert host.machine is None and lost.told == []
    assert host.decision("5e55") == REVOKED and host.record() is None


def test_a_lost_machine_is_revoked_before_its_record_is_removed(
    host: Host, lost: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else there would be a moment in which nothing is known of a session that was COMMITTED."""
    known(host, Ownership.COMMITTED)

    def power_fails(*_: object) -> None:
        raise OSError("power failure")

    monkeypatch.setattr(Host, "decide", power_fails)
    with pytest.raises(OSError):
        host.open_machine(None)
    assert host.decision("5e55") == COMMITTED


@pytest.mark.parametrize("ownership", [Ownership.OWNER, Ownership.OFF, Ownership.FORGOTTEN])
def test_a_machine_that_was_switched_off_is_started_if_described(
    host: Host, spec: MachineSpec, lost: FakeMachine, ownership: Ownership
) -> None:
    """As a later incarnation: what it was before must not come back."""
    known(host, ownership)
    said = "forgotten" if ownership is Ownership.FORGOTTEN else "switched off"
    assert host.open_machine(None) == f"machine vm was {said}"
    assert host.machine is None and lost.told == []
    assert host.open_machine(spec) == "machine vm started"
    assert lost.told == ["launched vm 4", "record OWNER", "resume"]


ENDED = (Ownership.RELEASED, Ownership.OFF, Ownership.FORGOTTEN)


@pytest.mark.parametrize("ownership", [each for each in Ownership if each not in ENDED])
def test_another_machine_is_not_taken_for_the_one_described(
    host: Host, spec: MachineSpec, machine: FakeMachine, ownership: Ownership
) -> None:
    known(host, ownership, name="other")
    with pytest.raises(HostError, match="holds machine other, not vm"):
        host.open_machine(spec)
    assert machine.told == ["close"] and host.machine is None


@pytest.mark.parametrize("ownership", [Ownership.RELEASED, Ownership.OFF])
def test_a_machine_that_is_released_leaves_only_its_record(host: Host, ownership: Ownership) -> None:
    host.release(ownership)
    assert host.record() is None
    known(host, Ownership.GONE)
    fake = FakeMachine(host.run_directory("5e55"))
    host.adopt(cast("MachineClient", fake))
    host.release(ownership)
    assert fake.told == ["shutdown"] and host.machine is None and not fake.directory.exists()
    found = host.record()
    assert found is not None and (found.ownership, found.incarnation, found.peer) == (ownership, 3, "b:1")
    # It left in this session, and has not come here in it.
    assert host.decision("5e55") is None


def test_a_machine_is_released_on_disk_before_its_process_ends(host: Host) -> None:
    """Else a daemon that ends in between would take it for one that was lost."""
    known(host, Ownership.GONE)
    seen: list[Ownership] = []

    class Ending(FakeMachine):
        def shutdown(self) -> None:
            found = host.record()
            assert found is not None
            seen.append(found.ownership)

    host.adopt(cast("MachineClient", Ending(host.run_directory("5e55"))))
    host.release(Ownership.RELEASED)
    assert seen == [Ownership.RELEASED]


@pytest.mark.parametrize("ownership", Ownership)
def test_whether_what_has_arrived_runs(host: Host, machine: FakeMachine, ownership: Ownership) -> None:
    assert host.arrival_failure("5e55") == ""
    known(host, ownership)
    arrived = ownership in (Ownership.COMMITTED, Ownership.STARTING, Ownership.OWNER)
    if ownership is Ownership.FORGOTTEN:
        assert host.arrival_failure("5e55") == "what was left of it was forgotten"
        return
    assert host.arrival_failure("5e55") == ("its process has ended" if arrived else "")
    host.adopt(cast("MachineClient", machine))
    assert host.arrival_failure("5e55") == ""
    machine.failure = "nic0: it could not be reset"
    assert (host.arrival_failure("5e55") != "") is (arrived or ownership is Ownership.OFF)
    assert host.arrival_failure("another") == ""


def test_a_host_knows_which_devices_it_has(tmp_path: Path) -> None:
    made = Host("host", tmp_path, ["nic"])
    assert made.device_kinds == {"nic"}
    made.close()


def test_decisions_are_remembered(host: Host) -> None:
    assert host.decision("5e55") is None
    host.decide("5e55", REVOKED)
    host.decide("0c0", COMMITTED)
    assert (host.decision("5e55"), host.decision("0c0"), host.decision("a")) == (REVOKED, COMMITTED, None)


def test_a_session_comes_once(host: Host) -> None:
    assert host.is_new("5e55")
    host.decide("5e55", OPEN)
    assert not host.is_new("5e55") and host.decision("5e55") is None
    known(host, Ownership.OWNER, session_id="0c0")
    assert not host.is_new("0c0") and host.is_new("a")


def test_what_was_committed_and_lost_unstarted_is_given_back(host: Host, machine: FakeMachine) -> None:
    known(host, Ownership.COMMITTED)
    host.adopt(cast("MachineClient", machine))
    host.give_back("5e55")
    assert (host.machine, host.record(), host.decision("5e55")) == (None, None, REVOKED)


@pytest.mark.parametrize("ownership", Ownership)
def test_what_the_record_says_of_a_session_that_came_here(host: Host, ownership: Ownership) -> None:
    """COMMITTING, GONE and RELEASED are of a session that leaves."""
    known(host, ownership)
    arrived = ownership not in (Ownership.COMMITTING, Ownership.GONE, Ownership.RELEASED)
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
    for ownership in (Ownership.GONE, Ownership.RELEASED):
        known(host, ownership)
        assert servicer.GetMachine(host_pb2.GetMachineRequest(), CONTEXT).gone_to == ""  # its migration still runs
        host.end_migration()
        assert servicer.GetMachine(host_pb2.GetMachineRequest(), CONTEXT).gone_to == "b:1"
        host.begin_migration("5e55")


def ask(servicer: HostServicer, name: str) -> object:
    return getattr(servicer, name)(getattr(host_pb2, f"{name}Request")(), CONTEXT)


@pytest.mark.parametrize("name", ["Pause", "Resume", "StopMachine"])
def test_an_operator_without_a_machine_is_refused(host: Host, name: str) -> None:
    with pytest.raises(RefusalError) as refused:
        ask(HostServicer(host), name)
    assert refused.value.reason == "NO_MACHINE"


@pytest.mark.parametrize("migrating", [False, True])
@pytest.mark.parametrize(("name", "told", "state"), [("Pause", "pause", "paused"), ("Resume", "resume", "running")])
def test_an_operator_pauses_and_resumes_beside_a_migration(
    host: Host,
    machine: FakeMachine,
    published: list[tuple[str, Any]],
    name: str,
    told: str,
    state: str,
    migrating: bool,
) -> None:
    host.adopt(cast("MachineClient", machine))
    if migrating:
        host.begin_migration("5e55")
    ask(HostServicer(host), name)
    assert machine.told == [told] and host.migrating is migrating
    assert published == [("", state)]


@pytest.mark.parametrize("name", ["Pause", "Resume"])
@pytest.mark.parametrize(
    ("reason", "raised", "said"), [("EBUSY", RefusalError, "MIGRATION_RUNS"), ("EINVAL", RequestError, "EINVAL")]
)
def test_a_machine_in_its_switchover_is_left_alone(
    host: Host,
    machine: FakeMachine,
    published: list[tuple[str, Any]],
    name: str,
    reason: str,
    raised: type[RefusalError | RequestError],
    said: str,
) -> None:
    def refuse() -> None:
        raise RequestError(reason, "the machine is in the switchover of a migration")

    machine.pause = machine.resume = refuse  # type: ignore[attr-defined]  # what `__getattr__` would have returned
    host.adopt(cast("MachineClient", machine))
    with pytest.raises(raised, match="in the switchover") as refused:
        ask(HostServicer(host), name)
    assert isinstance(refused.value, RefusalError | RequestError) and refused.value.reason == said
    assert not published  # nothing has happened


def test_an_operator_stops_a_machine_unless_a_migration_runs(host: Host, published: list[tuple[str, Any]]) -> None:
    servicer = HostServicer(host)
    fake = FakeMachine(host.run_directory("5e55"))
    host.adopt(cast("MachineClient", fake))
    known(host, Ownership.OWNER)
    host.begin_migration("5e55")
    with pytest.raises(RefusalError) as refused:
        ask(servicer, "StopMachine")
    assert refused.value.reason == "MIGRATION_RUNS" and fake.told == []
    host.end_migration()
    ask(servicer, "StopMachine")
    assert fake.told == ["shutdown"] and not host.migrating
    assert published == [("", "off")]
    found = host.record()
    assert found is not None and found.ownership is Ownership.OFF


@pytest.mark.parametrize("call", ["Pause", "Resume"])
def test_the_copy_of_a_machine_that_has_moved_runs_no_more(host: Host, call: str) -> None:
    machine = FakeMachine(host.run_directory("5e55"))
    host.adopt(cast("MachineClient", machine))
    known(host, Ownership.GONE)
    with pytest.raises(RefusalError, match="it went to b:1, and its copy is kept here until switchover forget") as no:
        ask(HostServicer(host), call)
    assert no.value.reason == "NO_MACHINE" and machine.told == []


def test_to_stop_a_machine_that_has_moved_does_not_switch_it_off(host: Host) -> None:
    """It is the copy here that ends."""
    host.adopt(cast("MachineClient", FakeMachine(host.run_directory("5e55"))))
    known(host, Ownership.GONE)
    ask(HostServicer(host), "StopMachine")
    found = host.record()
    assert found is not None and found.ownership is Ownership.RELEASED


KEPT = [
    (None, None, "nothing is kept here"),
    (Ownership.OFF, None, "nothing is kept here"),
    (Ownership.FORGOTTEN, None, "nothing is kept here"),
    (Ownership.COMMITTING, "handing over", "who owns it is not decided: switchover resolve"),
    (Ownership.COMMITTING, None, "who owns it is not decided: switchover resolve"),
    (Ownership.OWNER, "running", "it is this host's, and running: switchover stop ends it"),
    (Ownership.OWNER, "paused", "it is this host's, and paused: switchover stop ends it"),
    (Ownership.OWNER, "failed", None),
    (Ownership.OWNER, None, None),
    (Ownership.COMMITTED, "incoming", "it is this host's, and incoming: switchover stop ends it"),
    (Ownership.STARTING, "running", "it is this host's, and running: switchover stop ends it"),
    (Ownership.STARTING, None, None),
    (Ownership.GONE, "moved", None),
    (Ownership.GONE, None, None),
    (Ownership.RELEASED, None, None),
]


def test_revoked_sessions_do_not_fill_the_disk(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "MAX_DECISIONS", 3)
    host.decide("c0", COMMITTED)
    for number in range(6):
        host.decide(f"5e{number}", REVOKED)
        os.utime(host.directory / "decisions" / f"5e{number}", ns=(number, number))
    assert host.decision("c0") == COMMITTED
    assert [host.decision(f"5e{number}") for number in range(6)] == [None] * 4 + [REVOKED] * 2
    assert len(list((host.directory / "decisions").iterdir())) == 3


def test_what_an_arrival_has_left_that_ended_with_its_daemon_goes_with_the_next(host: Host) -> None:
    left = host.run_directory("5e55")
    (left / "machine.log").touch()
    assert host.run_directory("0c0").exists() and not left.exists()


@pytest.mark.parametrize(("ownership", "state", "reason"), KEPT)
def test_what_may_be_forgotten(ownership: Ownership | None, state: str | None, reason: str | None) -> None:
    assert why_kept(ownership, state=state) == reason


def test_a_machine_that_is_forgotten_is_dropped_and_may_be_started_again(
    host: Host, spec: MachineSpec, lost: FakeMachine, published: list[tuple[str, Any]]
) -> None:
    fake = FakeMachine(host.run_directory("5e55"))
    host.adopt(cast("MachineClient", fake))
    known(host, Ownership.OWNER)
    with pytest.raises(RefusalError, match="not forgotten: it is this host's, and running") as refused:
        ask(HostServicer(host), "Forget")
    assert refused.value.reason == "NOT_FORGOTTEN" and fake.told == []
    known(host, Ownership.GONE)
    host.begin_migration("5e55")
    with pytest.raises(RefusalError) as refused:
        ask(HostServicer(host), "Forget")
    assert refused.value.reason == "MIGRATION_RUNS" and fake.told == []
    host.end_migration()
    ask(HostServicer(host), "Forget")
    assert fake.told == ["shutdown"] and host.machine is None and published == [("", "forgotten")]
    assert host.open_machine(spec) == "machine vm started"
    assert lost.told == ["launched vm 4", "record OWNER", "resume"]


@pytest.mark.parametrize("name", ["Migrate", "Cancel", "ResolveHandover"])
def test_only_a_source_moves_machines_away(host: Host, name: str) -> None:
    with pytest.raises(RefusalError, match="this daemon is a destination") as refused:
        ask(HostServicer(host), name)
    assert refused.value.reason == "NOT_A_SOURCE"


@pytest.fixture(autouse=True)
def allocator_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "tune_allocator", lambda: None)


def serve(host: Host, opening: Callable[[], str], closing: Callable[[], None], listen: str = "127.0.0.1:0") -> int:
    return daemon.serve(host, Network(listen), lambda _: None, [], opening=opening, closing=closing)


def test_a_daemon_serves_until_a_signal(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def opening() -> str:
        order.append("opening")
        # The signal comes while it waits, and to another thread.
        threading.Timer(0.05, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()
        return "machine vm started"

    assert serve(host, opening, lambda: order.append("closing")) == 0
    assert order == ["opening", "closing"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("switchover destination: listening on 127.0.0.1:") and not first.endswith(":0")
    assert second == "switchover destination: machine vm started"
    Host("destination", host.directory).close()  # it has let go of the directory


def test_nobody_is_answered_before_it_is_known_what_the_host_owns(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    start = Server.start

    def starting(server: Server) -> None:
        order.append("start")
        start(server)
        os.kill(os.getpid(), signal.SIGTERM)

    def opening() -> str:
        order.append("opening")
        return "no machine"

    monkeypatch.setattr(Server, "start", starting)
    assert serve(host, opening, lambda: order.append("closing")) == 0
    assert order == ["opening", "start", "closing"]


def test_a_daemon_that_cannot_open_its_machine_says_so_in_a_line(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.record_path.write_text("nonsense")
    assert serve(host, lambda: host.open_machine(None), lambda: None) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("switchover: ") and printed.err.count("\n") == 1


def test_a_machine_that_refuses_to_go_on_is_held_and_said(host: Host, machine: FakeMachine) -> None:
    def take_over() -> None:
        raise RequestError("EINVAL", "the machine has failed: nic0")

    machine.take_over = take_over  # type: ignore[attr-defined]  # what `__getattr__` would have returned
    known(host, Ownership.STARTING)
    assert host.open_machine(None) == "machine vm is this host's, and does not run: the machine has failed: nic0"
    found = host.record()
    assert found is not None and found.ownership is Ownership.STARTING
    assert host.machine is not None and host.decision("5e55") == COMMITTED


def test_a_daemon_whose_port_is_taken_does_not_open_the_machine(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert serve(host, lambda: pytest.fail("opened"), lambda: None, address) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and f"switchover: cannot listen on {address}" in printed.err
