from __future__ import annotations

from typing import Any

import pytest

from common.devices.__main__ import KINDS, build
from common.devices.accelerator import AcceleratorKnobs
from common.devices.knobs import OneTimeFaults, parse
from common.devices.nic import NicKnobs
from common.vfio.migration import DeviceState, MigrationFlags


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_defaults(kind: str) -> None:
    assert build(kind, "it", {}).name == "it"


def test_reads_every_sort_of_knob() -> None:
    knobs = parse(
        NicKnobs,
        {
            "rate": 5,
            "packet": 64,
            "migration_flags": 1,
            "dma_logging": False,
            "log_max_bits": 42,
            "log_max_ranges": 4,
            "log_page_sizes": [4096, 2 << 20],
            "faults": ["unlogged", "fail:STOP_COPY", "fail_logging_start", "fail_logging_report"],
        },
    )
    assert (knobs.rate, knobs.packet, knobs.flags) == (5, 64, MigrationFlags.STOP_COPY)
    assert (knobs.log_limits.max_ranges, knobs.log_limits.max_bits) == (4, 42)
    assert knobs.log_limits.page_sizes == (4096, 2 << 20)
    faults = OneTimeFaults("nic0", knobs.faults)
    faults.reach_state(DeviceState.STOP)
    with pytest.raises(OSError, match="fail:STOP_COPY"):
        faults.reach_state(DeviceState.STOP_COPY)
    faults.reach_state(DeviceState.STOP_COPY)  # once


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("nic", {"speed": 1}),
        ("nic", {"memory": 1 << 20}),
        ("nic", {"rate": "fast"}),
        ("nic", {"rate": 0}),
        ("nic", {"rate": float("inf")}),
        ("nic", {"rate": float("nan")}),
        ("nic", {"packet": 1500.0}),
        ("nic", {"packet": 32}),
        ("nic", {"packet": True}),
        ("nic", {"dma_logging": 1}),
        ("nic", {"migration_flags": 2}),
        ("nic", {"migration_flags": 9}),
        ("nic", {"log_page_sizes": [512]}),
        ("nic", {"log_page_sizes": []}),
        ("nic", {"log_page_sizes": 4096}),
        ("nic", {"log_max_ranges": 0}),
        ("nic", {"log_max_ranges": -1}),
        ("nic", {"load_delay_ms": 1 << 40}),
        ("nic", {"faults": ["smoke"]}),
        ("nic", {"faults": ["fail:ERROR"]}),
        ("nic", {"faults": "unlogged"}),
        ("nvme", {"blocks": 0}),
        ("nvme", {"latency_us": 1 << 30}),
        ("accelerator", {"memory": 3 << 20}),
        ("accelerator", {"memory": 4096}),
        ("accelerator", {"memory": 1 << 40}),
        ("accelerator", {"churn": -1}),
        ("accelerator", {"churn": 1e12}),
        ("toaster", {}),
    ],
)
def test_a_wrong_knob_is_named_in_a_sentence(kind: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as wrong:
        build(kind, "it", knobs)
    name = next(iter(knobs), kind)
    text = str(wrong.value)
    assert name in text or (name == "faults" and "no such fault" in text)


def test_knobs_of_a_kind_are_its_own() -> None:
    assert parse(AcceleratorKnobs, {"memory": 1 << 20}).memory == 1 << 20
