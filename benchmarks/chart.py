"""Charts of bars as SVG: groups side by side on a logarithmic scale, or one bar below the other from zero on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bars", "spans"]

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#9c755f")
WIDTH, PANEL, LEFT, TOP, BOTTOM = 760, 200, 70, 34, 26


def bars(panels: Mapping[str, Mapping[str, Mapping[str, float]]], series: Sequence[str]) -> str:
    """Return the chart of `panels`: title → group → series → value, from 0 on."""
    parts = []
    for number, (title, groups) in enumerate(panels.items()):
        parts += _panel(TOP + number * (PANEL + TOP + BOTTOM), title, groups, series)
    height = len(panels) * (PANEL + TOP + BOTTOM) + TOP
    for index, name in enumerate(series):
        x = LEFT + index * 120
        parts.append(f'<rect x="{x}" y="{height - 18}" width="12" height="12" fill="{COLOURS[index]}"/>')
        parts.append(f'<text x="{x + 17}" y="{height - 8}">{escape(name)}</text>')
    return _svg(height, parts)


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(top: int, title: str, groups: Mapping[str, Mapping[str, float]], series: Sequence[str]) -> list[str]:
    values = [value for group in groups.values() for value in group.values() if value > 0]
    low = math.floor(math.log10(min(values))) if values else 0
    high = max(math.ceil(math.log10(max(values))), low + 1) if values else 1
    bottom = top + PANEL

    def y(value: float) -> float:
        return bottom - max(math.log10(value) - low, 0) / (high - low) * PANEL if value > 0 else bottom

    parts = [f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{escape(title)}</text>']
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:,g}</text>')
    space = (WIDTH - LEFT - 10) / len(groups)
    width = space * 0.8 / len(series)
    for position, (name, group) in enumerate(groups.items()):
        start = LEFT + position * space + space * 0.1
        parts.append(
            f'<text x="{start + space * 0.4:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(name)}</text>'
        )
        for index, kind in enumerate(series):
            value = group[kind]
            x, at = start + index * width, y(value)
            height = max(bottom - at, 1)
            parts.append(
                f'<rect x="{x:.1f}" y="{bottom - height:.1f}" width="{width - 2:.1f}" height="{height:.1f}" '
                f'fill="{COLOURS[index]}"><title>{escape(f"{name}, {kind}: {value:,.4g}")}</title></rect>'
            )
    return parts


NAMES, LINE, VALUES = 250, 20, 50


def spans(panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    """Return the chart of `panels`: title → bar → its value, and the lowest and highest of what was measured."""
    parts = []
    top = TOP
    for title, rows in panels.items():
        parts.append(f'<text x="10" y="{top - 10}" font-weight="bold">{escape(title)}</text>')
        scale = (WIDTH - NAMES - VALUES) / max((high for _, _, high in rows.values()), default=1)
        for name, (value, low, high) in rows.items():
            middle = top + LINE / 2
            colour = COLOURS[0] if name.startswith("--") else COLOURS[1] if name.startswith("QEMU") else COLOURS[4]
            parts += (
                f'<text x="{NAMES - 6}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{NAMES}" y="{top + 3}" width="{value * scale:.1f}" height="{LINE - 6}" fill="{colour}"/>',
                f'<path d="M{NAMES + low * scale:.1f} {middle}H{NAMES + high * scale:.1f}" stroke="black"/>',
                f'<text x="{NAMES + high * scale + 6:.1f}" y="{middle + 4}">{value:,.3g}</text>',
            )
            top += LINE
        top += TOP
    return _svg(top, parts)
