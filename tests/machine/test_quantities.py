from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.machine.quantities import (
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)

FACTORS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGT", 1)
}


@given(st.integers(0, 10**12), st.sampled_from(sorted(FACTORS)), st.sampled_from(["", " "]))
def test_whole_sizes_are_exact(count: int, unit: str, space: str) -> None:
    assert parse_size(f"{count}{space}{unit}") == count * FACTORS[unit]
    assert parse_rate(f"{count}{space}{unit}/s") == count * FACTORS[unit]


@pytest.mark.parametrize(
    ("text", "rate"), [("1Gbit/s", 125_000_000), ("50MB/s", 50_000_000), ("1.5Mbit/s", 187_500), ("8bit/s", 1)]
)
def test_rates_in_bits(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "seconds"), [("300ms", 0.3), ("2s", 2.0), ("1m", 60.0), ("1.5 h", 5400.0), ("250us", 0.00025)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_fractions_are_rounded_to_bytes() -> None:
    assert parse_size("0.5KiB") == 512
    assert parse_size("1.2600 KiB") == 1290


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1G", "did you mean GB or GiB?"),
        ("1gib", "did you mean GiB?"),
        ("64", 'has no unit; write a size like "1GiB" or "512MiB"'),
        ("lots", "is not a size"),
        ("-1GiB", "is not a size"),
        ("1e3GiB", "is not a size"),
        ("1 potato", 'unknown unit "potato"'),
        ("\u0661GiB", "is not a size"),  # a digit, but not one of ours
        ("", "is not a size"),
    ],
)
def test_wrong_sizes_are_told_what_was_meant(text: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize("text", ["1Gb/s", "1Gbps", "1G"])
def test_bits_or_bytes_is_asked_not_guessed(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_rate(text)
    assert "GB/s" in str(caught.value) and "Gbit/s" in str(caught.value)


@given(st.integers(0, 1 << 50))
def test_what_is_printed_can_be_read_again(value: int) -> None:
    assert parse_size(format_size(value)) == pytest.approx(value, rel=0.006, abs=1)
    assert parse_rate(format_rate(value)) == pytest.approx(value, rel=0.006, abs=1)


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.123, "0.12 ms"), (43.12, "43.1 ms"), (2500, "2.50 s"), (185_000, "3 min 5 s")]
)
def test_durations_for_people(milliseconds: float, text: str) -> None:
    assert format_duration(milliseconds) == text
