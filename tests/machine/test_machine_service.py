"""A daemon's client and the machine's service, connected, around a machine that only takes notes."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.iommu.iova_tree import Mapping, RamTarget
from common.ipc.channel import Client, ClosedError, RequestError
from common.machine import record
from common.machine import service as service_module
from common.machine.client import Changes, DeviceConfig, DeviceSizes, MachineClient, MappingChange, Tracking
from common.machine.config import MachineSpec, ViommuSpec
from common.machine.device import Digest, Pending, Saved, Sizes
from common.machine.machine import Machine
from common.machine.record import Ownership, Record
from common.machine.service import MachineService
from common.machine.state_changes import StateChanges
from common.memory import bitmap, runs
from common.memory.packed import PackedBitmap
from common.memory.ram import GuestRam
from common.vfio.feature import PrecopyInfo
from common.vfio.migration import DeviceState

UUID = "6f2c9e0a-0000-4000-8000-000000000001"
PAGES = (64 << 20) // 4096


class FakeDevice:
    """A device that takes notes."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes
        self.spec = SimpleNamespace(kind="nic", container="default")
        self.migration_flags = 7
        self.state = DeviceState.RUNNING
        self.bar_sizes = {0: 4096, 2: 1 << 20}
        self.client = SimpleNamespace(
            extension=SimpleNamespace(comparable_dump=True),
            mig_data_write=lambda data: notes.append(f"{name} takes {bytes(data)!r}"),
        )

    def read_saved(self, size: int) -> Saved:
        return Saved(4, b"d" * min(size, 5), ended=size > 5)

    def sizes(self) -> Sizes:
        if self.name == "nic0":
            return Sizes(4, PrecopyInfo(3, 4), None, length_failed=True)
        return Sizes(0, None, 9, length_failed=False)


class FakeContainer:
    """An address space whose mappings were always the same."""

    def take_delta(self) -> SimpleNamespace:
        mapping = Mapping(0x1000, 0x2000, 0x5000, RamTarget(0x5000), readable=True, writable=False)
        return SimpleNamespace(removed=[mapping], added=[mapping, mapping])


class FakeLeaving:
    """A migration that takes notes."""

    def __init__(self, machine: Any) -> None:
        self.notes: list[str] = machine.notes
        self.running: bool = machine.state == "running"
        self.notes.append("begins")

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.notes.append(name)

    def start_tracking(self) -> list[tuple[SimpleNamespace, str, str]]:
        return [(SimpleNamespace(name="default"), "device", "all log")]

    def pause_vcpus(self) -> bool:
        self.notes.append("pause_vcpus")
        return self.running

    def sync(self) -> dict[str, PackedBitmap]:
        vcpu, default = bitmap.empty(PAGES), bitmap.empty(PAGES)
        bitmap.set_range(vcpu, 1, 2)
        bitmap.set_range(default, PAGES - 1, 1)
        return {"vCPU": PackedBitmap.of(vcpu, PAGES), "default": PackedBitmap.of(default, PAGES)}

    def stop_devices(self) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Pending]]:
        self.notes.append("stop_devices")
        configs = {"nic0": b"abc", "nic1": b"defgh"}
        return {"clock": 1}, configs, {"nic0": Pending((0, 2), (0,)), "nic1": Pending()}

    def could_have_written(self, page: int) -> list[str]:
        return [f"nic0 may have written {page}"]

    def late_writes(self, first: int, pages: int) -> list[str]:
        return [f"{first} + {pages}"]


class FakeMachine:
    """A machine without processes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.state = "running"
        self.failure = ""
        self.state_changes = StateChanges()
        self.spec = MachineSpec("vm", UUID, 64 << 20, (), 0.4, ViommuSpec(), (), ())
        self.ram = GuestRam.create(64 << 20)
        self.devices = {name: FakeDevice(name, self.notes) for name in ("nic0", "nic1")}
        self.containers = {"default": FakeContainer()}
        self.vcpus = SimpleNamespace(
            report=lambda: {"gap_us": 1234, "gap_run": 5},
            throttle=lambda percent: self.notes.append(f"throttle {percent}"),
        )

    def describe(self) -> dict[str, Any]:
        return {"name": "vm", "state": self.state}

    def blockers(self) -> list[str]:
        return ["one", "two"]

    def enter(self, device: FakeDevice, state: DeviceState, recover: DeviceState, *, only_from: DeviceState) -> None:
        self.notes.append(f"{device.name} enters {state.name} from {only_from.name}, else {recover.name}")

    def digests(self, most: int | None) -> dict[str, Digest]:
        return {"nic0": Digest((1 << 64) - 1, (1, most or 2), 3, compared=True)}

    def fail(self, cause: str) -> None:
        self.notes.append(f"failed: {cause}")

    def pause(self) -> None:
        self.notes.append("pause")

    def resume(self) -> None:
        raise OSError(22, "the machine has moved")


class FakeArriving:
    """An arrival that takes notes."""

    def __init__(self, machine: Any) -> None:
        self.notes: list[Any] = machine.notes

    def enter_resuming(self) -> None:
        self.notes.append("enter_resuming")

    def restart(self, name: str) -> None:
        self.notes.append(f"{name} restarts")

    def change_mappings(self, removed: Any, added: Any) -> None:
        self.notes.append((removed, added))

    def load(self, vcpu: Any, configs: Any, pending: Any, *, paused: bool) -> None:
        self.notes.append((vcpu, configs, pending, paused))

    def take_over(self) -> None:
        self.notes.append("take_over")


class Rig:
    """The service, and connections to it."""

    def __init__(self, directory: Path) -> None:
        self.machine = FakeMachine()
        self.record_path = directory / "record.json"
        self.service = MachineService(cast("Machine", self.machine), directory, self.record_path, 3)
        self.service.recorded = True
        self.directory = directory
        self.threads: list[threading.Thread] = []
        self.clients: list[MachineClient] = []

    def connect(self, *, first: bool = False) -> MachineClient:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self.service._serve, args=(theirs,), kwargs={"first": first})
        thread.start()
        self.threads.append(thread)
        self.clients.append(MachineClient(self.directory, Client(ours)))
        return self.clients[-1]

    def leave(self, client: MachineClient) -> None:
        """Close a connection, and wait until the machine has seen it."""
        client.close()
        thread = self.threads[self.clients.index(client)]
        thread.join(10)
        assert not thread.is_alive()

    def close(self) -> None:
        for client in self.clients:
            self.leave(client)
        self.machine.ram.close()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(service_module, "Leaving", FakeLeaving)
    monkeypatch.setattr(service_module, "Arriving", FakeArriving)
    made = Rig(tmp_path)
    yield made
    made.close()


def test_a_machine_as_a_whole(rig: Rig) -> None:
    client = rig.connect()
    described = client.describe()
    assert (described.name, described.incarnation, described.pid) == ("vm", 3, os.getpid())
    assert client.blockers() == ["one", "two"]
    assert client.spec() == rig.machine.spec
    assert [(d.name, d.kind, d.state, d.has_precopy) for d in client.devices()] == [
        ("nic0", "nic", "RUNNING", True),
        ("nic1", "nic", "RUNNING", True),
    ]
    assert client.devices()[0].bar_sizes == [4096, 0, 1 << 20, 0, 0, 0]
    assert (client.guest_gap_us(5), client.guest_gap_us(6)) == (1234, None)
    client.pause()
    client.throttle(30)
    assert rig.machine.notes == ["pause", "throttle 30"]


def test_ram_is_the_same_memory(rig: Rig) -> None:
    rig.machine.ram.bytes[4097] = 42
    with rig.connect().ram(writable=False) as ram:
        assert ram.size == 64 << 20 and ram.bytes[4097] == 42


def test_a_refusal_is_the_machines_own_words(rig: Rig) -> None:
    client = rig.connect()
    with pytest.raises(RequestError, match="the machine has moved") as refused:
        client.resume()
    assert refused.value.reason == "EINVAL"
    client.pause()


@pytest.mark.parametrize(
    "name", ["start_tracking", "enter_precopy", "mapping_changes", "sync", "pause_vcpus", "stop_devices", "running"]
)
def test_nothing_leaves_before_it_begins(rig: Rig, name: str) -> None:
    with pytest.raises(RequestError, match="no migration runs"):
        getattr(rig.connect(), name)()


def test_a_machine_of_another_version_is_not_migrated_and_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "REQUESTS", 1)
    client = rig.connect()
    with pytest.raises(RequestError, match="started by another version") as refused:
        client.begin("5e55")
    assert refused.value.reason == "MACHINE_VERSION"
    rig.leave(client)
    assert rig.machine.notes == ["begins", "end"]


def test_a_device_is_left_alone_when_its_migration_has_ended(rig: Rig) -> None:
    holder, reader = rig.connect(), rig.connect()
    holder.begin("5e55")
    holder.end()
    with pytest.raises(RequestError, match="no migration runs"):
        reader.leave_stop_copy("nic0")
    assert rig.machine.notes == ["begins", "end"]


def test_what_leaves_arrives_at_the_daemon_as_it_is(rig: Rig) -> None:
    client = rig.connect()
    assert client.begin("5e55") is True
    assert client.start_tracking() == [Tracking("default", "device", "all log")]
    client.enter_precopy()
    assert client.running() is True
    assert client.read_device("nic0", 3) == Saved(4, b"ddd", ended=False)
    assert client.read_device("nic0", 6).ended
    assert client.sizes("nic0") == DeviceSizes(4, 3, 4, None, length_failed=True)
    assert client.sizes("nic1") == DeviceSizes(0, None, None, 9, length_failed=False)
    change = MappingChange("default", 0x1000, 0x2000, 0x5000, readable=True, writable=False)
    assert client.mapping_changes() == Changes((change,), (change, change))
    report = client.sync()
    assert [report.sources["vCPU"].has(page) for page in (0, 1, 2, 3)] == [False, True, True, False]
    assert report.sources["default"].has(PAGES - 1)
    assert {name: packed.count() for name, packed in report.sources.items()} == {"vCPU": 2, "default": 1}
    assert runs.expand(report.union().runs()).tolist() == [1, 2, PAGES - 1]
    assert client.pause_vcpus() is True
    rest = client.stop_devices()
    client.leave_stop_copy("nic1")
    assert rest.vcpu == {"clock": 1}
    assert rest.devices == (
        DeviceConfig("nic0", b"abc", Pending((0, 2), (0,))),
        DeviceConfig("nic1", b"defgh", Pending()),
    )
    assert client.digests()["nic0"] == Digest((1 << 64) - 1, (1, 2), 3, compared=True)
    assert client.digests(7)["nic0"].bars == (1, 7)
    assert client.explain(7) == ["nic0 may have written 7"]
    assert client.late_writes(512, 3) == ["512 + 3"]
    client.end()
    assert rig.machine.notes == [
        "begins",
        "enter_precopy",
        "pause_vcpus",
        "stop_devices",
        "nic1 enters STOP from STOP_COPY, else STOP",
        "end",
    ]


def test_what_arrives_reaches_the_machine_as_it_is(rig: Rig) -> None:
    rig.machine.state, rig.service.recorded = "incoming", False
    client = rig.connect()
    assert client.begin("5e55") is False
    client.enter_resuming()
    added = MappingChange("default", 0x1000, 0x2000, 0x5000, readable=True, writable=False)
    client.change_mappings(Changes((MappingChange("default", 0x9000, 0x1000),), (added,)))
    client.write_device("nic1", b"xyz")
    client.restart_device("nic1")
    configs = [DeviceConfig("nic0", b"abc", Pending((1,), (0,))), DeviceConfig("nic1", b"", Pending())]
    client.load({"clock": 2}, configs, paused=True)
    client.take_over()
    assert rig.machine.notes == [
        "enter_resuming",
        ([["default", 0x9000, 0x1000, 0, False, False]], [["default", 0x1000, 0x2000, 0x5000, True, False]]),
        "nic1 takes b'xyz'",
        "nic1 restarts",
        ({"clock": 2}, {"nic0": b"abc", "nic1": b""}, {"nic0": Pending((1,), (0,)), "nic1": Pending()}, True),
        "take_over",
    ]
    client.record(Ownership.COMMITTED)  # or else the end of the connection would be the end of the machine
    rig.leave(client)
    assert not rig.service.ended.is_set()


def test_one_migration_at_a_time(rig: Rig) -> None:
    first, second = rig.connect(), rig.connect()
    first.begin("a")
    with pytest.raises(RequestError, match="a migration runs") as refused:
        second.begin("b")
    assert refused.value.reason == "EBUSY"
    rig.leave(second)  # whoever was refused holds nothing
    assert rig.machine.notes == ["begins"]
    first.end()
    first.begin("c")
    assert rig.machine.notes == ["begins", "end", "begins"]


@pytest.mark.parametrize("state", ["failed", "moved"])
def test_a_machine_that_does_not_run_cannot_leave(rig: Rig, state: str) -> None:
    rig.machine.state = state
    with pytest.raises(RequestError, match=f"the machine has {state}"):
        rig.connect().begin("5e55")


def test_a_paused_machine_leaves_as_it_is(rig: Rig) -> None:
    rig.machine.state = "paused"
    assert rig.connect().begin("5e55") is False


def test_a_migration_ends_with_its_daemon(rig: Rig) -> None:
    """Only with the connection that began it, and once."""
    holder, other = rig.connect(), rig.connect()
    holder.begin("5e55")
    other.blockers()
    rig.leave(other)
    assert rig.machine.notes == ["begins"]
    rig.leave(holder)
    assert rig.machine.notes == ["begins", "end"] and not rig.service.ended.is_set()


def test_a_migration_that_may_be_committed_does_not_end_with_its_daemon(rig: Rig) -> None:
    holder = rig.connect()
    holder.begin("5e55")
    holder.record(Ownership.COMMITTING, session_id="5e55", peer="b:1")
    rig.leave(holder)
    assert rig.machine.notes == ["begins"]


def test_a_migration_that_was_revoked_ends_with_its_daemon(rig: Rig) -> None:
    holder = rig.connect()
    holder.begin("5e55")
    holder.record(Ownership.COMMITTING)
    holder.record(Ownership.OWNER)
    rig.leave(holder)
    assert rig.machine.notes == ["begins", "end"]


@pytest.mark.parametrize("began", ["running", "paused"])
def test_a_machine_that_is_being_handed_over_says_so_until_that_is_decided(rig: Rig, began: str) -> None:
    rig.machine.state = began
    holder = rig.connect()
    holder.begin("5e55")
    holder.record(Ownership.COMMITTING)
    assert rig.machine.state == "handing over"
    holder.record(Ownership.OWNER)
    assert rig.machine.state == began
    holder.record(Ownership.COMMITTING)
    holder.record(Ownership.GONE)
    assert rig.machine.state == "moved"


def test_a_machine_that_cannot_go_on_after_a_migration_has_failed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: FakeLeaving) -> None:
        raise OSError("nic0: no answer")

    monkeypatch.setattr(FakeLeaving, "end", end, raising=False)
    client = rig.connect()
    client.begin("5e55")
    client.end()
    assert rig.machine.notes == [
        "begins",
        "failed: it could not go on after a migration that has ended: nic0: no answer",
    ]
    assert rig.service.leaving is None


def test_changes_of_states_are_told_to_who_asks(rig: Rig) -> None:
    client = rig.connect()
    last, _ = client.state_changes(None)
    rig.machine.state_changes.note("nic0", DeviceState.PRE_COPY)
    assert client.state_changes(last)[1] == [("nic0", "PRE_COPY")]


def test_a_machine_of_which_nothing_is_recorded_ends_with_the_daemon_that_has_started_it(rig: Rig) -> None:
    rig.service.recorded = False
    starter, other = rig.connect(first=True), rig.connect()
    rig.leave(other)
    assert not rig.service.ended.is_set()
    rig.leave(starter)
    assert rig.service.ended.is_set()


def test_a_machine_that_is_recorded_does_not_end_with_the_daemon(rig: Rig) -> None:
    rig.service.recorded = False
    starter = rig.connect(first=True)
    starter.record(Ownership.OWNER)
    rig.leave(starter)
    assert not rig.service.ended.is_set()


def test_a_machine_that_was_arriving_ends_with_its_daemon(rig: Rig) -> None:
    rig.machine.state, rig.service.recorded = "incoming", False
    holder = rig.connect()
    holder.begin("5e55")
    rig.leave(holder)
    assert rig.service.ended.is_set()


def test_a_machine_that_is_committed_here_does_not_end_with_the_daemon(rig: Rig) -> None:
    rig.machine.state, rig.service.recorded = "incoming", False
    holder = rig.connect()
    holder.begin("5e55")
    holder.record(Ownership.COMMITTED)
    rig.leave(holder)
    assert not rig.service.ended.is_set()


@pytest.mark.parametrize("ownership", [Ownership.COMMITTING, Ownership.COMMITTED])
def test_a_machine_that_has_failed_is_not_handed_over(rig: Rig, ownership: Ownership) -> None:
    rig.machine.state, rig.machine.failure = "failed", "nic0: it is gone"
    with pytest.raises(RequestError, match="nic0: it is gone"):
        rig.connect().record(ownership)
    assert record.read(rig.record_path) is None and not rig.service.committed


def test_decisions_are_on_disk_when_they_are_answered(rig: Rig) -> None:
    client = rig.connect()
    client.record(Ownership.COMMITTING, session_id="5e55", peer="b:1")
    expected = Record(UUID, "vm", 3, Ownership.COMMITTING, str(rig.directory), "5e55", "b:1", judged=True)
    assert record.read(rig.record_path) == expected  # incarnation 0 keeps it
    client.record(Ownership.COMMITTING, session_id="5e55", peer="b:1", judged=False)
    assert record.read(rig.record_path) == dataclasses.replace(expected, judged=False)
    client.record(Ownership.COMMITTED, session_id="5e55", incarnation=7)
    found = record.read(rig.record_path)
    assert found is not None and (found.incarnation, found.ownership) == (7, Ownership.COMMITTED)
    client.record(Ownership.OWNER)
    found = record.read(rig.record_path)
    assert found is not None and (found.incarnation, found.session_id) == (7, "")
    with pytest.raises(RequestError):
        client._client.call("record", ownership="NOBODY", session_id="", peer="", incarnation=0)


def test_a_machine_that_is_gone_is_marked_as_moved(rig: Rig) -> None:
    rig.connect().record(Ownership.GONE, peer="b:1")
    assert rig.machine.state == "moved"


def test_a_defect_ends_its_connection_and_not_the_machine(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    broken, other = rig.connect(), rig.connect()
    with pytest.raises(RequestError) as refused:
        broken.read_device("nobody", 1)
    assert refused.value.reason == "INTERNAL"
    with pytest.raises(ClosedError):
        broken.blockers()
    assert other.blockers() == ["one", "two"]
    logged = capsys.readouterr()
    assert "defect" in logged.out + logged.err


def test_shutting_down_is_the_end(rig: Rig) -> None:
    rig.connect().shutdown()
    assert rig.service.ended.is_set()


def test_changes_are_true_if_there_are_any() -> None:
    change = MappingChange("default", 0, 4096)
    assert not Changes((), ()) and Changes((change,), ()) and Changes((), (change,))


def test_a_bitmap_that_is_too_short_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    client = rig.connect()
    client.begin("5e55")
    monkeypatch.setattr(FakeLeaving, "sync", lambda _: {"vCPU": PackedBitmap.of(bitmap.empty(3), 3)})
    with pytest.raises(ValueError):
        client.sync()
