"""The vCPU behind its socket: on a thread, and as the process that a machine starts."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_machine import FakeMachine

from common.guest.memory import GuestMemory
from common.guest.service import serve_vcpu
from common.guest.vcpu import Vcpu
from common.ipc.channel import Client, Message, RequestError, serve
from common.memory.packed import PackedBitmap

DEADLINE = 60.0
METHODS = ("mmio_read", "mmio_write", "mmio_block_read", "iommu_map", "iommu_unmap", "irq_enable")
PROGRAMS: list[dict[str, Any]] = [
    {"program": "clock", "name": "clock0"},
    {"program": "driver", "name": "nvme0", "device": "nvme0", "stall_ms": 60_000},
    {"program": "driver", "name": "nic0", "device": "nic0", "stall_ms": 60_000, "peer": "acc0"},
    {"program": "driver", "name": "acc0", "device": "acc0", "stall_ms": 60_000},
    {"program": "writer", "name": "writer0", "region_gpa": 32 << 20, "region_size": 4 << 20, "rate": 20_000_000},
]
DEVICES = {"nvme0": "nvme", "nic0": "nic", "acc0": "accelerator"}


class LiveMachine(FakeMachine):
    """A machine whose traps and devices are served by threads."""

    def __init__(self) -> None:
        super().__init__(PROGRAMS, DEVICES)
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.devices_run = threading.Event()
        self.devices_run.set()
        self.engine = threading.Thread(target=self._work)
        self.engine.start()

    def _work(self) -> None:
        while not self.stop.wait(0.001):
            if self.devices_run.is_set():
                with self.lock:
                    for device in self.devices.values():
                        device.work()

    def serve_traps(self, sock: socket.socket) -> None:
        def handler(method: str) -> Callable[[Message], Message]:
            def handle(request: Message) -> Message:
                with self.lock:
                    return self.call(method, **request.header)

            return handle

        serve(sock, {method: handler(method) for method in METHODS})

    def close(self) -> None:
        self.stop.set()
        self.engine.join()
        super().close()


@pytest.fixture
def machine() -> LiveMachine:
    return LiveMachine()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def counters(report: Message) -> dict[str, dict[str, int]]:
    return {program["name"]: program["counters"] for program in report["programs"]}


def errors(report: Message) -> list[str]:
    return [error for program in report["programs"] for error in program["errors"]]


@pytest.fixture
def control(machine: LiveMachine) -> Iterator[Client]:
    """A vCPU on a thread."""
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE)
    trap, their_trap = socket.socketpair()
    traps = threading.Thread(target=machine.serve_traps, args=(trap,))
    vcpu = Vcpu(GuestMemory(machine.ram), Client(their_trap))
    loop = threading.Thread(target=serve_vcpu, args=(vcpu, theirs))
    traps.start()
    loop.start()
    client = Client(ours)
    yield client
    client.close()
    loop.join()
    their_trap.close()
    traps.join()
    theirs.close()
    trap.close()


def attach(machine: FakeMachine, client: Client, *, fresh: bool = True) -> None:
    boot, fds = machine.boot(fresh=fresh)
    client.call("descriptors", fds=fds)
    client.call("attach", boot=boot)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("dance", {}),
        ("attach", {}),
        ("attach", {"boot": {"programs": [], "devices": []}}),
        ("run", {}),
        ("state_out", {}),
        ("state_in", {}),
        ("dirty_log", {}),
        ("throttle", {"percent": 100}),
        ("throttle", {"percent": None}),
    ],
)
def test_what_cannot_be_is_refused_and_the_vcpu_lives_on(control: Client, method: str, params: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refusal:
        control.call(method, **params)
    assert refusal.value.reason in {"EINVAL", "ENOSYS"}
    assert control.call("report").header == {"programs": [], "gap_us": None, "gap_run": 0}


def test_descriptors_of_a_refused_attach_are_closed(control: Client) -> None:
    reader, writer = os.pipe()
    control.call("descriptors", fds=[writer])
    with pytest.raises(RequestError):
        control.call("attach", boot={})
    os.close(writer)
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_it_runs_and_answers_between_steps(machine: LiveMachine, control: Client) -> None:
    attach(machine, control)
    control.call("run")
    control.call("dirty_log_start")
    wait_for(lambda: min(each["steps"] for each in counters(control.call("report")).values()) > 50)
    wait_for(lambda: counters(control.call("report"))["nic0"]["finished"] > 500)
    wait_for(lambda: counters(control.call("report"))["nvme0"]["finished"] > 50)
    assert PackedBitmap.from_bytes(control.call("dirty_log").payload, machine.ram.layout.pages).count()
    control.call("dirty_log_stop")
    control.call("throttle", percent=50)
    report = control.call("pause")
    assert errors(report) == []
    assert counters(control.call("report")) == counters(report)


def test_interrupts_stay_where_they_are_while_the_vcpu_is_paused(machine: LiveMachine, control: Client) -> None:
    attach(machine, control)
    control.call("run")
    wait_for(lambda: counters(control.call("report"))["nvme0"]["finished"] > 0)
    machine.devices_run.clear()
    with machine.lock:
        pass
    control.call("pause")
    interrupt = machine.devices["nvme0"].interrupt
    os.eventfd_write(interrupt, 1)
    control.call("report")
    assert select.select([interrupt], [], [], 0)[0]
    control.call("run")
    wait_for(lambda: not select.select([interrupt], [], [], 0)[0])


def start_process(machine: LiveMachine) -> tuple[subprocess.Popen[bytes], Client, socket.socket]:
    ours, theirs = socket.socketpair()
    trap, their_trap = socket.socketpair()
    ours.settimeout(DEADLINE)
    fds = (machine.ram.fd, theirs.fileno(), their_trap.fileno())
    command = [sys.executable, "-m", "common.guest"]
    command += ["--ram", str(fds[0]), "--control", str(fds[1]), "--trap", str(fds[2])]
    with theirs, their_trap:
        process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE)
    threading.Thread(target=machine.serve_traps, args=(trap,), daemon=True).start()
    return process, Client(ours), trap


def end_process(process: subprocess.Popen[bytes], client: Client, trap: socket.socket) -> None:
    client.close()
    _, said = process.communicate(timeout=DEADLINE)
    trap.close()
    assert process.returncode == 0
    assert said == b""


def test_the_process_runs_a_guest_and_another_process_goes_on_with_it(machine: LiveMachine) -> None:
    process, client, trap = start_process(machine)
    attach(machine, client)
    client.call("run")
    wait_for(lambda: counters(client.call("report"))["nic0"]["finished"] > 500)
    wait_for(lambda: counters(client.call("report"))["nvme0"]["finished"] > 50)
    report = client.call("pause")
    assert errors(report) == []
    state = client.call("state_out")["vcpu"]
    end_process(process, client, trap)

    process, client, trap = start_process(machine)
    attach(machine, client, fresh=False)
    client.call("state_in", vcpu=state)
    client.call("run")
    before = counters(report)
    for name in ("nic0", "nvme0", "acc0", "clock0"):
        wait_for(lambda name=name: counters(client.call("report"))[name]["steps"] > before[name]["steps"] + 20)  # type: ignore[misc]  # a default binds it
    wait_for(lambda: counters(client.call("report"))["nic0"]["finished"] > before["nic0"]["finished"] + 200)
    after = client.call("pause")
    assert errors(after) == []
    assert after["gap_run"] == 2 and after["gap_us"] > 0
    end_process(process, client, trap)


def test_a_process_without_ram_says_so(tmp_path: Any) -> None:
    with (tmp_path / "ram").open("wb") as file, socket.socket() as sock:
        fds = (file.fileno(), sock.fileno())
        command = [sys.executable, "-m", "common.guest"]
        command += ["--ram", str(fds[0]), "--control", str(fds[1]), "--trap", str(fds[1])]
        done = subprocess.run(command, pass_fds=fds, stderr=subprocess.PIPE, timeout=DEADLINE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"common.guest: RAM is not") and b"Traceback" not in done.stderr
