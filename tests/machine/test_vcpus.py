"""The machine's end of the vCPU process."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.machine.device_process import REQUEST_SECONDS
from common.machine.vcpus import Vcpus
from common.memory.ram import GuestRam


@pytest.fixture
def vcpus(tmp_path: Path) -> Iterator[Vcpus]:
    with GuestRam.create(64 << 20) as ram:
        made = Vcpus(ram, tmp_path, {})
        yield made
        made.close()


def test_a_command_outlasts_several_requests_of_the_traps_that_it_waits_for(vcpus: Vcpus) -> None:
    timeout = vcpus._control._sock.gettimeout()
    assert timeout is not None and timeout > 4 * REQUEST_SECONDS


def test_eight_devices_with_all_their_interrupts(vcpus: Vcpus) -> None:
    """They are more descriptors than one message can carry."""
    eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8 * 33)]
    devices = [
        {
            "name": f"far{number}",
            "kind": "vfio-user",
            "container": "default",
            "viommu": False,
            "bars": {},
            "doorbell_fd": 33 * number,
            "vectors": list(range(33 * number + 1, 33 * number + 33)),
        }
        for number in range(8)
    ]
    vcpus.attach({"programs": [], "devices": devices, "fresh": True}, eventfds)
    vcpus.run()
    os.eventfd_write(eventfds[-1], 1)
    deadline = time.monotonic() + 20
    while select.select([eventfds[-1]], [], [], 0)[0]:  # until it has seen its last interrupt
        assert time.monotonic() < deadline
        time.sleep(0.001)
    vcpus.pause()
    assert vcpus.state_out()["pending"] == ["far7"]
    for fd in eventfds:
        os.close(fd)
