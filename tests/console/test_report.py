from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_host import result
from switchover.v1 import host_pb2 as pb

from console.report import report

README = Path(__file__).parents[2] / "README.md"


def test_everything_is_in_the_report() -> None:
    told = json.loads(json.dumps(report(result())))
    assert (told["result"], told["verified"], told["verify"]) == ("completed", True, "strict")
    assert (told["error"], told["reason"]) == (None, None)
    assert (told["total_ms"], told["downtime_ms"]) == (1234.5, 90.0)
    assert told["downtime"] == {
        "pause": 1,
        "quiesce": 2,
        "last_sync": 3,
        "last_ram": 4,
        "devices": 5,
        "verification": 60,
        "handover": 7,
        "start": 8,
    }
    assert (told["guest_gap_ms"], told["guest_gap_error_ms"]) == (91.25, 0.5)
    assert [entry["dirty_pages"] for entry in told["rounds"]] == [100, 10]
    assert told["ram"]["transferred_bytes"] == 33_964_032
    assert told["devices"][1]["stop_copy_bytes"] == 2048
    assert told["dirty_tracking"]["method"] == "device"
    assert told["dirty_tracking"]["reason"] == "every device logs its DMA"
    assert told["dirty_tracking"]["containers"][0]["dirty_pages"] == 42
    assert (told["mappings"], told["mismatched_pages"], told["mismatches"]) == (7, 0, [])


@pytest.mark.parametrize(
    ("verified", "told"),
    [("true", True), ("transport", "transport"), ("false", False), ("", False), ("perhaps", False)],
)
def test_only_true_means_verified(verified: str, told: bool | str) -> None:
    assert report(pb.MigrationResult(verified=verified))["verified"] == told


def test_what_nobody_measured_is_null() -> None:
    told = report(result(guest_gap_ms=-1))
    assert told["guest_gap_ms"] is None
    assert told["guest_gap_error_ms"] is None


def test_address_spaces_that_are_tracked_differently() -> None:
    other = pb.TrackingResult(container="second", method="perpetual", reason="nvme0 cannot log")
    tracking = report(result(dirty_tracking=[other]))["dirty_tracking"]
    assert (tracking["method"], tracking["reason"]) == ("mixed", "see containers")
    assert len(tracking["containers"]) == 2
    assert report(pb.MigrationResult())["dirty_tracking"] == {"method": None, "reason": None, "containers": []}


def test_mismatches_keep_their_history_and_large_numbers() -> None:
    page = pb.PageMismatch(page=1 << 60, gpa=1 << 63, sent_in_rounds=[0, 2], could_have_written=["nic0"])
    told = report(result(mismatches=[page], mismatched_pages=1))["mismatches"][0]
    assert (told["page"], told["gpa"], told["sent_in_rounds"]) == (1 << 60, 1 << 63, [0, 2])
    assert told["could_have_written"] == ["nic0"]


def test_the_reference_in_the_readme_is_complete() -> None:
    reference = README.read_text().split("### The report", 1)[1].split("\n### ", 1)[0]
    documented = set(re.findall(r"`([a-z_]+)`", reference))
    told = report(result(mismatches=[pb.PageMismatch(page=1)]))
    keys = set(told) | set(told["downtime"]) | set(told["ram"]) | set(told["dirty_tracking"])
    for name in ("rounds", "devices", "mismatches"):
        keys |= set(told[name][0])
    keys |= set(told["dirty_tracking"]["containers"][0])
    assert keys - documented == set()
