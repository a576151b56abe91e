"""What is remembered of each page, so that a page that differs can be explained.

Bitmaps of what every round sent and of what every collection reported by whom, compressed: a bitmap of few dirty pages
is almost nothing, so a long migration of a large machine still costs little.
"""

from __future__ import annotations

from dataclasses import dataclass

import lz4.block

from common.memory.packed import PackedBitmap

__all__ = ["History"]


@dataclass(frozen=True, slots=True)
class _Entry:
    label: str
    compressed: bytes
    pages: int

    @classmethod
    def of(cls, label: str, packed: PackedBitmap) -> _Entry:
        return cls(label, lz4.block.compress(packed.to_bytes()), packed.pages)

    def has(self, page: int) -> bool:
        return PackedBitmap.from_bytes(lz4.block.decompress(self.compressed), self.pages).has(page)


class History:
    """The rounds of a migration."""

    def __init__(self) -> None:
        self._sent: list[_Entry] = []
        self._reported: list[_Entry] = []

    def sent(self, number: int, packed: PackedBitmap) -> None:
        """Remember what a round after round 0, which sends everything, sends."""
        self._sent.append(_Entry.of(str(number), packed))

    def reported(self, number: int, source: str, packed: PackedBitmap) -> None:
        """Remember what a collection after round `number` was told by a source of dirty pages."""
        self._reported.append(_Entry.of(f"after round {number}: {source}", packed))

    def rounds_that_sent(self, page: int) -> list[int]:
        """Return the numbers of the rounds that sent a page."""
        return [0, *(int(entry.label) for entry in self._sent if entry.has(page))]

    def reports_of(self, page: int) -> list[str]:
        """Return who reported a page dirty, and when."""
        return [entry.label for entry in self._reported if entry.has(page)]
