"""A fair lock: whoever asks first goes first.

`threading.Lock` is not fair. A collection of dirty bits takes and drops its lock hundreds of times in a row, with the
thread switch on its side: a guest that wants to map something would wait for all of it.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

__all__ = ["Turn"]


class Turn:
    """A lock for `with` that is granted in the order in which it was asked for; not re-entrant (RuntimeError)."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._owner: int | None = None
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    @property
    def waiting(self) -> int:
        """How many threads wait."""
        return len(self._waiting)

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._mutex:
            if self._owner is None:
                self._owner = me
                return
            if self._owner == me:
                raise RuntimeError("this thread has the turn already")
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append((me, gate))
        try:
            gate.acquire()
        except BaseException:
            # Interrupted by a signal: leave the queue, or pass on what was granted meanwhile.
            with self._mutex:
                if (me, gate) in self._waiting:
                    self._waiting.remove((me, gate))
                    raise
            self._pass_on()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        with self._mutex:
            if not self._waiting:
                self._owner = None
                return
            self._owner, gate = self._waiting.popleft()
        gate.release()
