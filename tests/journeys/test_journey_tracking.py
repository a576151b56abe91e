"""Dirty tracking with real devices: every strategy and method, devices with limits, and logs that fail."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from rig import GUEST, Daemon, Rig, assert_completed, machine_toml, switchover_json, wait_for
from switchover.v1 import host_pb2
from test_journey_localhost import goes_on

from common.datasheets import nic
from common.guest.programs.driver_nic import peer_window
from common.rpc.errors import peer_error

pytestmark = pytest.mark.matrix

ALL = ("nic", "nvme", "accelerator")
NO_LOG = 'device_dirty_tracking = "off"'
NOTHING_SEES_IT = f'{NO_LOG}\niommu_dirty_tracking = "off"'
SMALL = 'memory = "1MiB"'
PROGRAM = '[[guest]]\nprogram = "{}"\ndevice = "{}"\n'


def driver(device: str, knobs: str = "") -> str:
    return PROGRAM.format("driver", device) + f"{knobs}\n"


def mapper(device: str, mappings: int) -> str:
    return PROGRAM.format("mapper", device) + f"mappings = {mappings}\nchanges = 1000\n"


def methods(result: host_pb2.MigrationResult) -> dict[str, str]:
    return {tracking.container: tracking.method for tracking in result.dirty_tracking}


def there_and_back(rig: Rig, machine: str, *, mappings: int = 0) -> list[host_pb2.MigrationResult]:
    """Move a machine to another host and back; fail unless all is equal and the guest content, each time."""
    a = rig.start("host", machine)
    b = rig.start("host")
    counters = goes_on(a)
    wait_for(lambda: mapped(a) >= mappings, "the guest has not mapped what it was to map")
    results = []
    for source, destination in ((a, b), (b, a)):
        result = source.migrate(destination.address)
        assert_completed(result)
        counters = goes_on(destination, counters)
        assert mapped(destination) >= mappings
        results.append(result)
    return results


def mapped(daemon: Daemon) -> int:
    return sum(container.mappings for container in daemon.look().machine.containers)


TORTURE = (
    GUEST
    + driver("nic0", 'remap = 4\npeer = "accelerator0"')
    + driver("nvme0", "remap = 2")
    + driver("accelerator0", "remap = 2")
    + mapper("nic0", 2000)
)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("auto", "an aperture needs no arming again as the guest maps: the aperture up to 2^48"),
        ("aperture", "the aperture was asked for: the aperture up to 2^48"),
        ("minmax", "the spans of low, high and BAR mappings were asked for"),
        ("mapped", "the mapped ranges were asked for"),
    ],
)
def test_every_strategy_takes_the_same_torture(rig: Rig, image: Path, strategy: str, said: str) -> None:
    machine = machine_toml(
        image=image,
        devices=ALL,
        drivers=False,
        guest=TORTURE,
        viommu=f'strategy = "{strategy}"',
        extra={"accelerator": SMALL},
    )
    for result in there_and_back(rig, machine, mappings=2000):
        assert methods(result) == {"default": "device"}
        assert said in result.dirty_tracking[0].reason
        assert result.dirty_tracking[0].dirty_pages > 0
        assert result.mappings >= 2000


def test_containers_with_methods_of_their_own_and_the_same_iovas(rig: Rig, image: Path) -> None:
    # The accelerator's own log tells nothing; if the method were any other, the verifier would find that.
    machine = machine_toml(
        image=image,
        devices=ALL,
        extra={
            "nic": 'container = "one"',
            "nvme": f'container = "two"\nmigration = "on"\n{NOTHING_SEES_IT}',
            "accelerator": f'container = "three"\nfaults = ["unlogged"]\n{NO_LOG}\n{SMALL}',
        },
    )
    for result in there_and_back(rig, machine):
        assert methods(result) == {"one": "device", "two": "perpetual", "three": "iommu"}
        assert all(tracking.dirty_pages for tracking in result.dirty_tracking)


def test_the_iommu_covers_a_container_in_which_one_device_cannot_log(rig: Rig, image: Path) -> None:
    machine = machine_toml(
        image=image, devices=("nic", "nvme"), extra={"nic": f'{NO_LOG}\nfaults = ["unlogged"]'}, mappings=1000
    )
    for result in there_and_back(rig, machine, mappings=1000):
        assert methods(result) == {"default": "iommu"}
        reason = result.dirty_tracking[0].reason
        assert reason.startswith("nic0 cannot log its own DMA, but the IOMMU sees the DMA of every device")


@pytest.mark.parametrize(
    ("strategy", "limit", "said", "refused"),
    [
        ("auto", "log_max_bits = 42", "the aperture up to 2^39", 1),
        ("auto", "log_max_bits = 30", "mappings as", 2),
        ("mapped", "log_max_ranges = 1", "mappings as 1 ranges", 1),
        ("mapped", 'log_page_sizes = ["64KiB"]', "mappings as", 0),
    ],
    ids=["as-mlx5", "30-bits", "one-range", "large-pages"],
)
def test_a_log_with_limits(rig: Rig, image: Path, strategy: str, limit: str, said: str, refused: int) -> None:
    source = rig.start(
        "source",
        machine_toml(
            image=image, devices=("nic",), viommu=f'strategy = "{strategy}"', extra={"nic": limit}, mappings=500
        ),
    )
    destination = rig.start("destination")
    before = goes_on(source)
    wait_for(lambda: mapped(source) >= 500, "they are not mapped")
    result = source.migrate(destination.address)
    assert_completed(result)
    assert methods(result) == {"default": "device"}
    reason = result.dirty_tracking[0].reason
    assert said in reason
    # What was asked for in vain is told, with the device and the call.
    assert reason.count("refused: default: nic0: cannot start DMA logging") >= refused
    assert ("refused" in reason) == bool(refused)
    goes_on(destination, before)


def test_a_nic_writes_into_an_accelerator_while_both_move(rig: Rig, image: Path) -> None:
    machine = machine_toml(
        image=image,
        devices=("nic", "accelerator"),
        drivers=False,
        guest=GUEST + driver("nic0", 'peer = "accelerator0"') + driver("accelerator0"),
        extra={"accelerator": SMALL},
    )
    source, destination = rig.start("source", machine), rig.start("destination")
    looked = wait_for(lambda: blocks_found(source), "the nic's writes are not there")
    assert_completed(source.migrate(destination.address))
    # Every block of the window is looked at after a pause, and must be the last that the nic has counted.
    window = peer_window(1 << 20) // nic.PEER_BLOCK
    wait_for(lambda: blocks_found(destination) > looked + window, "nobody looks at the nic's writes")
    goes_on(destination)


def blocks_found(daemon: Daemon) -> int:
    return next(counters["peer_blocks"] for counters in daemon.counters().values() if "peer_blocks" in counters)


@pytest.mark.parametrize(
    ("devices", "extra", "said"),
    [
        (("nic",), {"nic": 'migration = "off"'}, ["nic0: Migration is disabled for VFIO device"]),
        (
            ("nic",),
            {"nic": NOTHING_SEES_IT},
            ["nic0: VFIO device doesn't support device and IOMMU dirty tracking (nic0 cannot log its own DMA and no "],
        ),
        (
            ("nic", "nvme"),
            {"nvme": "migration_flags = 1"},
            ["Multiple VFIO devices migration is supported only if all of them support P2P migration: nvme0 cannot"],
        ),
    ],
    ids=["off", "perpetual", "no-p2p"],
)
def test_blockers_are_told_before_anybody_migrates(
    rig: Rig, devices: tuple[str, ...], extra: dict[str, str], said: list[str]
) -> None:
    source = rig.start("source", machine_toml(devices=devices, extra=extra))
    before = goes_on(source)
    found = switchover_json("status", source.address)["machine"]["blockers"]
    assert [blocker[: len(start)] for blocker, start in zip(found, said, strict=True)] == said
    with pytest.raises(grpc.RpcError) as refused:
        source.begin("127.0.0.1:1")
    assert peer_error(refused.value).reason == "BLOCKED"
    assert said[0] in str(peer_error(refused.value))
    goes_on(source, before)


def fails_once_then_moves(rig: Rig, image: Path, extra: dict[str, str], said: str) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic", "nvme"), extra=extra))
    destination = rig.start("destination")
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert (result.result, result.reason) == ("failed", "EIO")
    assert said in result.error
    assert result.error.endswith(": Input/output error")
    before = goes_on(source, before)
    assert {device.state for device in source.look().machine.devices} == {"RUNNING"}
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")
    assert_completed(source.migrate(destination.address))
    goes_on(destination, before)


def test_a_log_that_does_not_start_fails_the_migration(rig: Rig, image: Path) -> None:
    said = "default: nvme0: cannot start DMA logging of 1 ranges (DMA_LOGGING_START)"
    fails_once_then_moves(rig, image, {"nvme": 'faults = ["fail_logging_start"]'}, said)


def test_a_log_that_cannot_be_read_fails_the_migration(rig: Rig, image: Path) -> None:
    said = "default: nvme0: cannot get the DMA log of IOVA 0x"
    fails_once_then_moves(rig, image, {"nvme": 'faults = ["fail_logging_report"]'}, said)


def test_a_log_that_is_left_to_the_switchover(rig: Rig, image: Path) -> None:
    late = 'pre_copy_dirty_tracking = "off"\nfaults = ["fail_logging_report"]'
    source = rig.start("source", machine_toml(image=image, devices=("nic", "accelerator"), extra={"nic": late}))
    destination = rig.start("destination")
    before = goes_on(source)
    with rig.held("source.switchover") as arrived:
        session = source.begin(destination.address)
        # The log fails when it is asked, so here nobody has asked it.
        arrived()
    result = source.follow(session)
    assert (result.result, result.reason) == ("failed", "EIO")
    assert "nic0: cannot get the DMA log of IOVA 0x" in result.error
    assert "(DMA_LOGGING_REPORT)" in result.error
    before = goes_on(source, before)
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")
    result = source.migrate(destination.address)
    assert_completed(result)
    assert result.dirty_tracking[0].dirty_pages > 0
    goes_on(destination, before)
