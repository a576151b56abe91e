"""The verifier can fail: a device whose DMA is not logged, behind everybody's back, is found out, and named."""

from __future__ import annotations

from pathlib import Path

import pytest
from rig import Rig, machine_toml, switchover, wait_for
from switchover.v1 import migration_pb2
from test_journey_localhost import goes_on

UNLOGGED = {"nic": 'faults = ["unlogged"]'}


@pytest.mark.parametrize(
    "kind",
    [migration_pb2.LANE_KIND_GRPC, pytest.param(migration_pb2.LANE_KIND_TCP, marks=pytest.mark.matrix)],
    ids=["grpc", "tcp"],
)
def test_strict_finds_it_before_the_machine_runs(rig: Rig, image: Path, kind: migration_pb2.LaneKind.ValueType) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic", "nvme"), extra=UNLOGGED))
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("source.switchover") as arrived:
        session = source.begin(destination.address, lane_kind=kind)
        arrived()
        goes_on(source)
    result = source.follow(session)
    assert (result.result, result.verified, result.reason) == ("failed", "false", "DATA_LOSS")
    assert result.mismatched_pages > 0
    for mismatch in result.mismatches:
        assert any(writer.startswith("nic0 at IOVA ") for writer in mismatch.could_have_written), mismatch
        assert mismatch.sent_in_rounds[0] == 0
    assert "nic0" in result.error
    # It was found before the handover: the machine goes on here, and nothing is there.
    goes_on(source, before)
    wait_for(lambda: not destination.look().HasField("machine"), "the destination has kept it")


def test_deferred_finds_it_and_pauses_the_machine(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",), extra=UNLOGGED))
    destination = rig.start("destination")
    goes_on(source)
    with rig.held("source.switchover") as arrived:
        session = source.begin(destination.address, verify=migration_pb2.VERIFY_MODE_DEFERRED)
        arrived()
        goes_on(source)
    result = source.follow(session)
    assert (result.result, result.verified, result.reason) == ("failed", "false", "DATA_LOSS")
    assert destination.look().machine.state == "paused"
    # Both copies are kept.
    assert source.look().machine.state == "moved"


@pytest.mark.parametrize("unlogged", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_the_command_says_so(rig: Rig, image: Path, unlogged: bool) -> None:
    extra = UNLOGGED if unlogged else {}
    source = rig.start("source", machine_toml(image=image, devices=("nic",), extra=extra))
    destination = rig.start("destination")
    goes_on(source)
    done = switchover("migrate", "--source", source.address, "--destination", destination.address)
    if unlogged:
        assert done.returncode == 5
        assert "nic0" in done.stdout + done.stderr
    else:
        assert done.returncode == 0
