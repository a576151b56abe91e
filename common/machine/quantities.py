"""Sizes, rates and durations as people write them: "1GiB", "50MB/s", "1Gbit/s", "300ms"; and back.

KiB, MiB, GiB and TiB count in 1024, kB, MB, GB and TB in 1000, as IEC 80000-13 has it. A quantity without a unit, or
with one that could mean two things ("1G", "1Gb"), is refused: a factor of eight in a bandwidth limit is a bad surprise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

__all__ = [
    "format_duration",
    "format_rate",
    "format_size",
    "parse_duration",
    "parse_rate",
    "parse_size",
]

_DECIMAL = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZES: dict[str, Decimal] = {unit: Decimal(factor) for unit, factor in {"B": 1, **_DECIMAL, **_BINARY}.items()}
_BITS: dict[str, Decimal] = {
    unit: Decimal(factor) / 8
    for unit, factor in {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9, "Tbit": 10**12}.items()
}
_RATES: dict[str, Decimal] = {f"{unit}/s": factor for unit, factor in (_SIZES | _BITS).items()}
_DURATIONS: dict[str, Decimal] = {
    "us": Decimal("0.000001"),
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
}
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z/]{0,8})", re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes, rounded, that "512MiB", "1.5GiB" or "4096B" stands for; raise ValueError with a sentence."""
    return int(_parse(text, _SIZES, "a size", "1GiB", "512MiB").to_integral_value())


def parse_rate(text: str) -> int:
    """Return the bytes per second, rounded, that "50MB/s" or "1Gbit/s" stands for; raise ValueError with a sentence."""
    return int(_parse(text, _RATES, "a rate", "50MB/s", "1Gbit/s").to_integral_value())


def parse_duration(text: str) -> float:
    """Return the seconds that "300ms", "2s" or "1m" stands for; raise ValueError with a sentence."""
    return float(_parse(text, _DURATIONS, "a duration", "300ms", "2s"))


def format_size(size: float) -> str:
    """Return a size in bytes as people read it, for example "1.5 GiB"."""
    return _format(size, "B", (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)))


def format_rate(rate: float) -> str:
    """Return a rate in bytes per second as people read it, for example "52.4 MB/s"."""
    return _format(rate, "B/s", (("GB/s", 10**9), ("MB/s", 10**6), ("kB/s", 10**3)))


def format_duration(milliseconds: float) -> str:
    """Return a duration given in milliseconds as people read it, for example "43.1 ms", "2.50 s" or "3 min 5 s"."""
    if milliseconds < 10:
        return f"{milliseconds:.2f} ms"
    if milliseconds < 1000:
        return f"{milliseconds:.1f} ms"
    if milliseconds < 120_000:
        return f"{milliseconds / 1000:.2f} s"
    minutes, seconds = divmod(round(milliseconds / 1000), 60)
    return f"{minutes} min {seconds} s"


def _parse(text: str, units: Mapping[str, Decimal], what: str, *examples: str) -> Decimal:
    such_as = " or ".join(f'"{example}"' for example in examples)
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'"{text}" is not {what}; write it like {such_as}')
    number, unit = match.groups()
    if unit in units:
        return Decimal(number) * units[unit]
    if not unit:
        raise ValueError(f'"{text}" has no unit; write {what} like {such_as}')
    meant = _meant(unit, units)
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"write {what} like {such_as}"
    raise ValueError(f'"{text}": unknown unit "{unit}"; {hint}')


def _meant(unit: str, units: Mapping[str, Decimal]) -> list[str]:
    # "1gib" can only be GiB; but whoever writes "1Gb/s" or "1Gbps" may mean bits or bytes.
    same = [known for known in units if known.lower() == unit.lower()]
    if same and not unit.endswith("b/s"):
        return same
    prefix = unit[0].lower()
    if prefix not in "kmgt" or not re.fullmatch(r"[kmgt](b|ib|bps|b/s|ib/s|bit|/s)?", unit.lower()):
        return []
    return [known for known in units if known[0].lower() == prefix and len(known) > 1]


def _format(value: float, unit: str, larger: tuple[tuple[str, int], ...]) -> str:
    for name, factor in larger:
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {name}"
    return f"{value:.0f} {unit}"
