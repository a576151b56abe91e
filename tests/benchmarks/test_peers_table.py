from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.samples import Sample, read, spread, table, time_ratio, write

SLOW = Sample(1 << 30, 2.0, 1_000_000_000, 0.5, 1.5, whole_s=3.0, downtime_s=0.25)
FAST = replace(SLOW, transfer_s=1.0, equal_bytes=1 << 29)


def test_median_with_what_it_is_the_median_of() -> None:
    assert spread([1.0, 30.0, 2.0], 1) == "2.0 (1.0–30.0)"
    assert spread([None], 1) == "–"


def test_ratio_of_medians() -> None:
    outlier = replace(FAST, transfer_s=100.0)
    assert time_ratio([FAST, outlier, FAST], [SLOW]) == 0.5
    assert time_ratio([FAST], None) is None
    assert time_ratio([], [SLOW]) is None


@pytest.mark.parametrize(("speed", "expected"), [(True, "2.00"), (False, "0.50")])
def test_table_compares_and_says_who_is_missing(speed: bool, expected: str) -> None:
    found = {"slow": [SLOW], "fast": [FAST], "other": []}
    made = table("Three", found, {"other": "not here: other"}, {"slow": "× slow"}, speed=speed)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(made)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in captured.get().splitlines() if "|" in line]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["slow"][1] == "1.00"
    assert by_name["slow"][6] == "–"
    assert by_name["fast"] == [
        *(
            "1.07 (1.07–1.07)",
            expected,
            "1.00 (1.00–1.00)",
            "3.00 (3.00–3.00)",
            "250 (250–250)",
            "1000",
            "50.0",
            "0.50",
            "1.50",
        )
    ]
    assert by_name["other"][0] == "not here: other"


def test_samples_of_earlier_runs_count(tmp_path: Path) -> None:
    kept = tmp_path / "samples"
    assert read(kept, "loopback") == {}
    write(kept, "loopback", "a", SLOW)
    write(kept, "elsewhere", "a", FAST)
    write(kept, "loopback", "a", FAST)
    assert read(kept, "loopback") == {"a": [SLOW, FAST]}
