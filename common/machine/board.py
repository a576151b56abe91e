"""Where things are on the board: the guest physical addresses of program areas and BARs.

A pure function of the machine's description and of the sizes of its devices' BARs, so that both hosts build the same
board. Of all that only those sizes, which a device tells itself, could differ: a source compares them before it moves
anything. Below 4 GiB a PC has a hole (`common.memory.layout`); BARs that are small live there, as firmware places
them, and large ones above all RAM, in the PCI-64 window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.memory.layout import PAGE_SIZE, Layout

__all__ = ["AREA_SIZE", "FIRST_AREA", "Bar", "Board", "image_start", "regions"]

FIRST_AREA = 0x10_0000
AREA_SIZE = 4 << 20
# BARs that do not fit in the hole lie behind RAM, but not below this: under any limit of a 39-bit vIOMMU, and above the
# RAM of all but the largest machines.
BARS_64 = 0x40_0000_0000
BARS_32 = 0xE000_0000
BARS_32_END = 0xFEC0_0000


@dataclass(frozen=True, slots=True)
class Bar:
    """A BAR in guest physical address space; `size` in bytes."""

    gpa: int
    size: int
    device: str
    index: int


class Board:
    """Addresses of all BARs, for routing accesses."""

    def __init__(self, layout: Layout, devices: Sequence[tuple[str, Mapping[int, int]]]) -> None:
        """Place the BARs of `devices` (name, BAR index → size) in order, each in a power of two of whole pages."""
        last = layout.segments[-1]
        low, high = BARS_32, max(BARS_64, last.gpa + last.size)
        self.bars: list[Bar] = []
        for name, sizes in devices:
            for index, size in sorted(sizes.items()):
                # A device of others may have a BAR of any size; what is mapped for peers is mapped in pages.
                room = max(1 << (size - 1).bit_length(), PAGE_SIZE)
                aligned = -(-low // room) * room
                if aligned + room <= BARS_32_END:
                    self.bars.append(Bar(aligned, size, name, index))
                    low = aligned + room
                else:
                    high = -(-high // room) * room
                    self.bars.append(Bar(high, size, name, index))
                    high += room

    def of_device(self, name: str) -> dict[int, Bar]:
        """Return a device's BARs by index."""
        return {bar.index: bar for bar in self.bars if bar.device == name}

    def find(self, gpa: int, size: int) -> Bar | None:
        """Return the BAR that wholly contains an access."""
        for bar in self.bars:
            if bar.gpa <= gpa and gpa + size <= bar.gpa + bar.size:
                return bar
        return None


def image_start(programs: int) -> int:
    """Return the GPA from which RAM is free for the image: behind the areas of the guest's programs."""
    return FIRST_AREA + programs * AREA_SIZE


def regions(layout: Layout, sizes: Sequence[int]) -> list[int]:
    """Return a GPA for each writer's region: one below the other from the top of RAM, none across the hole.

    Sizes in bytes; raise ValueError if they do not fit.
    """
    found = []
    segments = [(segment.gpa, segment.gpa + segment.size) for segment in layout.segments]
    for size in sizes:
        while segments and segments[-1][1] - segments[-1][0] < size:
            segments.pop()
        if not segments:
            raise ValueError(f"no room in RAM for a region of {size} bytes")
        start, end = segments.pop()
        found.append(end - size)
        segments.append((start, end - size))
    return found
