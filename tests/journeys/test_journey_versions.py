"""Daemons of two versions: they speak what both know, or say that they cannot."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from rig import Daemon, Rig, assert_completed, machine_toml
from test_journey_localhost import goes_on

SKEWED = """
import sys
from common.rpc import versions
versions.LOWEST, versions.HIGHEST, versions.FEATURES = {lowest}, {highest}, frozenset({features})
import destination.service
if {old}:
    destination.service.choose = lambda lowest, _: 1 if lowest == 1 else None
    destination.service.shared = lambda _: []
from console.cli import main
main()
"""


def start(rig: Rig, role: str, machine: str | None, lowest: int, highest: int, *features: str) -> Daemon:
    """Start a daemon that speaks these; `highest` 0: as the first ones did, before there were ranges and features."""
    text = SKEWED.format(lowest=lowest, highest=highest or 1, features=list(features), old=not highest)
    return rig.start(role, machine, command=(sys.executable, "-c", text, role), options=("--log-format", "json"))


def agreed(daemon: Daemon) -> tuple[int, list[str]]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    (line,) = [line for line in lines if line["event"] == "agreed"]
    return line["protocol"], line["features"]


@pytest.mark.parametrize(
    ("ours", "theirs", "spoken"),
    [
        ((1, 2, "a", "b"), (1, 0), (1, [])),
        pytest.param((1, 1), (1, 2, "a"), (1, []), marks=pytest.mark.matrix),
        pytest.param((1, 2, "a", "b"), (1, 3, "b", "c"), (2, ["b"]), marks=pytest.mark.matrix),
    ],
)
def test_a_machine_moves_between_versions(
    rig: Rig, ours: tuple[Any, ...], theirs: tuple[Any, ...], spoken: tuple[int, list[str]]
) -> None:
    source = start(rig, "source", machine_toml(), *ours)
    destination = start(rig, "destination", None, *theirs)
    before = goes_on(source)
    assert_completed(source.migrate(destination.address))
    assert agreed(source) == spoken
    goes_on(destination, before)


@pytest.mark.matrix
@pytest.mark.parametrize(("ours", "theirs"), [((2, 2), (1, 1)), ((2, 2), (1, 0)), ((1, 1), (2, 3))])
def test_versions_that_do_not_meet(rig: Rig, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    source = start(rig, "source", machine_toml(), *ours)
    destination = start(rig, "destination", None, *theirs)
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert (result.result, result.reason) == ("failed", "PROTOCOL_VERSION")
    goes_on(source, before)
