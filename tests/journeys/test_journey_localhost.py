"""A machine moves between two daemons on one host: with every kind of device, and without; there and back; paused."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from rig import Daemon, Rig, assert_completed, machine_toml, switchover, switchover_json, wait_for
from switchover.v1 import host_pb2

ALL = ("nic", "nvme", "accelerator")
# What each driver counts when it has checked something that its device did.
CHECKED = {"nic": "finished", "nvme": "finished", "accelerator": "finished", "writer": "checked", "clock": "ticks"}


def goes_on(daemon: Daemon, since: dict[str, dict[str, int]] | None = None) -> dict[str, dict[str, int]]:
    """Wait until every program of the guest has counted on; fail if one has found something wrong."""
    before = since if since is not None else daemon.counters()

    def all_count() -> dict[str, dict[str, int]] | None:
        now = daemon.counters()
        return now if all(now[name]["steps"] > before[name]["steps"] for name in before) else None

    return wait_for(all_count, f"a guest program stands still: {before}", seconds=20)


MORE_DEVICES = [("nic",), ("nvme",), ("accelerator",), ("nic", "nic", "nvme")]


@pytest.mark.parametrize(
    "devices",
    [(), ALL, *(pytest.param(devices, marks=pytest.mark.matrix) for devices in MORE_DEVICES)],
    ids="+".join,
)
def test_a_machine_moves_and_its_guest_goes_on(rig: Rig, image: Path, devices: tuple[str, ...]) -> None:
    source = rig.start("source", machine_toml(image=image, devices=devices))
    destination = rig.start("destination")
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert_completed(result)
    goes_on(destination, before)
    assert result.guest_gap_ms > 0
    assert {device.name: device.verified for device in result.devices} == {
        device.name: "compared" for device in destination.look().machine.devices
    }
    assert all(device.stop_copy_bytes for device in result.devices)
    left = source.look()
    assert (left.HasField("machine"), left.gone_to) == (False, destination.address)


@pytest.mark.parametrize(
    "viommu", ["enabled = false", pytest.param("enabled = true\naddress_width = 39", marks=pytest.mark.matrix)]
)
def test_with_and_without_viommu(rig: Rig, image: Path, viommu: str) -> None:
    source = rig.start("source", machine_toml(image=image, devices=ALL, viommu=viommu))
    destination = rig.start("destination")
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert_completed(result)
    assert [tracking.method for tracking in result.dirty_tracking] == ["device"]
    goes_on(destination, before)


def test_the_modules_and_the_command(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image), command=(sys.executable, "-m", "source"))
    destination = rig.start("destination", command=(sys.executable, "-m", "destination"))
    before = goes_on(source)
    document = switchover_json("migrate", "--source", source.address, "--destination", destination.address)
    assert document["result"] == "completed"
    assert document["verified"] is True
    assert document["guest_gap_ms"] > 0
    assert sum(document["downtime"].values()) == pytest.approx(document["downtime_ms"], rel=0.2)
    assert document["total_ms"] > document["downtime_ms"] > 0
    assert document["dirty_tracking"]["method"] is None  # there is no device
    assert document["ram"]["bytes"] == 64 << 20
    goes_on(destination, before)


def test_there_and_back(rig: Rig, image: Path) -> None:
    a = rig.start("host", machine_toml(image=image, devices=ALL))
    b = rig.start("host")
    counters = goes_on(a)
    for source, destination in ((a, b), (b, a), (a, b)):
        assert_completed(source.migrate(destination.address))
        counters = goes_on(destination, counters)
    assert b.look().machine.incarnation == 4


def test_a_paused_machine_stays_paused(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic", "accelerator")))
    destination = rig.start("destination")
    goes_on(source)
    source.stub.Pause(host_pb2.PauseRequest(), timeout=20)
    before = source.counters()
    result = source.migrate(destination.address)
    assert_completed(result)
    assert destination.look().machine.state == "paused"
    time.sleep(0.2)
    assert destination.counters() == before
    destination.stub.Resume(host_pb2.ResumeRequest(), timeout=20)
    goes_on(destination, before)


@pytest.mark.matrix
def test_ram_above_4_gib(rig: Rig, image: Path) -> None:
    source = rig.start("source", machine_toml(ram="6GiB", image=image, devices=("nic",)))
    destination = rig.start("destination")
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert_completed(result)
    assert result.ram.bytes == 6 << 30
    goes_on(destination, before)
    # Holes stay holes on both sides.
    assert destination.look().machine.ram_allocated_bytes < 1 << 30


@pytest.mark.parametrize(
    "options",
    [
        ("--lane-kind", "tcp", "--lanes", "2", "--verify", "deferred"),
        *(
            pytest.param(options, marks=pytest.mark.matrix)
            for options in (
                ("--verify", "deferred"),
                ("--lanes", "3"),
                ("--verify", "off"),
                *(("--compress", how) for how in ("lz4", "zstd", "auto")),
                ("--lane-kind", "tcp", "--compress", "zstd"),
            )
        ),
    ],
)
def test_ways_to_send_and_to_verify(rig: Rig, image: Path, options: tuple[str, ...]) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination")
    before = goes_on(source)
    document = switchover_json("migrate", "--source", source.address, "--destination", destination.address, *options)
    assert document["result"] == "completed"
    assert document["verified"] is (options[-1] != "off")
    assert document["lane_kind"] == ("tcp" if "tcp" in options else "grpc")
    goes_on(destination, before)


def test_the_operators_commands(rig: Rig) -> None:
    source = rig.start("source", machine_toml())
    assert switchover_json("status", source.address)["machine"]["state"] == "running"
    assert switchover("pause", source.address).returncode == 0
    assert switchover_json("status", source.address)["machine"]["state"] == "paused"
    assert switchover("resume", source.address).returncode == 0
    assert switchover_json("status", source.address)["machine"]["state"] == "running"
    assert switchover("stop", source.address).returncode == 0
    assert switchover_json("status", source.address)["machine"] is None
