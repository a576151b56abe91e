"""Devices that somebody else serves: attached by socket or started by a command, moved, and lost."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import grpc
import pytest
from rig import Daemon, Rig, assert_completed, machine_toml, switchover_json, wait_for
from switchover.v1 import host_pb2
from test_journey_localhost import goes_on

from common.rpc.errors import peer_error

PLAIN = Path(__file__).with_name("plain_device.py")


def command(kind: str, *options: str) -> str:
    return " ".join([sys.executable, str(PLAIN), kind, "{socket}", *options])


def attached(device_kind: str, lines: str, driver: str = "", viommu: str = "") -> str:
    """Return a machine file with one device of others, and its driver."""
    guest = f'[[guest]]\nprogram = "clock"\n[[guest]]\nprogram = "driver"\ndevice = "far0"\n{driver}\n'
    device = f'[[device]]\nname = "far0"\nkind = "{device_kind}"\n{lines}\n'
    return machine_toml(guest=guest, viommu=viommu) + device


def device_file(rig: Rig, lines: str) -> Path:
    path = rig.directory / "devices.toml"
    path.write_text(f'[[device]]\nname = "far0"\n{lines}\n')
    return path


def started(rig: Rig, kind: str, *options: str, lines: str = "", driver: str = "", viommu: str = "") -> list[Daemon]:
    """Start two hosts that both start the device themselves; the machine runs at the first."""
    starts = f"command = '{command(kind, *options)}'"
    machine = attached(kind, f"{starts}\n{lines}", driver, viommu)
    devices = ("--device-file", str(device_file(rig, starts)))
    return [rig.start("host", machine), rig.start("host", options=devices)]


@pytest.mark.parametrize(
    ("kind", "options", "lines", "viommu"),
    [
        ("nic", (), "", ""),
        pytest.param("nic", ("no-unmap-bitmap",), "", "", marks=pytest.mark.matrix),
        pytest.param("nic", ("messages",), "", "", marks=pytest.mark.matrix),
        pytest.param("nvme", ("messages",), "", "enabled = false", marks=pytest.mark.matrix),
        pytest.param("accelerator", (), 'pre_copy = "on"', "", marks=pytest.mark.matrix),
        pytest.param("nvme", ("1",), "", "", marks=pytest.mark.matrix),
        pytest.param("accelerator", ("shrinking-bars",), "", "", marks=pytest.mark.matrix),
    ],
)
def test_a_device_of_others_moves_and_comes_back(
    rig: Rig, kind: str, options: tuple[str, ...], lines: str, viommu: str
) -> None:
    here, there = started(rig, kind, *options, lines=lines, driver="" if viommu else "remap = 2", viommu=viommu)
    counters = goes_on(here)
    notes = here.look().machine.devices[0].notes
    assert any("how much state it has is not known" in note for note in notes)
    assert any("PRE_COPY is not used" in note for note in notes) == ("pre_copy" not in lines and "1" not in options)
    for source, destination in ((here, there), (there, here)):
        result = source.migrate(destination.address)
        assert_completed(result)
        (device,) = result.devices
        assert device.verified == "compared"
        assert list(device.notes) == list(notes)
        assert bool(device.precopy_bytes) == ("pre_copy" in lines)
        assert result.dirty_tracking[0].method == "device"
        counters = goes_on(destination, counters)


@pytest.mark.matrix
def test_by_socket_from_whoever_started_it(rig: Rig) -> None:
    devices = []
    for name in ("here", "there"):
        path = rig.directory / f"{name}.sock"
        devices.append(rig.run([sys.executable, str(PLAIN), "nic", str(path)]))
        wait_for(path.exists, "it does not listen")
    machine = attached("nic", f'socket = "{rig.directory}/here.sock"')
    source = rig.start("source", machine)
    destination = rig.start("destination", options=("--device-socket", f"far0={rig.directory}/there.sock"))
    before = goes_on(source)
    assert_completed(source.migrate(destination.address))
    goes_on(destination, before)
    # It ends when its client goes, as it was told to: nobody here ends what he has not started.
    destination.stub.StopMachine(host_pb2.StopMachineRequest(), timeout=20)
    for device in devices:
        assert device.wait(20) == 0


def test_the_source_does_not_say_where_devices_are(rig: Rig) -> None:
    source = rig.start("source", attached("nic", f"command = '{command('nic')}'"))
    destination = rig.start("destination")
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert (result.result, result.reason) == ("failed", "NO_SUCH_DEVICE")
    assert "--device-socket far0=PATH" in result.error
    goes_on(source, before)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("socket = '/nowhere/dev.sock'", "far0: connect /nowhere/dev.sock: No such file or directory"),
        pytest.param(
            "command = '/nowhere/device {socket}'",
            "far0: /nowhere/device: No such file or directory",
            marks=pytest.mark.matrix,
        ),
        pytest.param("command = 'false'", "far0: its process has ended with exit code 1", marks=pytest.mark.matrix),
        # What it has started before it ends is not left behind.
        pytest.param(
            "command = 'sh -c \"sleep 1000 & echo out of luck; exit 3\"'",
            "with exit code 3: out of luck",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_a_device_that_cannot_be_had(rig: Rig, lines: str, said: str) -> None:
    source = rig.start("source", attached("nic", f"command = '{command('nic')}'"))
    destination = rig.start("destination", options=("--device-file", str(device_file(rig, lines))))
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert (result.result, result.reason) == ("failed", "CANNOT_BUILD")
    assert said in result.error
    goes_on(source, before)


@pytest.mark.matrix
def test_a_device_whose_bars_are_of_another_size_there(rig: Rig) -> None:
    """The guest would find other BARs where it knows its own."""
    source = rig.start("source", attached("accelerator", f"command = '{command('accelerator')}'"))
    starts = f"command = '{command('accelerator', f'memory={8 << 20}')}'"
    destination = rig.start("destination", options=("--device-file", str(device_file(rig, starts))))
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert (result.result, result.reason, result.owner) == ("failed", "DEVICE_DIFFERS", "source")
    assert result.error.startswith("far0: its BARs have ")
    goes_on(source, before)


def test_a_device_that_dies_is_the_machines_end(rig: Rig) -> None:
    source = rig.start("source", attached("nic", f"command = '{command('nic')}'"))
    goes_on(source)
    (line,) = [line for line in rig.processes() if "plain_device.py" in line]
    os.kill(int(line.split()[0]), signal.SIGKILL)
    machine = wait_for(lambda: source.look().machine.state == "failed" and source.look().machine, "nobody noticed")
    assert "far0" in machine.failure
    blockers = switchover_json("status", source.address)["machine"]["blockers"]
    assert blockers[0].startswith("the machine has failed: ")
    with pytest.raises(grpc.RpcError) as refused:
        source.begin("127.0.0.1:1")
    assert peer_error(refused.value).reason == "BLOCKED"


def test_a_killed_machine_takes_its_devices_along(rig: Rig) -> None:
    source = rig.start("source", attached("nic", f"command = '{command('nic')}'"))
    goes_on(source)
    os.kill(source.look().machine.pid, signal.SIGKILL)
    wait_for(lambda: not [line for line in rig.processes() if "plain_device.py" in line], "it lives on", seconds=10)
