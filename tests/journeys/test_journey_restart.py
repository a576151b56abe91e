"""A daemon is killed and started again: it finds its machine, knows what it owned, and starts nothing twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest
from rig import Rig, assert_completed, machine_toml, wait_for
from switchover.v1 import host_pb2, migration_pb2
from test_journey_handover import owner_of
from test_journey_localhost import goes_on
from test_journey_verdict import UNLOGGED

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize(
    "point", ["source.setup", "source.round0", "source.paused", "source.stopped", "source.handover"]
)
def test_a_source_is_killed_in_each_phase(rig: Rig, image: Path, point: str) -> None:
    """Its machine ends the migration by itself; of what was collected nothing is left, so the next sends all of RAM."""
    machine = machine_toml(image=image, devices=("nic", "nvme"))
    source = rig.start("source", machine, state="s")
    destination = rig.start("destination")
    before = goes_on(source)
    look = source.look().machine
    with rig.held(point) as arrived:
        source.begin(destination.address)
        arrived()
        source.kill()
    again = rig.start("source", machine, state="s")
    assert again.said.endswith("found running")
    assert (again.look().machine.pid, again.look().ownership) == (look.pid, "OWNER")
    wait_for(lambda: goes_on(again, before), "it stands still")
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")
    result = again.migrate(destination.address)
    assert_completed(result)
    assert result.rounds[0].pages == look.ram_bytes // 4096
    goes_on(destination, before)


def test_a_destination_is_killed_after_the_machine_has_come(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("host", state="d")
    before = goes_on(source)
    assert_completed(source.migrate(destination.address))
    pid = destination.look().machine.pid
    for _ in range(2):
        destination.kill()
        destination = rig.start("host", state="d")
        assert destination.said.endswith("machine m found running")
        look = destination.look()
        assert (look.ownership, look.machine.pid) == ("OWNER", pid)
        before = goes_on(destination, before)
    back = rig.start("host")
    assert_completed(destination.migrate(back.address))
    goes_on(back, before)


def test_a_copy_that_is_kept_is_not_started(rig: Rig, image: Path) -> None:
    """The verdict came after the machine ran there; whoever starts here finds the copy, and cannot let it run."""
    machine = machine_toml(image=image, devices=("nic",), extra=UNLOGGED)
    source = rig.start("source", machine, state="s")
    destination = rig.start("destination")
    goes_on(source)
    with rig.held("source.switchover") as arrived:
        session = source.begin(destination.address, verify=migration_pb2.VERIFY_MODE_DEFERRED)
        arrived()
        goes_on(source)
    assert source.follow(session).reason == "DATA_LOSS"
    source.kill()
    source = rig.start("source", machine, state="s")
    assert source.said.endswith(f"has moved to {destination.address}; its copy here is kept")
    with pytest.raises(grpc.RpcError):
        source.stub.Resume(host_pb2.ResumeRequest(), timeout=20)
    assert (source.look().machine.state, owner_of(source)) == ("moved", [False])
    source.stub.Forget(host_pb2.ForgetRequest(), timeout=20)
    look = source.look()
    assert (look.HasField("machine"), look.ownership) == (False, "FORGOTTEN")


def test_a_machine_that_has_lost_its_power_is_started_from_its_image(rig: Rig, image: Path) -> None:
    """As a later incarnation than any that it has been."""
    machine = machine_toml(image=image)
    source = rig.start("source", machine, state="s")
    goes_on(source)
    look = source.look().machine
    os.kill(look.pid, signal.SIGKILL)
    source.kill()
    source = rig.start("source", machine, state="s")
    assert source.said.endswith("machine m started")
    assert source.look().machine.incarnation > look.incarnation
    goes_on(source)
