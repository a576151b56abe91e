"""What a machine does at its source, around devices that only take notes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from common.machine.device import Pending
from common.machine.machine import Machine
from common.machine.moving import Leaving

CONFIG = bytes(64)


class FakeDevice:
    """A device that was signalled, until somebody looks."""

    def __init__(self, pending: Pending) -> None:
        self.pending = pending

    def config_space(self) -> bytes:
        return CONFIG

    def drain(self) -> Pending:
        pending, self.pending = self.pending, Pending()
        return pending


class BrokenDevice(FakeDevice):
    """A device that cannot be looked at."""

    def drain(self) -> Pending:
        raise OSError("no eventfd")


def leaving(devices: dict[str, FakeDevice], pending: dict[str, Pending]) -> tuple[Leaving, SimpleNamespace]:
    vcpus = SimpleNamespace(state_out=lambda: {"runs": 1})
    machine = SimpleNamespace(
        containers={},
        devices=devices,
        vcpus=vcpus,
        pending=pending,
        quiesce=lambda: None,
        enter_all=lambda _state, **_recover: None,
    )
    return Leaving(cast("Machine", machine)), machine


def test_what_was_pending_already_goes_too() -> None:
    its, machine = leaving({"nic0": FakeDevice(Pending((1,)))}, {"nic0": Pending((0,), (2,))})
    assert its.stop_devices() == ({"runs": 1}, {"nic0": CONFIG}, {"nic0": Pending((0, 1), (2,))})
    assert machine.pending == {"nic0": Pending((0, 1), (2,))}


def test_config_spaces_are_read_when_nobody_writes_there_and_before_libvfio_user_answers_no_more() -> None:
    did: list[str] = []
    device = SimpleNamespace(
        config_space=lambda: did.append("config") or CONFIG, drain=lambda: did.append("drain") or Pending()
    )
    its, machine = leaving({"nic0": cast("FakeDevice", device)}, {})
    machine.quiesce = lambda: did.append("quiesce")
    machine.enter_all = lambda state, recover: did.append(f"{state.name}, {recover.name}")
    _, configs, _ = its.stop_devices()
    assert did == ["quiesce", "config", "STOP_COPY, STOP", "drain"]
    assert configs == {"nic0": CONFIG}


def test_what_was_drained_is_kept_whatever_happens_to_the_next_device() -> None:
    its, machine = leaving({"nic0": FakeDevice(Pending((1,))), "nic1": BrokenDevice(Pending())}, {})
    with pytest.raises(OSError, match="no eventfd"):
        its.stop_devices()
    assert machine.pending == {"nic0": Pending((1,))}
