from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_rig import PATIENCE, Memory

from common.datasheets import nic, pci
from common.vfio.migration import DeviceState
from common.vfio_user.client import DeviceError, VfioUserClient

COMMAND = [sys.executable, "-m", "common.devices"]


def start(kind: str, path: Path, *more: str, **knobs: object) -> subprocess.Popen[bytes]:
    arguments = [kind, "--name", f"{kind}0", "--socket", str(path), "--knobs", json.dumps(knobs), *more]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE)
    end = time.monotonic() + PATIENCE
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)
    return process


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "device.sock"
    assert not (tmp_path / "device.sock").exists()


def finish(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def test_a_device_moves_from_process_to_process(tmp_path: Path, ram: Memory) -> None:
    paths = [tmp_path / name for name in ("source", "target")]
    processes = [start("accelerator", path, memory=1 << 20) for path in paths]
    source, target = (VfioUserClient.connect(path, path.name, PATIENCE) for path in paths)
    source.region_write(2, 5, b"moved")
    source.set_state(DeviceState.STOP_COPY)
    target.set_state(DeviceState.RESUMING)
    while data := source.mig_data_read(1 << 20):
        target.mig_data_write(data)
    target.set_state(DeviceState.RUNNING)
    assert target.region_read(2, 5, 5) == b"moved"
    for client, process, path in zip((source, target), processes, paths, strict=True):
        client.close()
        assert finish(process) == (0, b"")
        assert not path.exists()


def test_serves_the_next_client_if_it_shall(path: Path) -> None:
    process = start("nic", path, "--no-once")
    for _ in range(2):
        with VfioUserClient.connect(path, "nic0", PATIENCE) as client:
            assert int.from_bytes(client.region_read(0, pci.ID, 4), "little") == nic.MAGIC
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (0, b"")


@pytest.mark.parametrize(
    ("connected", "number"), [(False, signal.SIGTERM), (True, signal.SIGTERM), (False, signal.SIGINT)]
)
def test_ends_on_a_signal(path: Path, connected: bool, number: signal.Signals) -> None:
    process = start("nic", path)
    client = VfioUserClient.connect(path, "nic0", PATIENCE) if connected else None
    process.send_signal(number)
    assert finish(process) == (0, b"")
    if client is not None:
        client.close()


def test_a_wrong_knob_is_said_in_a_line(path: Path) -> None:
    status, errors = finish(start("nic", path, rate="fast"))
    assert status == 1
    assert errors == b"nic0: rate must be a number, not 'fast'\n"


def test_a_user_serves_a_device_with_knobs_of_the_machine_file(path: Path) -> None:
    knobs = ("--knob", "memory=1MiB", "--knob", 'faults=["fail_reset"]', "--knob", "churn=0")
    command = [
        sys.executable,
        "-m",
        "console",
        "device",
        "accelerator",
        "--name",
        "mine",
        "--socket",
        str(path),
        *knobs,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"mine: listening at {path}\n"
    for _ in range(2):
        with VfioUserClient.connect(path, "mine", PATIENCE) as client:
            assert client.regions[pci.MEMORY_BAR].size == 1 << 20
            with pytest.raises(DeviceError):
                client.reset()
            client.reset()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE) == ("", "")
    assert process.returncode == 0


def test_does_not_take_a_server_or_a_file_away(path: Path, tmp_path: Path) -> None:
    process = start("nic", path)
    status, errors = finish(start("nvme", path))
    assert (status, errors.count(b"\n")) == (1, 1) and b"there is a server already" in errors
    with VfioUserClient.connect(path, "nic0", PATIENCE) as client:  # which has not taken the question for its client
        assert int.from_bytes(client.region_read(0, pci.ID, 4), "little") == nic.MAGIC
    assert finish(process) == (0, b"")
    file = tmp_path / "file"
    file.write_text("mine")
    assert finish(start("nic", file))[0] == 1 and file.read_text() == "mine"


def test_takes_the_place_of_a_server_that_has_died(path: Path) -> None:
    dead = start("nic", path)
    dead.kill()
    finish(dead)
    assert path.is_socket()
    process = subprocess.Popen(
        [*COMMAND, "nic", "--name", "n", "--socket", str(path), "--no-once"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline()
    VfioUserClient.connect(path, "n", PATIENCE).close()
    process.terminate()
    process.communicate(timeout=PATIENCE)
