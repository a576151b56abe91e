"""Starting devices, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.machine.device_config import Attachment, DeviceSpec
from common.machine.device_process import StartedDevice, connect, start
from common.vfio_user.server_process import ServerProcess


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
    path = tmp_path / "a b" / "far0.sock"
    assert device.ended(20) == f"its process has ended with exit code 0: {[str(path), f'x={path}']}"
    device.close()


@pytest.mark.parametrize("command", ["/nowhere/device", "device 'of"])
def test_a_command_that_is_none(tmp_path: Path, command: str) -> None:
    with pytest.raises(OSError, match=r"^(\[Errno 2\] far0: /nowhere/device|\[Errno 22\] far0: its command)"):
        begun(tmp_path, command)


def test_a_device_that_ends_instead_of_listening(tmp_path: Path) -> None:
    device = begun(tmp_path, "sh -c 'echo no luck; exit 3'")
    with pytest.raises(OSError, match="far0: its process has ended with exit code 3: no luck"):
        connect(device)
    device.close()


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A child that does not listen to SIGTERM.
STUBBORN = 'trap "" TERM; sleep 1000 & echo $! > {socket}.pid; wait'


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (f"sh -c '({STUBBORN}) & wait'", -signal.SIGTERM),
        (f"sh -c '{STUBBORN}'", -signal.SIGKILL),
        (f"sh -c '({STUBBORN}) & exit 0'", 0),  # it has gone long ago
    ],
)
def test_all_that_it_has_started_ends_with_it(tmp_path: Path, command: str, status: int) -> None:
    device = begun(tmp_path, command)
    pid = tmp_path / "far0.sock.pid"
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
    assert device.process is not None
    if status == 0:
        assert device.process.wait(20) == 0
        # Nobody has reaped it, so no other process can have the number that its group is ended by.
        assert Path(f"/proc/{device.process.pid}").exists()
    device.close()
    device.close()
    assert device.process.wait(0) == status
    assert not Path(f"/proc/{device.process.pid}").exists()
    wait_for(lambda: not is_alive(int(pid.read_text())))


def test_what_it_says_is_kept_nowhere_but_for_the_end(tmp_path: Path) -> None:
    device = begun(tmp_path, "sh -c 'head -c 30000000 /dev/zero | tr \"\\0\" y; echo; echo the end; exit 3'")
    assert device.ended(60) == "its process has ended with exit code 3: the end"
    assert device.process is not None and len(device.process._output) <= 4096
    assert list(tmp_path.iterdir()) == []
    device.close()


def test_it_ends_with_whoever_has_started_it(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; from common.machine.device_process import start; "
        "from common.machine.device_config import Attachment, DeviceSpec; "
        "spec = DeviceSpec('far0', 'vfio-user', attachment=Attachment('', 'sleep 1000')); "
        "print(start(spec, pathlib.Path(sys.argv[1]), trace=False).process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, check=False)
    wait_for(lambda: not is_alive(int(done.stdout)))


def test_a_process_that_never_becomes_the_command() -> None:
    with pytest.raises(OSError, match="preexec_fn"):
        ServerProcess(["true"], before_exec=lambda: os.chdir("/nowhere"))
