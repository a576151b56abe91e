"""The machine's end of the vCPU process."""

from __future__ import annotations

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
    vcpus.attach({"programs": [], "devices": [], "fresh": True}, [])
    vcpus.run()
    assert vcpus.report()["programs"] == []
