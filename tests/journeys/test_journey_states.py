"""Devices' migration states on the way: sessions that begin again, requests that fail, states that are told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from rig import Daemon, Rig, assert_completed, machine_toml, wait_for
from switchover.v1 import host_pb2, migration_pb2
from test_journey_localhost import goes_on

from common.rpc.errors import peer_error

pytestmark = pytest.mark.matrix

ALL_AT_ONCE = 60_000.0  # a downtime, in ms, that accepts whatever is left
DEVICES = ("nic", "nvme", "accelerator")
DEFERRED = migration_pb2.VERIFY_MODE_DEFERRED


def pause(daemon: Daemon) -> None:
    daemon.stub.Pause(host_pb2.PauseRequest(), timeout=20)


def resume(daemon: Daemon) -> None:
    daemon.stub.Resume(host_pb2.ResumeRequest(), timeout=20)


def states(daemon: Daemon) -> dict[str, str]:
    return {device.name: device.state for device in daemon.look().machine.devices}


# Saving sessions that begin again.


def test_paused_and_resumed_in_precopy(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=DEVICES))
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("source.sync0") as sent:
        session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
        sent()
        assert states(source) == {"nic0": "PRE_COPY", "nvme0": "RUNNING", "accelerator0": "PRE_COPY"}
        pause(source)
        assert set(states(source).values()) == {"STOP"}
        resume(source)
        assert states(source) == {"nic0": "PRE_COPY", "nvme0": "RUNNING", "accelerator0": "PRE_COPY"}
        before = goes_on(source, before)
    result = source.follow(session)
    assert_completed(result)
    goes_on(destination, before)


def test_paused_in_precopy_it_stays_paused(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=DEVICES))
    destination = rig.start("destination")
    goes_on(source)
    with rig.held("source.sync0") as sent:
        session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
        sent()
        pause(source)
    result = source.follow(session)
    assert_completed(result)
    assert destination.look().machine.state == "paused"
    before = destination.counters()
    resume(destination)
    goes_on(destination, before)


def test_resumed_in_precopy(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=DEVICES))
    destination = rig.start("destination")
    before = goes_on(source)
    pause(source)
    with rig.held("source.sync0") as sent:
        session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
        sent()
        resume(source)
        before = goes_on(source, before)
        assert states(source) == {"nic0": "PRE_COPY", "nvme0": "RUNNING", "accelerator0": "PRE_COPY"}
    result = source.follow(session)
    assert_completed(result)
    assert all(device.precopy_bytes for device in result.devices if device.kind != "nvme")
    goes_on(destination, before)


def test_nobody_pauses_it_in_the_switchover(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("source.paused") as paused:
        session = source.begin(destination.address)
        paused()
        for steer in (pause, resume):
            with pytest.raises(grpc.RpcError) as caught:
                steer(source)
            assert peer_error(caught.value).reason == "MIGRATION_RUNS"
    assert_completed(source.follow(session))
    goes_on(destination, before)


def test_paused_in_precopy_and_cancelled(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=DEVICES))
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("source.sync0") as sent:
        session = source.begin(destination.address)
        sent()
        pause(source)
        source.stub.Cancel(host_pb2.CancelRequest(session_id=session), timeout=20)
    assert source.follow(session).result == "cancelled"
    assert source.look().machine.state == "paused"
    assert set(states(source).values()) == {"STOP"}
    resume(source)
    before = goes_on(source, before)
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")
    assert_completed(source.migrate(destination.address))
    goes_on(destination, before)


RESETTING = """
[[guest]]
program = "clock"
[[guest]]
program = "driver"
device = "nic0"
reset_every = 2000
"""


@pytest.mark.parametrize("viommu", ["enabled = true", "enabled = false"])
def test_a_guest_resets_its_device_in_precopy(rig: Rig, image: Path, viommu: str) -> None:
    machine = machine_toml(image=image, devices=("nic",), drivers=False, guest=RESETTING, viommu=viommu)
    source = rig.start("source", machine)
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("source.sync0") as sent:
        session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
        sent()
        resets = source.counters()["driver0"]["resets"]
        wait_for(lambda: source.counters()["driver0"]["resets"] >= resets + 2, "it is not reset")
        assert states(source) == {"nic0": "PRE_COPY"}
        before = goes_on(source, before)
    result = source.follow(session)
    assert_completed(result)
    before = goes_on(destination, before)
    resets = before["driver0"]["resets"]
    wait_for(lambda: destination.counters()["driver0"]["resets"] > resets, "it is not reset there")


# Requests that fail. Each is told to fail once, at a moment at which only one side makes it.


class Hosts:
    """Two hosts; the machine is at `here`."""

    def __init__(self, image: Path) -> None:
        self.rig = Rig()
        self.here = self.rig.start("host", machine_toml(image=image, devices=("nic", "nvme")))
        self.there = self.rig.start("host")
        self.counters = goes_on(self.here)

    def fail(self, *requests: str) -> None:
        for request in requests:
            (self.rig.hooks / f"{request}.fails").touch()

    def failed(self) -> bool:
        return not list(self.rig.hooks.glob("*.fails"))

    def is_as_before(self) -> None:
        """The machine goes on at `here`, and can be moved."""
        assert self.here.look().machine.state == "running"
        assert set(states(self.here).values()) == {"RUNNING"}
        self.counters = goes_on(self.here, self.counters)
        wait_for(lambda: not self.there.look().migrating, "the destination has not let go")
        assert not self.there.look().HasField("machine")
        assert_completed(self.here.migrate(self.there.address))
        self.here, self.there = self.there, self.here
        self.counters = goes_on(self.here, self.counters)


@pytest.fixture(scope="module")
def hosts(image: Path) -> Iterator[Hosts]:
    hosts = Hosts(image)
    try:
        yield hosts
    finally:
        hosts.rig.close()


EIO, EINVAL = "Input/output error", "Invalid argument"


@pytest.mark.parametrize(
    ("point", "request_", "told"),
    [
        ("source.setup", "nic0.fail:PRE_COPY", f"nic0: set state PRE_COPY: {EIO}"),
        ("source.precopy", "nic0.fail_read", f"nic0: MIG_DATA_READ size 0x[0-9a-f]+: {EIO}"),
        ("source.precopy", "nic0.fail_precopy_info", f"nic0: get pre-copy info: {EIO}"),
        ("source.precopy", "nic0.fail_logging_report", f".*nic0: cannot get the DMA log of .*: {EIO}"),
        ("source.precopy", "nic0.fail:PRE_COPY_P2P", f"nic0: set state PRE_COPY_P2P: {EIO}"),
        ("source.precopy", "nvme0.fail:RUNNING_P2P", f"nvme0: set state RUNNING_P2P: {EIO}"),
        ("source.precopy", "nic0.fail:STOP_COPY", f"nic0: set state STOP_COPY: {EIO}"),
        ("source.precopy", "nvme0.fail:STOP_COPY", f"nvme0: set state STOP_COPY: {EIO}"),
        ("source.precopy", "nvme0.fail_read", f"nvme0: MIG_DATA_READ size 0x[0-9a-f]+: {EIO}"),
        ("source.stopped", "nic0.fail_logging_report", f".*nic0: cannot get the DMA log of .*: {EIO}"),
        ("source.comparing", "nic0.fail:STOP", f"nic0: set state STOP: {EIO}"),
        ("source.setup", "nic0.fail:RESUMING", f".*nic0: set state RESUMING: {EIO}"),
        ("source.precopy", "nic0.fail_write", f".*nic0: MIG_DATA_WRITE size 0x[0-9a-f]+: {EIO}"),
        ("source.stopped", "nvme0.fail_write", f".*nvme0: MIG_DATA_WRITE size 0x[0-9a-f]+: {EIO}"),
        ("source.precopy", "nvme0.fail_load", f".*nvme0: set state STOP: {EINVAL}; it was reset"),
        ("destination.finish", "nic0.fail:STOP", f".*nic0: set state STOP: {EIO}; it was reset"),
        # What is read to compare the devices, at the source first.
        ("destination.finish", "nic0.fail:STOP_COPY", f"nic0: set state STOP_COPY: {EIO}"),
        ("destination.finish", "nic0.fail_read", f"nic0: MIG_DATA_READ size 0x[0-9a-f]+: {EIO}"),
    ],
)
def test_a_request_fails(hosts: Hosts, point: str, request_: str, told: str) -> None:
    with hosts.rig.held(point) as arrived:
        session = hosts.here.begin(hosts.there.address, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        hosts.fail(request_)
    result = hosts.here.follow(session)
    assert hosts.failed()
    assert result.result == "failed"
    assert re.fullmatch(told, result.error), result.error
    hosts.is_as_before()


@pytest.mark.parametrize("request_", ["nvme0.fail:RUNNING_P2P", "nvme0.fail:RUNNING", "nic0.fail_logging_stop"])
def test_a_device_that_goes_on_at_the_second_attempt(hosts: Hosts, request_: str) -> None:
    with hosts.rig.held("source.stopped") as arrived:
        session = hosts.here.begin(hosts.there.address, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        hosts.fail(request_)
        hosts.here.stub.Cancel(host_pb2.CancelRequest(session_id=session), timeout=20)
    assert hosts.here.follow(session).result == "cancelled"
    assert hosts.failed()
    hosts.is_as_before()


@pytest.mark.parametrize("request_", ["nic0.fail:RUNNING_P2P", "nvme0.fail:RUNNING"])
def test_a_device_that_starts_there_at_the_second_attempt(hosts: Hosts, request_: str) -> None:
    with hosts.rig.held("destination.committed") as arrived:
        session = hosts.here.begin(hosts.there.address, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        hosts.fail(request_)
    assert_completed(hosts.here.follow(session))
    assert hosts.failed()
    hosts.here, hosts.there = hosts.there, hosts.here
    hosts.counters = goes_on(hosts.here, hosts.counters)


def test_a_device_that_cannot_be_compared_any_more(hosts: Hosts) -> None:
    """It runs there already; nobody knows whether it is the same, so its copy is kept until somebody drops it."""
    with hosts.rig.held("destination.committed") as arrived:
        session = hosts.here.begin(hosts.there.address, verify=DEFERRED, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        hosts.fail("nic0.fail_read")
    result = hosts.here.follow(session)
    assert hosts.failed()
    assert (result.result, result.owner, result.verified) == ("failed", "destination", "false"), result
    assert re.fullmatch(f"nic0: MIG_DATA_READ size 0x[0-9a-f]+: {EIO}", result.error)
    assert hosts.here.look().machine.state == "moved"
    hosts.here.stub.Forget(host_pb2.ForgetRequest(), timeout=20)
    hosts.here, hosts.there = hosts.there, hosts.here
    hosts.is_as_before()


def test_a_device_that_fails_to_say_how_much_there_is(hosts: Hosts) -> None:
    with hosts.rig.held("source.round0") as arrived:
        session = hosts.here.begin(hosts.there.address, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        hosts.fail("nvme0.fail_data_size")
    result = hosts.here.follow(session)
    assert_completed(result)
    assert "the rest would take" in result.rounds[0].decision
    assert len(result.rounds) == 2
    hosts.here, hosts.there = hosts.there, hosts.here


def test_a_machine_that_cannot_be_paused_runs_on(hosts: Hosts) -> None:
    hosts.fail("nic0.fail:STOP")
    with pytest.raises(grpc.RpcError) as caught:
        pause(hosts.here)
    assert f"nic0: set state STOP: {EIO}" in str(peer_error(caught.value))
    hosts.is_as_before()


@pytest.mark.parametrize("request_", ["nic0.fail_reset", "nic0.fail:RESUMING"])
def test_a_state_that_cannot_begin_again_there(hosts: Hosts, request_: str) -> None:
    with hosts.rig.held("source.sync0") as arrived:
        session = hosts.here.begin(hosts.there.address, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        # What has sent nothing yet begins, and does not begin again.
        assert hosts.here.tells(session, lambda event: any(its.sent_bytes for its in event.progress.devices))
        pause(hosts.here)
        hosts.fail(request_)
        resume(hosts.here)
        wait_for(hosts.failed, "it does not begin again")
    result = hosts.here.follow(session)
    assert (result.result, result.reason) == ("failed", "CANNOT_LOAD"), result
    hosts.is_as_before()


MAPPING = """
[[guest]]
program = "clock"
[[guest]]
program = "mapper"
device = "nic0"
mappings = 200
changes = 1000
"""


def mapper_machine(image: Path) -> str:
    return machine_toml(image=image, devices=("nic",), drivers=False, guest=MAPPING)


def changes(daemon: Daemon) -> int:
    return next(p.counters["changes"] for p in daemon.look().machine.programs if p.name == "mapper0")


@pytest.mark.parametrize("call", ["map", "unmap"])
def test_a_mapping_fails_while_its_machine_leaves(rig: Rig, image: Path, call: str) -> None:
    """The guest is told, as at any time; what the device may still write is sent, and there it has nothing left."""
    source = rig.start("source", mapper_machine(image))
    destination = rig.start("destination")
    goes_on(source)
    with rig.held("source.sync0") as arrived:
        session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        fault = rig.hooks / f"nic0.fail_{call}.fails"
        fault.touch()
        wait_for(lambda: not fault.exists(), "nothing is mapped")
    assert_completed(source.follow(session))
    (error, *_) = next(p.errors for p in destination.look().machine.programs if p.name == "mapper0")
    assert f"nic0: cannot {call} IOVA" in error and EIO in error
    assert destination.look().machine.state == "running"


@pytest.mark.parametrize(("point", "call"), [("source.setup", "map"), ("source.sync0", "unmap")])
def test_a_mapping_fails_there(rig: Rig, image: Path, point: str, call: str) -> None:
    source = rig.start("source", mapper_machine(image))
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held(point) as arrived:
        session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        changed = changes(source)
        wait_for(lambda: changes(source) > changed, "nothing is mapped")
        pause(source)  # whoever maps or unmaps now is the destination
        (rig.hooks / f"nic0.fail_{call}.fails").touch()
    result = source.follow(session)
    assert (result.result, result.reason, result.owner) == ("failed", "CANNOT_LOAD", "source"), result
    assert re.search(f"nic0: cannot {call} IOVA .* \\(DMA_{call.upper()}\\): {EIO}", result.error), result.error
    resume(source)
    before = goes_on(source, before)
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")
    assert_completed(source.migrate(destination.address))
    goes_on(destination, before)


def test_a_device_that_cannot_be_reset_is_the_machines_end(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination")
    goes_on(source)
    with rig.held("source.precopy") as arrived:
        session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
        arrived()
        for request in ("fail:STOP_COPY", "fail:STOP", "fail_reset"):
            (rig.hooks / f"nic0.{request}.fails").touch()
    result = source.follow(session)
    assert result.result == "failed"
    machine = source.look().machine
    assert machine.state == "failed"
    assert "a device could not be reset: nic0: set state STOP_COPY" in machine.failure
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")


# Switchover-ack.


def rounds_of(daemon: Daemon, session: str) -> int:
    for event in daemon.stub.WatchEvents(host_pb2.WatchEventsRequest(session_id=session), timeout=20):
        if event.HasField("progress") or event.HasField("result"):
            return event.progress.round
    return 0


def test_no_switchover_before_the_initial_data_is_loaded(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("accelerator",)))
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("destination.initial_data") as loading:
        session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
        loading()
        wait_for(lambda: rounds_of(source, session) >= 3, "there are no more rounds")
        before = goes_on(source, before)
    result = source.follow(session)
    assert_completed(result)
    assert "not loaded their initial data" in result.rounds[1].decision
    assert "are enough for the rest" in result.rounds[-1].decision
    goes_on(destination, before)


def test_nobody_waits_for_a_device_without_precopy_there(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("accelerator",)))
    destination = rig.start("destination")
    before = goes_on(source)
    (rig.hooks / "device-precopy.off").touch()
    with rig.held("destination.initial_data") as loading:
        # Nobody waits for it, so pre-copy is held until it has come.
        with rig.held("source.sync0"):
            session = source.begin(destination.address, max_downtime_ms=ALL_AT_ONCE)
            loading()
        # What it has sent since, and nobody takes yet, may still hold up the switchover itself.
        assert source.tells(session, lambda event: "are enough for the rest" in event.progress.decision)
    result = source.follow(session)
    assert_completed(result)
    assert len(result.rounds) == 1
    assert destination.look().machine.devices[0].migration == ["STOP_COPY", "P2P"]
    goes_on(destination, before)


# States are told.


def test_each_change_of_state_is_told(rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHOVER_TRACE", "1")
    source = rig.start("source", machine_toml(image=image, devices=("nic", "nvme")))
    destination = rig.start("destination")
    before = goes_on(source)
    output = rig.directory / "events"
    there: list[host_pb2.WatchEventsResponse] = []
    stream = destination.stub.WatchEvents(host_pb2.WatchEventsRequest())
    threading.Thread(target=collect, args=(stream, there), daemon=True).start()
    with output.open("wb") as file:
        watching = subprocess.Popen([sys.executable, "-m", "console", "watch", source.address, "--json"], stdout=file)
    try:
        wait_for(lambda: resume(source) or output.read_text(), "it does not watch")
        assert_completed(source.migrate(destination.address))
        goes_on(destination, before)
        wait_for(lambda: states_told(there, "nvme0")[-1:] == ["RUNNING"], "it is not told that they run")
        wait_for(lambda: '"result"' in output.read_text(), "the end is not told")
    finally:
        watching.kill()
        watching.wait()
        stream.cancel()
    here = [
        json_format.ParseDict(line, host_pb2.WatchEventsResponse(), ignore_unknown_fields=True)
        for line in map(json.loads, output.read_text().splitlines())
        if "device_state" in line
    ]
    assert states_told(here, "nic0")[:4] == ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP"]
    assert states_told(here, "nvme0")[:3] == ["RUNNING_P2P", "STOP_COPY", "STOP"]
    for name in ("nic0", "nvme0"):
        told = states_told(there, name)
        assert (told[0], told[-2:]) == ("RESUMING", ["RUNNING_P2P", "RUNNING"])
    log = next((destination.state_dir / "run").glob("*/machine.log")).read_text()
    for point in ("vfio_load_setup", "vfio_load_state_device_data", "vfio_migration_set_state", "vfio_vmstate_change"):
        assert point in log


def collect(stream: Iterator[host_pb2.WatchEventsResponse], events: list[host_pb2.WatchEventsResponse]) -> None:
    with suppress(grpc.RpcError):
        events.extend(stream)


def states_told(events: list[host_pb2.WatchEventsResponse], device: str) -> list[str]:
    changes = [event.device_state for event in events if event.HasField("device_state")]
    return [change.state for change in changes if change.name == device]
