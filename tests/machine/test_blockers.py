from __future__ import annotations

import pytest

from common.machine.blockers import blockers
from common.machine.device_config import DeviceSpec
from common.vfio.migration import MigrationFlags

NONE = MigrationFlags(0)
STOP_COPY = MigrationFlags.STOP_COPY
P2P = STOP_COPY | MigrationFlags.P2P
LOGGED = {"default": ("device", "every device logs")}
PERPETUAL = {"default": ("perpetual", "nvme0 logs no DMA")}


def spec(name: str, migration: str = "auto", container: str = "default") -> DeviceSpec:
    return DeviceSpec(name, "nic", container, migration)


def test_nothing_is_in_the_way() -> None:
    assert blockers([], {}, "") == []
    assert blockers([(spec("nic0"), STOP_COPY)], LOGGED, "") == []
    assert blockers([(spec("nic0"), P2P), (spec("nic1"), P2P)], LOGGED, "") == []


@pytest.mark.parametrize(
    ("migration", "flags", "methods", "sentence"),
    [
        ("off", NONE, LOGGED, "nic0: Migration is disabled for VFIO device"),
        ("off", STOP_COPY, PERPETUAL, "nic0: Migration is disabled for VFIO device"),
        ("auto", NONE, LOGGED, "nic0: VFIO migration is not supported by the device"),
        ("on", MigrationFlags.PRE_COPY, PERPETUAL, "nic0: VFIO migration is not supported by the device"),
        (
            "auto",
            STOP_COPY,
            PERPETUAL,
            (
                "nic0: VFIO device doesn't support device and IOMMU dirty tracking (nvme0 logs no DMA); "
                'migration = "on" accepts that'
            ),
        ),
        ("on", STOP_COPY, PERPETUAL, None),
        ("auto", STOP_COPY, {"default": ("iommu", "its IOMMU tracks")}, None),
    ],
)
def test_each_sentence(
    migration: str, flags: MigrationFlags, methods: dict[str, tuple[str, str]], sentence: str | None
) -> None:
    assert blockers([(spec("nic0", migration), flags)], methods, "") == ([] if sentence is None else [sentence])


def test_several_devices_must_all_be_able_to_quiesce() -> None:
    """One device alone has no peer."""
    several = [(spec("nic0"), P2P), (spec("nvme0"), STOP_COPY), (spec("nvme1"), STOP_COPY)]
    assert blockers(several, LOGGED, "") == [
        "Multiple VFIO devices migration is supported only if all of them support P2P migration: nvme0, nvme1 cannot"
    ]
    assert blockers(several[1:2], LOGGED, "") == []


def test_every_blocker_is_told_and_a_failure_first() -> None:
    found = blockers(
        [(spec("a", "off"), P2P), (spec("b", container="other"), P2P)],
        LOGGED | {"other": ("perpetual", "why")},
        "the process of a has ended",
    )
    assert [line.partition(":")[0] for line in found] == ["the machine has failed", "a", "b"]
    assert found[0] == "the machine has failed: the process of a has ended"


def test_each_container_has_its_own_method() -> None:
    methods = LOGGED | {"other": ("perpetual", "why")}
    assert len(blockers([(spec("a"), P2P), (spec("b", container="other"), P2P)], methods, "")) == 1
