"""What page lanes have sent, counted by the way in which it went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from operator import sub

from switchover.v1 import host_pb2

from common.memory.layout import PAGE_SIZE
from common.memory.pages import Encoding, PageBatch

__all__ = ["LaneStats", "total"]


@dataclass(slots=True)
class LaneStats:
    """What was sent: pages, how many of them in which way, and bytes on the wire.

    Differences (`delta_pages`) are mostly compressed too; what is in none of these kinds went as it was.
    """

    pages: int = 0
    zero_pages: int = 0
    sent_bytes: int = 0
    unchanged_pages: int = 0
    equal_pages: int = 0
    delta_pages: int = 0
    compressed_pages: int = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages that are not zero, before compression."""
        return (self.pages - self.zero_pages) * PAGE_SIZE

    def since(self, before: LaneStats) -> LaneStats:
        """Return what was sent after that."""
        return LaneStats(*map(sub, astuple(self), astuple(before)))

    def tell(self, message: host_pb2.RamResult | host_pb2.Progress) -> None:
        """Fill in how the pages went; their number and the bytes on the wire stand elsewhere in each."""
        message.page_bytes = self.page_bytes
        message.zero_pages = self.zero_pages
        message.unchanged_pages = self.unchanged_pages
        message.equal_pages = self.equal_pages
        message.delta_pages = self.delta_pages
        message.compressed_pages = self.compressed_pages

    def count(self, batch: PageBatch, size: int = 0) -> None:
        """Count a batch that is sent, with `size` bytes."""
        self.pages += batch.pages
        self.zero_pages += batch.zero_pages
        self.sent_bytes += size
        self.unchanged_pages += batch.unchanged_pages
        self.equal_pages += batch.equal_pages
        self.delta_pages += batch.delta_pages
        if batch.encoding != Encoding.RAW:
            self.compressed_pages += batch.payload_pages


def total(parts: Iterable[LaneStats]) -> LaneStats:
    """Return the sum of what several have sent; there is at least one."""
    return LaneStats(*map(sum, zip(*map(astuple, parts), strict=True)))
