"""A daemon dies in the handover: the next one finds the record, asks, and there is exactly one owner."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from rig import Daemon, Rig, machine_toml, switchover, wait_for
from test_journey_localhost import goes_on


def owner_of(*daemons: Daemon) -> list[bool]:
    """Return for each daemon whether its machine runs."""
    looks = [daemon.look() for daemon in daemons]
    return [look.HasField("machine") and look.machine.state == "running" for look in looks]


@pytest.mark.matrix
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


@pytest.mark.matrix
def test_the_source_dies_before_it_hears_the_answer(rig: Rig, image: Path) -> None:
    machine = machine_toml(image=image, devices=("nic",))
    source = rig.start("source", machine, state="s")
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("destination.committed") as arrived:
        source.begin(destination.address)
        arrived()
        source.kill()
    wait_for(lambda: owner_of(destination) == [True], "it does not start at the destination")
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


def undecided(rig: Rig, source: Daemon) -> str:
    """Lose the destination for good between COMMITTING and its answer; return the session."""
    destination = rig.start("destination")
    with rig.held("destination.committed") as arrived:
        session = source.begin(destination.address)
        arrived()
        destination.kill()
        machine = [line for line in rig.processes() if str(destination.state_dir) in line]
        for line in machine:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        assert machine
    wait_for(lambda: source.look().ownership == "COMMITTING", "it is not undecided")
    return session


@pytest.mark.matrix
def test_the_operator_says_that_the_machine_is_here(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    before = goes_on(source)
    done = switchover("resolve", source.address, "--owner", "here", "--yes")
    assert (done.returncode, "[DECIDED]" in done.stderr) == (1, True)
    session = undecided(rig, source)
    assert owner_of(source) == [False]
    done = switchover("forget", source.address, "--yes")
    assert (done.returncode, "who owns it is not decided" in done.stderr) == (1, True)
    done = switchover("resolve", source.address, "--owner", "here")
    assert (done.returncode, "must not run at" in done.stderr) == (2, True)
    assert source.look().ownership == "COMMITTING"
    done = switchover("resolve", source.address, "--owner", "here", "--yes")
    assert done.returncode == 0, done.stderr
    result = source.follow(session)
    assert (result.result, result.reason, result.owner) == ("failed", "RESOLVED", "source")
    before = goes_on(source, before)
    assert owner_of(source) == [True]
    again = rig.start("destination")
    assert source.migrate(again.address).result == "completed"
    goes_on(again, before)


def test_the_operator_says_that_the_machine_is_there(rig: Rig, image: Path) -> None:
    """Here to a daemon that has found the question when it started; and what is kept can be dropped."""
    machine = machine_toml(image=image, devices=("nic",))
    source = rig.start("source", machine, state="s")
    goes_on(source)
    undecided(rig, source)
    source.kill()
    source = rig.start("source", machine, state="s")
    assert "is being asked" in source.said
    done = switchover("resolve", source.address, "--owner", "there", "--yes")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: not source.look().migrating, "it goes on asking")
    look = source.look()
    assert (look.ownership, look.machine.state) == ("GONE", "moved")
    done = switchover("forget", source.address, "--yes")
    assert done.returncode == 0, done.stderr
    assert not source.look().HasField("machine")
    assert source.stop() == 0
    # Forgotten: the next start may boot it.
    source = rig.start("source", machine, state="s")
    assert source.said.endswith("machine m started")
    goes_on(source)


@pytest.mark.matrix
def test_a_destination_that_comes_back_is_not_the_owner_of_a_machine_that_was_declared(rig: Rig, image: Path) -> None:
    """All was lost there but its record: what it was offered is not taken for new, and it takes the machine again."""
    source = rig.start("source", machine_toml(image=image))
    before = goes_on(source)
    session = undecided(rig, source)
    assert switchover("resolve", source.address, "--owner", "here", "--yes").returncode == 0
    assert source.follow(session).reason == "RESOLVED"
    lost = next(path for path in rig.directory.iterdir() if path.name.startswith("destination") and path.is_dir())
    back = rig.start("destination", state=lost.name)
    assert "was lost before it was started here" in back.said
    assert owner_of(source, back) == [True, False]
    assert source.migrate(back.address).result == "completed"
    goes_on(back, before)
