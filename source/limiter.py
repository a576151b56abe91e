"""The bandwidth limit of a migration: one budget that all its streams draw from."""

from __future__ import annotations

import threading
import time

__all__ = ["Limiter"]

BURST_SECONDS = 0.01


class Limiter:
    """A token bucket in bytes. Without a limit it costs nothing; after `lift` it has none."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._lifted = threading.Event()
        self._free_at = time.monotonic()

    def take(self, size: int) -> None:
        """Wait until `size` bytes may be sent."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - BURST_SECONDS) + size / self._rate
            wait = self._free_at - now
        if wait > 0:
            self._lifted.wait(wait)

    def lift(self) -> None:
        """Let everybody go on at once: nothing more will be sent."""
        self._lifted.set()
