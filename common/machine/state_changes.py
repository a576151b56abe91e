"""Which device changed its migration state, in order, for daemons that tell it (QEMU: the event VFIO_MIGRATION)."""

from __future__ import annotations

import threading
from collections import deque

from common.vfio.migration import DeviceState

__all__ = ["StateChanges"]

KEPT = 1024


class StateChanges:
    """The newest changes, numbered from 1; any thread may note and wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._changes: deque[tuple[str, str]] = deque(maxlen=KEPT)
        self._count = 0

    def note(self, device: str, state: DeviceState) -> None:
        """Note that a device is in another state now."""
        with self._changed:
            self._changes.append((device, state.name))
            self._count += 1
            self._changed.notify_all()

    def after(self, number: int | None, timeout: float) -> tuple[int, list[tuple[str, str]]]:
        """Wait up to `timeout` seconds for changes after `number`; return the number of the last one, and them.

        None: return the number at once, without any.
        """
        with self._changed:
            if number is None:
                return self._count, []
            self._changed.wait_for(lambda: self._count > number, timeout)
            new = min(max(self._count - number, 0), len(self._changes))
            return self._count, list(self._changes)[len(self._changes) - new :]
