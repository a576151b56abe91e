"""Every check passes with our devices, and fails with a server that is wrong in what it is about, and only there."""

from __future__ import annotations

import re
import time

import pytest
from defects import DEFECTS, FURTHER, MOST_VECTORS, UNJUDGED, region_with_file
from wrong_server import Defect, NoTarget, ThreadTarget

from common.conformance.check import Check, Outcome, Result
from common.conformance.lab import run
from common.conformance.probe import Limits
from common.conformance.suite import CHECKS, SUBJECTS
from common.conformance.target import Target, UnreachableError

BY_NAME = {check.full_name: check for check in CHECKS}
RIGHT = Defect("")
SMALL = {"nic": {}, "accelerator": {"memory": 1 << 20}, "nvme": {"blocks": 1024}}
ABSENT = {"description.region-files"}  # our devices have no region that can be mapped


def result_of(check: Check, target: Target, answer: float = 10.0) -> Result:
    (result,) = run([check], target, Limits(answer=answer))
    return result


def test_every_check_has_a_wrong_server() -> None:
    assert set(DEFECTS) == set(BY_NAME)


def test_every_check_has_a_sentence_and_a_subject() -> None:
    assert all(re.fullmatch(r"[A-Z].*\.", check.sentence, re.DOTALL) for check in CHECKS)
    assert [*dict.fromkeys(check.subject for check in CHECKS)] == list(SUBJECTS)
    assert len(BY_NAME) == len(CHECKS)


@pytest.mark.parametrize(
    ("name", "defect"), [*DEFECTS.items(), *FURTHER], ids=lambda item: getattr(item, "detail", item)
)
def test_a_wrong_server_fails_its_check(name: str, defect: Defect) -> None:
    result = result_of(BY_NAME[name], ThreadTarget("nic", defect), defect.patience)
    assert result.outcome is Outcome.FAIL, result.detail
    assert defect.detail in result.detail


@pytest.mark.parametrize("kind", SMALL)
def test_our_devices_pass_every_check(kind: str) -> None:
    results = list(run(CHECKS, ThreadTarget(kind, Defect("", knobs=SMALL[kind])), Limits()))
    assert not [(result.check.full_name, result.detail) for result in results if result.outcome is Outcome.FAIL]
    unknown = {result.check.full_name for result in results if result.outcome is Outcome.UNKNOWN}
    without = {check.full_name for check in CHECKS if "pre-copy" in check.full_name} if kind == "nvme" else set()
    assert unknown == ABSENT | without


def test_a_device_that_cannot_be_migrated_fails_nothing() -> None:
    target = ThreadTarget("nic", Defect("", knobs={"migration_flags": 0}))
    results = {result.check.full_name: result for result in run(CHECKS, target, Limits())}
    assert not [name for name, result in results.items() if result.outcome is Outcome.FAIL]
    assert results["dma.overlap"].outcome is Outcome.PASS
    assert "cannot be migrated" in results["migration-data.move"].detail


def test_files_of_regions_are_compared() -> None:
    check = BY_NAME["description.region-files"]
    same = result_of(check, ThreadTarget("nic", Defect("", install=region_with_file(0x1000))))
    assert (same.outcome, "not sealed" in same.detail) == (Outcome.PASS, True)
    other = result_of(check, ThreadTarget("nic", Defect("", install=region_with_file(0x1000, b"other"))))
    assert (other.outcome, "differs from its file" in other.detail) == (Outcome.FAIL, True)


def test_a_report_tells_the_last_messages() -> None:
    result = result_of(BY_NAME["messages.unknown-command"], ThreadTarget("nic", DEFECTS["messages.unknown-command"]))
    assert result.sent.startswith("command 99 id ")
    assert result.received.startswith("command 99 id ")


@pytest.mark.parametrize(("name", "defect"), UNJUDGED)
def test_what_an_odd_answer_leaves_open_is_unknown(name: str, defect: Defect) -> None:
    result = result_of(BY_NAME[name], ThreadTarget("nic", defect))
    assert result.outcome is Outcome.UNKNOWN
    assert defect.detail in result.detail


def test_there_may_be_as_many_vectors_as_a_number_can_tell() -> None:
    result = result_of(BY_NAME["interrupts.invalid"], ThreadTarget("nic", MOST_VECTORS))
    assert result.outcome is Outcome.PASS, result.detail


def test_a_check_with_a_defect_costs_itself() -> None:
    def wrong(_lab: object) -> None:
        min(set[int]())

    checks = [Check("test", "wrong", "None.", wrong), BY_NAME["negotiation.version"]]
    defective, after = run(checks, ThreadTarget("nic", RIGHT), Limits())
    assert (defective.outcome, after.outcome) == (Outcome.UNKNOWN, Outcome.PASS)
    assert "ValueError at test_conformance_checks.py:" in defective.detail


def test_a_check_has_an_end() -> None:
    def endless(lab: object) -> None:
        device = lab.device()  # type: ignore[attr-defined]
        while True:
            device.get_state()

    check = Check("test", "endless", "None.", endless)
    started = time.monotonic()
    (result,) = run([check], ThreadTarget("nic", RIGHT), Limits(answer=5, check=0.5))
    assert result.outcome is Outcome.FAIL
    assert time.monotonic() - started < 5


def test_without_a_server_there_is_nothing_to_tell() -> None:
    with pytest.raises(UnreachableError):
        list(run(CHECKS, NoTarget(), Limits()))
