"""Ctrl-C and SIGTERM, for programs of many threads.

The kernel gives a signal to any thread, Python runs its handler in the main one, and nothing wakes that if it waits for
a lock: a daemon would go on for ever. So the main thread waits for a descriptor, which is written to at once, in
whatever thread the signal came.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ending_signals"]


@contextmanager
def ending_signals() -> Iterator[int]:
    """Give a descriptor that has a byte to read for each Ctrl-C or SIGTERM: nothing is interrupted by them.

    Only in the main thread; what was set before is put back at the end.
    """
    told, tells = socket.socketpair()
    with told, tells:
        tells.settimeout(0)
        wakes = signal.set_wakeup_fd(tells.fileno())
        handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield told.fileno()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakes)
