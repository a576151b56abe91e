"""What all page lanes of an arrival share, of whatever kind: order, and the way into RAM."""

from __future__ import annotations

from common.memory.pages import Applier, PageBatch, Receive, belongs
from destination.refusal import bad

__all__ = ["Lanes"]


class Lanes:
    """Applies batches in order; each lane has its own 2 MiB chunks, so all of them may do so side by side."""

    def __init__(self, count: int) -> None:
        self.sequences = [0] * count
        self.applier: Applier | None = None

    def apply(self, lane: int, batch: PageBatch, receive: Receive | None = None) -> None:
        """Write a lane's next batch to RAM (`receive`: see `Applier.apply`); refuse one that is not in order."""
        if not 0 <= lane < len(self.sequences):
            raise bad(f"lane {lane} was not announced")
        if self.applier is None:
            raise bad("the session is not prepared yet")
        if batch.sequence != self.sequences[lane] + 1:
            raise bad(f"lane {lane}: batch {batch.sequence} after {self.sequences[lane]}")
        try:
            if not belongs(batch, lane, len(self.sequences)):
                raise ValueError("a batch has pages of another lane")
            self.applier.apply(batch, receive)
        except ValueError as error:
            raise bad(f"lane {lane}, batch {batch.sequence}: {error}") from error
        self.sequences[lane] = batch.sequence
