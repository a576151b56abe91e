"""What is being sent, as it is acknowledged: for the policy, and for those who watch."""

from __future__ import annotations

import threading
import time
from collections import deque

__all__ = ["Meter"]

SHOWN_SECONDS = 1.0
# A bandwidth that is worth deciding by: measured over at least this long (QEMU: BUFFER_DELAY) and this much.
ENOUGH_SECONDS = 0.1
ENOUGH_BYTES = 1 << 20


class Meter:
    """Counts acks. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent = deque([(time.monotonic(), 0)])
        self._rounds: deque[tuple[float, int]] = deque(maxlen=64)
        self._estimate = self._least = 0.0
        self.total_bytes = 0
        self.round_pages = 0

    def round_begins(self) -> None:
        """Count a round's pages from now on; a time before it in which nothing was sent does not count as slow."""
        now = time.monotonic()
        with self._lock:
            self.round_pages = 0
            if now - self._recent[-1][0] > ENOUGH_SECONDS:
                self._recent = deque([(now, 0)])

    def applied(self, pages: int, size: int) -> None:
        """Count what an ack has acknowledged."""
        now = time.monotonic()
        with self._lock:
            self.total_bytes += size
            self.round_pages += pages
            self._recent.append((now, size))
            self._forget(now)

    def _forget(self, now: float) -> None:
        """Keep the acks of the last second and the one before them, and two in any case."""
        while len(self._recent) > 2 and self._recent[1][0] <= now - SHOWN_SECONDS:
            self._recent.popleft()

    def round_done(self, seconds: float, size: int) -> None:
        """Count a round that sent `size` bytes of pages (before compression) in `seconds`.

        One that is neither long nor large has waited more than it has sent: it tells what the link carries at least,
        and that is only believed while nothing better is known.
        """
        with self._lock:
            if seconds < ENOUGH_SECONDS and size < ENOUGH_BYTES:
                self._least = max(self._least, size / seconds if seconds > 0 else 0.0)
                return
            self._rounds.append((seconds, size))
            spent, sent = 0.0, 0
            for round_seconds, round_size in reversed(self._rounds):
                spent, sent = spent + round_seconds, sent + round_size
                if spent >= ENOUGH_SECONDS and sent >= ENOUGH_BYTES:
                    self._estimate = sent / spent
                    return
            if self._estimate == 0.0 and spent > 0.0:
                self._estimate = sent / spent

    @property
    def bandwidth(self) -> float:
        """Bytes of pages per second, by the last rounds that were long enough to tell; 0: none has ended yet."""
        return self._estimate or self._least

    def current_bandwidth(self) -> float:
        """Bytes per second in the last second; where acks come more seldom than that, since the last one but one."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            (began, _), *acks = self._recent
        if len(acks) > 1:
            began = max(began, now - SHOWN_SECONDS)
        return sum(size for _, size in acks) / max(now - began, ENOUGH_SECONDS)
