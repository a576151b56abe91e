"""A daemon dies in the handover: the next one finds the record, asks, and there is exactly one owner."""

from __future__ import annotations

from pathlib import Path

from rig import Daemon, Rig, machine_toml, wait_for
from test_journey_localhost import goes_on


def owner_of(*daemons: Daemon) -> list[bool]:
    """Return for each daemon whether its machine runs."""
    looks = [daemon.look() for daemon in daemons]
    return [look.HasField("machine") and look.machine.state == "running" for look in looks]


def test_the_source_dies_before_commit_is_sent(rig: Rig, image: Path) -> None:
    machine = machine_toml(image=image, devices=("nic",))
    source = rig.start("source", machine, state="s")
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("source.committing") as arrived:
        source.begin(destination.address)
        arrived()
        source.kill()
    source = rig.start("source", machine, state="s")
    wait_for(lambda: owner_of(source, destination) == [True, False], "it does not go on at the source")
    before = goes_on(source, before)
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")
    assert source.migrate(destination.address).result == "completed"
    goes_on(destination, before)


def test_the_source_dies_before_it_hears_the_answer(rig: Rig, image: Path) -> None:
    machine = machine_toml(image=image, devices=("nic",))
    source = rig.start("source", machine, state="s")
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("destination.committed") as arrived:
        source.begin(destination.address)
        arrived()
        source.kill()
    goes_on(destination, before)
    source = rig.start("source", machine, state="s")
    wait_for(lambda: source.look().gone_to == destination.address, "the source does not learn that it is gone")
    assert owner_of(source, destination) == [False, True]


def test_the_destination_dies_after_it_has_committed(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination", state="d")
    before = goes_on(source)
    with rig.held("destination.committed") as arrived:
        session = source.begin(destination.address)
        arrived()
        destination.kill()
    destination = rig.start("destination", state="d", listen=destination.address)
    result = source.follow(session)
    assert result.result == "completed" or result.reason in ("UNREACHABLE", "NO_SESSION"), result
    assert owner_of(source, destination) == [False, True]
    goes_on(destination, before)


def test_a_machine_that_is_gone_is_not_booted_again(rig: Rig, image: Path) -> None:
    machine = machine_toml(image=image)
    source = rig.start("source", machine, state="s")
    destination = rig.start("destination")
    goes_on(source)
    assert source.migrate(destination.address).result == "completed"
    assert source.stop() == 0
    source = rig.start("source", machine, state="s")
    assert f"it has moved to {destination.address}" in source.said
    assert owner_of(source, destination) == [False, True]
