"""What a machine does at its destination, around devices and vCPUs that only take notes."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.machine.device import Pending
from common.machine.machine import Machine
from common.machine.moving import Arriving
from common.vfio.migration import DeviceState

PENDING = Pending((1,), (0,))


class FakeMachine:
    """A machine of one device with two vectors and one doorbell."""

    def __init__(self) -> None:
        self.state = "incoming"
        self.failure = ""
        self.notes: list[Any] = []
        self.pending: dict[str, Pending] = {}
        self.devices = {
            "nic0": SimpleNamespace(
                interrupts=[0, 1],
                doorbells=[0],
                config_size=6,
                enter=lambda state: self.notes.append(state),
                restore_config=lambda config: self.notes.append(config),
            )
        }
        self.vcpus = SimpleNamespace(state_in=lambda vcpu: self.notes.append(vcpu))

    def resume(self) -> None:
        self.notes.append("resume")
        self.state = "running"


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def arriving(machine: FakeMachine) -> Arriving:
    return Arriving(cast("Machine", machine))


def load(arriving: Arriving, *, paused: bool = False, pending: Pending = PENDING) -> None:
    arriving.load({"runs": 2}, {"nic0": b"config"}, {"nic0": pending}, paused=paused)


def test_what_is_loaded_is_validated_first(arriving: Arriving, machine: FakeMachine) -> None:
    load(arriving)
    assert machine.notes == [DeviceState.STOP, b"config", {"runs": 2}]
    assert machine.pending == {"nic0": PENDING} and machine.state == "incoming"


@pytest.mark.parametrize(
    ("pending", "said"),
    [(Pending((0, 2)), "nic0: has no interrupt vector 2"), (Pending((), (1,)), "nic0: has no doorbell 1")],
)
def test_what_no_device_has_cannot_be_pending(
    arriving: Arriving, machine: FakeMachine, pending: Pending, said: str
) -> None:
    with pytest.raises(OSError, match=said):
        load(arriving, pending=pending)
    assert machine.notes == [] and machine.pending == {}


@pytest.mark.parametrize("config", [b"", b"short", b"much too long"])
def test_a_config_space_is_as_long_as_the_devices_own(arriving: Arriving, machine: FakeMachine, config: bytes) -> None:
    with pytest.raises(OSError, match=f"nic0: {len(config)} bytes for 6 of config space"):
        arriving.load({"runs": 2}, {"nic0": config}, {"nic0": PENDING}, paused=False)
    assert machine.notes == [] and machine.pending == {}


def test_a_machine_is_taken_over_once(arriving: Arriving, machine: FakeMachine) -> None:
    load(arriving)
    machine.notes.clear()
    arriving.take_over()
    arriving.take_over()
    assert machine.notes == ["resume"] and machine.state == "running"


def test_a_machine_that_came_paused_waits_for_its_operator(arriving: Arriving, machine: FakeMachine) -> None:
    load(arriving, paused=True)
    machine.notes.clear()
    arriving.take_over()
    assert machine.notes == [] and machine.state == "paused"


def test_a_machine_that_has_failed_is_not_taken_over(arriving: Arriving, machine: FakeMachine) -> None:
    """Else who asks again after a failure would be told that all is well."""
    load(arriving)
    machine.notes.clear()
    machine.state, machine.failure = "failed", "nic0 could not be reset"
    for _ in range(2):
        with pytest.raises(OSError, match="the machine has failed: nic0 could not be reset") as refused:
            arriving.take_over()
        assert refused.value.errno == errno.EINVAL
    assert machine.notes == [] and machine.state == "failed"
