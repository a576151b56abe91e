"""What must be equal of the devices at both ends before anything moves."""

from __future__ import annotations

import pytest
from switchover.v1 import migration_pb2

from common.machine.client import DeviceInfo
from source.counterparts import DeviceDiffersError, check_counterparts
from source.failures import explain

SIZES = [4096, 0, 1 << 20, 0, 0, 0]
OURS = [DeviceInfo("nic0", "nic", 7, "RUNNING", comparable_dump=True, bar_sizes=SIZES)]


def there(name: str, sizes: list[int]) -> list[migration_pb2.PreparedDevice]:
    return [migration_pb2.PreparedDevice(name=name, bar_sizes=sizes)]


def test_devices_with_bars_of_the_same_sizes() -> None:
    check_counterparts(OURS, there("nic0", SIZES))


@pytest.mark.parametrize("sizes", [[], [4096, 0, 1 << 21, 0, 0, 0], [4096, 1 << 20, 0, 0, 0, 0], [*SIZES, 4096]])
def test_bars_of_other_sizes(sizes: list[int]) -> None:
    with pytest.raises(DeviceDiffersError, match=r"nic0: its BARs have .* at the destination, and 4096, 0, ") as error:
        check_counterparts(OURS, there("nic0", sizes))
    assert explain(error.value, "b:1")[0] == "DEVICE_DIFFERS"


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceDiffersError, match="nic0: the destination has no such device"):
        check_counterparts(OURS, there("nic1", SIZES))
