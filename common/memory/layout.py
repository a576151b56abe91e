"""Where guest RAM lies in guest physical address space.

RAM is one memfd. Its first 3 GiB are at the same guest physical address (GPA), the rest begins at 4 GiB: the gap below
4 GiB belongs to devices, as on a PC.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHUNK_PAGES", "CHUNK_SIZE", "HIGH_START", "LOW_END", "PAGE_SIZE", "Layout", "Segment"]

PAGE_SIZE = 4096
CHUNK_SIZE = 2 << 20
CHUNK_PAGES = CHUNK_SIZE // PAGE_SIZE
LOW_END = 0xC000_0000
HIGH_START = 0x1_0000_0000


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous part of RAM: `size` bytes at guest physical address `gpa` and at `offset` in the memfd."""

    gpa: int
    size: int
    offset: int


class Layout:
    """RAM of `size` bytes, a positive multiple of 2 MiB (else `ValueError`)."""

    __slots__ = ("pages", "segments", "size")

    def __init__(self, size: int) -> None:
        if size <= 0 or size % CHUNK_SIZE:
            raise ValueError(f"RAM size must be a positive multiple of 2 MiB, not {size} bytes")
        self.size = size
        self.pages = size // PAGE_SIZE
        low = Segment(0, min(size, LOW_END), 0)
        self.segments = (low,) if size <= LOW_END else (low, Segment(HIGH_START, size - LOW_END, LOW_END))

    def offset_of(self, gpa: int, size: int) -> int:
        """Return the offset in the memfd of [gpa, gpa + size); `ValueError` unless all of it is in one segment."""
        for segment in self.segments:
            if size > 0 and segment.gpa <= gpa and gpa + size <= segment.gpa + segment.size:
                return gpa - segment.gpa + segment.offset
        raise ValueError(f"no RAM at guest physical address {gpa:#x}, size {size:#x}")

    def gpa_of(self, offset: int) -> int:
        """Return the guest physical address of an offset in the memfd; `ValueError` outside RAM."""
        for segment in self.segments:
            if segment.offset <= offset < segment.offset + segment.size:
                return offset - segment.offset + segment.gpa
        raise ValueError(f"offset {offset:#x} is outside RAM of {self.size:#x} bytes")
