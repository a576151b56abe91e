"""Cancelled, killed, not converging, refused: before the handover the machine always goes on where it was."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from rig import Daemon, Rig, assert_completed, machine_toml, switchover, wait_for
from switchover.v1 import host_pb2, migration_pb2, migration_pb2_grpc
from test_journey_localhost import goes_on

from common.machine.config import MachineSpec, ViommuSpec, to_json
from common.rpc.errors import PeerError, peer_error

UUID = "6f0c8f0e-7d3f-4d0f-9a51-6b7cf1b1d9aa"
EMPTY = MachineSpec("empty", UUID, 64 << 20, (), 0.4, ViommuSpec(), (), ())
PHASES = (
    *("destination.preparing", "source.precopy", "source.round1", "source.switchover", "source.paused"),
    *("source.stopped", "source.handover"),
)
MBIT = 1e6 / 8
LANE_KINDS = (
    migration_pb2.LANE_KIND_GRPC,
    pytest.param(migration_pb2.LANE_KIND_TCP, marks=pytest.mark.matrix),
)


def sent_bytes(source: Daemon, session: str) -> int:
    """Return what the session's newest progress says."""
    for event in source.stub.WatchEvents(host_pb2.WatchEventsRequest(session_id=session), timeout=20):
        if event.HasField("progress") and event.progress.sent_bytes:
            return event.progress.sent_bytes
        if event.HasField("result"):
            break
    return 0


@pytest.mark.matrix
@pytest.mark.parametrize("kind", LANE_KINDS)
@pytest.mark.parametrize("point", PHASES)
def test_cancelled_in_each_phase_and_tried_again(
    rig: Rig, image: Path, point: str, kind: migration_pb2.LaneKind.ValueType
) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic", "accelerator")))
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held(point) as arrived:
        # A downtime that nothing fits into, so that there is a second round.
        downtime_ms = 0.001 if point == "source.round1" else 300
        session = source.begin(destination.address, max_downtime_ms=downtime_ms, lane_kind=kind, lanes=2)
        arrived()
        source.stub.Cancel(host_pb2.CancelRequest(session_id=session), timeout=20)
    result = source.follow(session)
    assert (result.result, result.reason) == ("cancelled", "CANCELLED")
    before = goes_on(source, before)
    assert {device.state for device in source.look().machine.devices} == {"RUNNING"}
    # It was told: by itself it would wait 30 s for its source.
    wait_for(lambda: not destination.look().migrating, "the destination has not let go", 25)
    assert_completed(source.migrate(destination.address, lane_kind=kind))
    goes_on(destination, before)


@pytest.mark.parametrize("kind", LANE_KINDS)
def test_cancelled_while_pages_flow(rig: Rig, image: Path, kind: migration_pb2.LaneKind.ValueType) -> None:
    source = rig.start("source", machine_toml(image=image))
    destination = rig.start("destination")
    before = goes_on(source)
    session = source.begin(destination.address, bandwidth_limit=40 * MBIT, lane_kind=kind, lanes=2)
    wait_for(lambda: sent_bytes(source, session) > 0, "nothing is sent")
    source.stub.Cancel(host_pb2.CancelRequest(session_id=session), timeout=20)
    assert source.follow(session).reason == "CANCELLED"
    goes_on(source, before)
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")


@pytest.mark.parametrize("kind", LANE_KINDS)
@pytest.mark.parametrize("ends", ["kill", pytest.param("stop", marks=pytest.mark.matrix)])
def test_the_destination_ends_while_pages_flow(
    rig: Rig, image: Path, ends: str, kind: migration_pb2.LaneKind.ValueType
) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination", state="killed")
    before = goes_on(source)
    session = source.begin(destination.address, bandwidth_limit=40 * MBIT, lane_kind=kind)
    # Nearly 40 MB at 5 MB/s: once some of it is there, the rest is on its way.
    wait_for(lambda: destination.look().migrating, "it does not begin")
    wait_for(lambda: sent_bytes(source, session) > 0, "nothing is sent")
    getattr(destination, ends)()
    result = source.follow(session)
    assert result.result == "failed"
    assert destination.address in result.error
    before = goes_on(source, before)
    again = rig.start("destination", state="killed")
    assert_completed(source.migrate(again.address))
    goes_on(again, before)


def test_the_source_daemon_is_killed_and_a_new_one_finds_the_machine(rig: Rig, image: Path) -> None:
    machine = machine_toml(image=image, devices=("nic",))
    source = rig.start("source", machine, state="s")
    destination = rig.start("destination")
    before = goes_on(source)
    pid = source.look().machine.pid
    with rig.held("source.round1") as arrived:
        source.begin(destination.address, max_downtime_ms=0.001)
        arrived()
        source.kill()
        wait_for(lambda: not destination.look().migrating, "the destination has not let go")
    again = rig.start("source", machine, state="s")
    assert again.said.endswith("found running")
    assert again.look().machine.pid == pid
    before = goes_on(again, before)
    assert_completed(again.migrate(destination.address))
    goes_on(destination, before)


def test_a_daemon_that_ends_leaves_its_machine_running(rig: Rig) -> None:
    source = rig.start("source", machine_toml(), state="s")
    before = goes_on(source)
    assert source.stop() == 0
    again = rig.start("source", state="s")
    goes_on(again, before)


@pytest.mark.matrix
def test_that_it_gets_no_better_is_said_once(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, pattern="sequential", rate="80MB/s"))
    destination = rig.start("destination")
    session = source.begin(destination.address, max_rounds=16, max_downtime_ms=5, bandwidth_limit=400 * MBIT)
    assert source.follow(session).reason == "NOT_CONVERGED"
    events = source.stub.WatchEvents(host_pb2.WatchEventsRequest(session_id=session), timeout=20)
    assert sum("it gets no better" in event.message for event in events) == 1


@pytest.mark.matrix
def test_it_does_not_converge(rig: Rig, image: Path) -> None:
    guest = machine_toml(image=image, pattern="sequential", rate="40MB/s")
    source = rig.start("source", guest)
    destination = rig.start("destination")
    before = goes_on(source)
    result = source.migrate(destination.address, max_rounds=3, max_downtime_ms=5, bandwidth_limit=100 * MBIT)
    assert (result.result, result.reason) == ("failed", "NOT_CONVERGED")
    assert "would converge with" in result.error
    assert "--auto-converge" in result.error
    assert len(result.rounds) == 3
    before = goes_on(source, before)
    result = source.migrate(destination.address, timeout_s=2, max_downtime_ms=5, bandwidth_limit=100 * MBIT)
    assert (result.result, result.reason) == ("failed", "NOT_CONVERGED")
    assert "not converged in 2 s" in result.error
    before = goes_on(source, before)
    result = source.migrate(
        destination.address,
        max_rounds=3,
        max_downtime_ms=5,
        bandwidth_limit=400 * MBIT,
        on_timeout=host_pb2.ON_TIMEOUT_SWITCH_OVER,
    )
    assert_completed(result)
    assert "switching over as told" in result.rounds[-1].decision
    goes_on(destination, before)


@pytest.mark.matrix
def test_it_converges_with_slower_vcpus(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, pattern="sequential", rate="40MB/s"))
    destination = rig.start("destination")
    before = goes_on(source)
    result = source.migrate(
        destination.address, auto_converge=True, max_downtime_ms=60, bandwidth_limit=200 * MBIT, timeout_s=60
    )
    assert_completed(result)
    throttles = [item.throttle_percent for item in result.rounds]
    assert result.throttle_percent >= 20
    assert throttles == sorted(throttles)
    goes_on(destination, before)
    assert "slowed down by 20 %" in " ".join(item.decision for item in result.rounds)


def test_what_a_migration_is_refused_for(rig: Rig) -> None:
    source = rig.start("source", machine_toml())
    destination = rig.start("destination")
    before = goes_on(source)

    def refusal(address: str) -> PeerError:
        with pytest.raises(grpc.RpcError) as caught:
            source.begin(address)
        return peer_error(caught.value)

    assert refusal("nowhere").reason == "BAD_REQUEST"
    with rig.held("source.precopy") as arrived:
        session = source.begin(destination.address)
        arrived()
        assert refusal(destination.address).reason == "MIGRATION_RUNS"
        with pytest.raises(grpc.RpcError) as caught:
            source.stub.StopMachine(host_pb2.StopMachineRequest(), timeout=20)
        assert peer_error(caught.value).reason == "MIGRATION_RUNS"
        source.stub.Cancel(host_pb2.CancelRequest(), timeout=20)
    assert source.follow(session).result == "cancelled"

    # Nobody there; somebody else there; somebody there who has a machine already.
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    result = source.migrate(f"127.0.0.1:{port}")
    assert (result.result, result.reason) == ("failed", "UNREACHABLE")
    result = source.migrate(source.address)
    assert (result.result, result.reason) == ("failed", "NOT_SWITCHOVER")
    other = rig.start("host", machine_toml("other"))
    result = source.migrate(other.address)
    assert (result.result, result.reason) == ("failed", "HAS_MACHINE")
    goes_on(source, before)


def test_a_device_is_missing_there(rig: Rig) -> None:
    source = rig.start("source", machine_toml(devices=("nic", "nvme")))
    destination = rig.start("destination", command=(sys.executable, "-m", "console", "destination", "--devices", "nic"))
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert (result.result, result.reason) == ("failed", "NO_SUCH_DEVICE")
    assert "no device of kind nvme" in result.error
    goes_on(source, before)


def prepare_refusal(address: str, request: migration_pb2.PrepareRequest) -> PeerError:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        migration_pb2_grpc.MigrationServiceStub(channel).Prepare(request, timeout=20)
    return peer_error(caught.value)


def test_what_a_destination_refuses(rig: Rig) -> None:
    destination = rig.start("destination")
    good = {"session_id": "s1", "protocol_version": 1, "machine_uuid": UUID}
    assert (
        prepare_refusal(destination.address, migration_pb2.PrepareRequest(**{**good, "protocol_version": 7})).reason
        == "PROTOCOL_VERSION"
    )
    assert (
        prepare_refusal(destination.address, migration_pb2.PrepareRequest(**{**good, "session_id": "../x"})).reason
        == "BAD_REQUEST"
    )
    assert (
        prepare_refusal(destination.address, migration_pb2.PrepareRequest(**good, machine_json="{}")).reason
        == "BAD_REQUEST"
    )
    huge = replace(EMPTY, ram_size=1 << 37)
    held = migration_pb2.PrepareRequest(
        **{**good, "session_id": "s2"}, machine_json=to_json(huge), data_first=[0], data_pages=[1 << 25]
    )
    refusal = prepare_refusal(destination.address, held)
    assert refusal.reason == "NOT_ENOUGH_MEMORY"
    assert "131072 MiB" in str(refusal)
    assert not destination.look().migrating


def test_bad_starts_get_one_line(rig: Rig) -> None:
    bad = rig.directory / "bad.toml"
    bad.write_text('name = "m"\n[ram]\nsise = "64MiB"\n')
    state = str(rig.directory / "x")
    done = switchover("source", "--machine", str(bad), "--listen", "127.0.0.1:0", "--state-dir", state)
    assert done.returncode != 0
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert "bad.toml:3" in done.stderr
    assert "sise" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        done = switchover("destination", "--listen", f"127.0.0.1:{port}", "--state-dir", state)
    assert done.returncode != 0
    assert f"127.0.0.1:{port}" in done.stderr
    assert done.stderr.count("\n") == 1
    first = rig.start("destination", state="d")
    done = switchover("destination", "--listen", "127.0.0.1:0", "--state-dir", str(first.state_dir))
    assert done.returncode != 0
    assert "in use by another daemon" in done.stderr
