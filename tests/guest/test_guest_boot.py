from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from common.guest.boot import parse, read_knobs

BOOT: dict[str, Any] = {
    "programs": [{"program": "clock", "name": "clock0", "area_gpa": 0, "area_size": 4096, "period_us": 500}],
    "devices": [
        {
            "name": "nic0",
            "kind": "nic",
            "container": "default",
            "viommu": True,
            "bars": {"0": 0xE000_0000},
            "doorbell_fd": 0,
            "vectors": [1],
        }
    ],
    "fresh": True,
}


def test_a_boot_message_is_read() -> None:
    boot = parse(BOOT, 2)
    assert boot.programs[0].knobs == {"period_us": 500}
    assert boot.devices[0].bars == {0: 0xE000_0000}
    assert boot.devices[0].doorbell == 0 and boot.devices[0].vectors == (1,)


@pytest.mark.parametrize(
    "damage",
    [
        lambda boot: boot.pop("fresh"),
        lambda boot: boot.update(fresh=1),
        lambda boot: boot["programs"].append(boot["programs"][0]),
        lambda boot: boot["programs"][0].pop("area_gpa"),
        lambda boot: boot["programs"][0].update(area_size=True),
        lambda boot: boot["devices"].append(boot["devices"][0]),
        lambda boot: boot["devices"][0].update(vectors=[2]),
        lambda boot: boot["devices"][0].update(doorbell_fd=-1),
        lambda boot: boot["devices"][0].update(bars={"6": 0}),
        lambda boot: boot["devices"][0].update(bars={"0": "0xe0000000"}),
        lambda boot: boot.update(devices={}),
    ],
)
def test_nonsense_is_refused(damage: Callable[[dict[str, Any]], object]) -> None:
    boot = copy.deepcopy(BOOT)
    damage(boot)
    with pytest.raises((TypeError, ValueError)):
        parse(boot, 2)


@dataclass
class Knobs:
    device: str
    peer: str | None = None
    remap: int = 64


def test_knobs_have_defaults_types_and_names() -> None:
    assert read_knobs(Knobs, {"device": "nic0", "remap": 3}) == Knobs("nic0", None, 3)
    for wrong in (
        {},
        {"device": 1},
        {"device": "a", "remap": True},
        {"device": "a", "peer": 1},
        {"device": "a", "x": 1},
    ):
        with pytest.raises(ValueError, match="knob"):
            read_knobs(Knobs, wrong)
