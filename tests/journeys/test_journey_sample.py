"""The sample device of ours in a machine: its timer interrupts by the pin, and goes on elsewhere."""

from __future__ import annotations

import pytest
from rig import Rig, assert_completed, machine_toml, wait_for

pytestmark = pytest.mark.matrix


def test_a_sample_moves_and_comes_back(rig: Rig) -> None:
    guest = '[[guest]]\nprogram = "clock"\n[[guest]]\nprogram = "driver"\ndevice = "sample0"\n'
    hosts = [rig.start("host", machine_toml(guest=guest) + '[[device]]\nkind = "sample"\n'), rig.start("host")]

    def interrupts() -> int:
        return hosts[0].counters()["driver0"]["interrupts"]

    for _ in range(2):
        seen = interrupts()
        wait_for(lambda seen=seen: interrupts() > seen + 1, "its timer does not fire")
        result = hosts[0].migrate(hosts[1].address)
        assert_completed(result)
        (moved,) = result.devices
        assert (moved.verified, moved.precopy_bytes, moved.stop_copy_bytes) == ("compared", 0x3000, 0x3000 + 8)
        hosts.reverse()
    seen = interrupts()
    wait_for(lambda: interrupts() > seen + 1, "its timer does not fire")
    assert hosts[0].counters()["driver0"]["spurious"] == 0
