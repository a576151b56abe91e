"""Their devices in our machines: libvfio-user's sample server, moved by our daemons.

SWITCHOVER_LIBVFIO_USER names the directory of its built samples.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rig import Rig, assert_completed, machine_toml, wait_for
from test_journey_foreign import device_file

pytestmark = pytest.mark.interop

# Their timer counts whole seconds, and a time that has passed when the device runs again is an error to it.
DELAY_S = 8
CYCLE_S = DELAY_S + 5


@pytest.fixture
def server() -> Path:
    """Their server."""
    directory = os.environ.get("SWITCHOVER_LIBVFIO_USER")
    if not directory:
        pytest.skip("set SWITCHOVER_LIBVFIO_USER to the directory of libvfio-user's built samples")
    path = Path(directory) / "server"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def test_their_sample_moves_and_comes_back(rig: Rig, server: Path) -> None:
    starts = f"command = '{server} {{socket}}'"
    guest = f'[[guest]]\nprogram = "clock"\n[[guest]]\nprogram = "driver"\ndevice = "far0"\ndelay_s = {DELAY_S}\n'
    device = f'[[device]]\nname = "far0"\nkind = "sample"\n{starts}\ncompare_bars = [1]\n'
    here = rig.start("host", machine_toml(guest=guest) + device)
    there = rig.start("host", options=("--device-file", str(device_file(rig, starts))))

    def cycles() -> int:
        return next(counters["cycles"] for counters in hosts[0].counters().values() if "cycles" in counters)

    hosts = [here, there]
    for _ in range(2):
        # An interrupt and DMA, direct and by message, have come since the last move.
        seen = cycles()
        wait_for(lambda seen=seen: cycles() > seen, "its timer does not fire", seconds=2 * CYCLE_S)
        result = hosts[0].migrate(hosts[1].address)
        assert_completed(result)
        (moved,) = result.devices
        assert moved.verified == "compared"
        assert moved.stop_copy_bytes == 0x3000 + 8
        assert result.dirty_tracking[0].method == "device"
        hosts.reverse()
    seen = cycles()
    wait_for(lambda: cycles() > seen, "its timer does not fire", seconds=2 * CYCLE_S)
