"""Starting devices, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.machine.device_config import Attachment, DeviceSpec
from common.machine.device_process import StartedDevice, connect, start


def foreign(command: str = "", socket: str = "") -> DeviceSpec:
    return DeviceSpec("far0", "vfio-user", attachment=Attachment(socket, command))


def begun(tmp_path: Path, command: str) -> StartedDevice:
    return start(foreign(command), tmp_path, trace=False)


def test_a_device_that_listens_already_is_not_started(tmp_path: Path) -> None:
    device = start(foreign(socket="/run/far.sock"), tmp_path, trace=False)
    assert (device.process, device.socket, device.ended()) == (None, Path("/run/far.sock"), None)
    device.close()


def test_a_command_is_told_its_socket_as_one_word(tmp_path: Path) -> None:
    script = "import sys; print(sys.argv[1:], flush=True)"
    (tmp_path / "a b").mkdir()
    device = start(foreign(f"{sys.executable} -c '{script}' {{socket}} x={{socket}}"), tmp_path / "a b", trace=False)
    assert device.process is not None
    device.process.wait(20)
    path = tmp_path / "a b" / "far0.sock"
    assert device.ended() == f"its process has ended with exit code 0: {[str(path), f'x={path}']}"


@pytest.mark.parametrize("command", ["/nowhere/device", "device 'of"])
def test_a_command_that_is_none(tmp_path: Path, command: str) -> None:
    with pytest.raises(OSError, match=r"^(\[Errno 2\] far0: /nowhere/device|\[Errno 22\] far0: its command)"):
        begun(tmp_path, command)


def test_a_device_that_ends_instead_of_listening(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="far0: its process has ended with exit code 3: no luck"):
        connect(begun(tmp_path, "sh -c 'echo no luck; exit 3'"))


def test_all_that_it_has_started_ends_with_it(tmp_path: Path) -> None:
    device = begun(tmp_path, "sh -c 'trap \"\" TERM; sleep 1000 & echo $!; wait'")
    log = tmp_path / "far0.log"
    deadline = time.monotonic() + 20
    while not log.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int(log.read_text())
    device.close()
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert device.process is not None and device.process.returncode == -signal.SIGKILL


def test_it_ends_with_whoever_has_started_it(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; from common.machine.device_process import start; "
        "from common.machine.device_config import Attachment, DeviceSpec; "
        "spec = DeviceSpec('far0', 'vfio-user', attachment=Attachment('', 'sleep 1000')); "
        "print(start(spec, pathlib.Path(sys.argv[1]), trace=False).process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
