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
from common.vfio_user.client import VfioUserClient

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


@pytest.mark.parametrize("connected", [False, True])
def test_ends_on_sigterm(path: Path, connected: bool) -> None:
    process = start("nic", path)
    client = VfioUserClient.connect(path, "nic0", PATIENCE) if connected else None
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (0, b"")
    if client is not None:
        client.close()


def test_a_wrong_knob_is_said_in_a_line(path: Path) -> None:
    status, errors = finish(start("nic", path, rate="fast"))
    assert status == 1
    assert errors == b"nic0: rate must be a number, not 'fast'\n"
