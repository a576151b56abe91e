"""The streams of an arrival: one of each name, and all of one generation.

A generation is what was opened between two losses of the network. The next one begins when nothing of the one before
is served any more: what a slow network, or a slow thread, has held back can then never be applied behind something
that is newer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from common.rpc.errors import RefusalError
from destination.refusal import bad

__all__ = ["OLD_GENERATION", "OpenStreams"]

OLD_GENERATION = "OLD_GENERATION"
END_SECONDS = 20.0


class OpenStreams:
    """Which streams are open. Any thread may call any method."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: dict[tuple[int, str], Callable[[], object]] = {}
        self._beginning = False
        self.generation = 0

    def __bool__(self) -> bool:
        return bool(self._ends)

    @contextmanager
    def serving(self, name: str, generation: int, end: Callable[[], object]) -> Iterator[None]:
        """Serve the one stream of that name in this block; `end` ends it from outside.

        OLD_GENERATION if it is of another one, BAD_REQUEST if there is one already.
        """
        with self._changed:
            if generation != self.generation or self._beginning:
                raise _old(generation)
            if (generation, name) in self._ends:
                raise bad(f"there is a stream for {name} already")
            self._ends[generation, name] = end
        try:
            yield
        finally:
            with self._changed:
                del self._ends[generation, name]
                self._changed.notify_all()

    def begin(self, generation: int) -> None:
        """Begin a generation: end the streams of the one before, and return when none of them is served any more.

        OLD_GENERATION if it is not the newest, or a newer one was begun meanwhile; CANNOT_LOAD if a stream, waiting
        for what does not answer, has not ended in time.
        """
        with self._changed:
            if generation <= self.generation:
                raise _old(generation)
            self.generation, self._beginning = generation, True
            self._changed.notify_all()
        self.end()
        with self._changed:
            self._changed.wait_for(lambda: self.generation != generation or not self._ends, END_SECONDS)
            if self.generation != generation:
                raise _old(generation)
            if self._ends:
                names = ", ".join(name for _, name in self._ends)
                raise RefusalError(grpc.StatusCode.ABORTED, "CANNOT_LOAD", f"not ended in {END_SECONDS:g} s: {names}")
            self._beginning = False

    def end(self) -> None:
        """End all of them from outside, at once."""
        with self._changed:
            ends = list(self._ends.values())
        for end in ends:
            end()


def _old(generation: int) -> RefusalError:
    return RefusalError(
        grpc.StatusCode.FAILED_PRECONDITION, OLD_GENERATION, f"generation {generation} is not the newest"
    )
