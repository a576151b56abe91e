"""The machine stops at awkward moments: what was on its way must arrive on the other side."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from rig import Rig, assert_completed, machine_toml, wait_for
from test_journey_localhost import goes_on


@pytest.mark.matrix
def test_with_an_interrupt_pending(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination")
    before = goes_on(source)
    # vCPUs stand still, the nic still receives: its interrupt finds nobody.
    with rig.held("source.paused") as arrived:
        session = source.begin(destination.address)
        arrived()
        time.sleep(0.2)
    result = source.follow(session)
    assert_completed(result)
    assert result.devices[0].pending_interrupts == 1
    goes_on(destination, before)


@pytest.mark.matrix
def test_with_a_doorbell_pending(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nvme",)))
    destination = rig.start("destination")
    before = goes_on(source)
    # The driver has rung, and the device does not get to look. Not before the switchover: drivers wait for 5 s only.
    with rig.held("source.switchover") as switches:
        session = source.begin(destination.address)
        switches()
        with rig.held("device.rung") as rung:
            rung()
            switches.release()
            result = source.follow(session)
            assert_completed(result)
            assert result.devices[0].pending_doorbells == 1
    goes_on(destination, before)


@pytest.mark.matrix
def test_inside_a_map_trap(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination")
    before = goes_on(source)
    at_the_stop = rig.held("source.switchover")
    session = source.begin(destination.address)
    at_the_stop()
    in_the_trap = rig.held("machine.map")
    in_the_trap()
    # The guest waits for its map while the vCPUs are told to pause; they answer when it has its answer.
    at_the_stop.release()
    time.sleep(0.3)
    assert destination.look().migrating
    in_the_trap.release()
    result = source.follow(session)
    assert_completed(result)
    goes_on(destination, before)


@pytest.mark.matrix
def test_with_5000_live_mappings(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",), mappings=5000))
    destination = rig.start("destination")
    before = goes_on(source)
    wait_for(lambda: source.look().machine.containers[0].mappings >= 5000, "they are not mapped")
    result = source.migrate(destination.address)
    assert_completed(result)
    assert destination.look().machine.containers[0].mappings >= 5000
    assert result.mappings >= 5000
    goes_on(destination, before)
