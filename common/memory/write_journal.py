"""What a writer of guest RAM remembers of its writes, so that a page that differs can be explained.

Kept only by a machine with `trace = true`: a row for each page of each write, the newest million of them.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

__all__ = ["JOURNAL_ROW", "Rows", "WriteJournal"]

JOURNAL_ROW = np.dtype([("page", "<u8"), ("time_ns", "<u8")])
"""A page that was written, by number in the writer's own address space, and the host's monotonic time, ns."""

Rows = npt.NDArray[np.void]


class WriteJournal:
    """The last `capacity` writes. Not thread-safe: whoever owns it notes and looks under one lock."""

    __slots__ = ("_rows", "_written")

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._rows: Rows = np.zeros(capacity, JOURNAL_ROW)
        self._written = 0

    def note(self, first: int, pages: int) -> None:
        """Note a write to `pages` pages from `first`."""
        if pages == 1:
            self._rows[self._written % self._rows.size] = (first, time.monotonic_ns())
            self._written += 1
        else:
            self.note_pages(np.arange(first, first + pages, dtype=np.int64))

    def note_pages(self, pages: npt.NDArray[np.int64]) -> None:
        """Note writes to pages, in this order."""
        slots = np.arange(self._written, self._written + pages.size) % self._rows.size
        self._rows["page"][slots] = pages
        self._rows["time_ns"][slots] = time.monotonic_ns()
        self._written += pages.size

    def of(self, first: int, pages: int, limit: int) -> Rows:
        """Return the newest `limit` rows of writes to `pages` pages from `first`, oldest first."""
        kept = self._rows[: self._written]
        hits = np.flatnonzero((kept["page"] >= first) & (kept["page"] < first + pages))
        if self._written > self._rows.size:
            hits = hits[np.argsort((hits - self._written) % self._rows.size)]
        found: Rows = kept[hits[-limit:]]
        return found
