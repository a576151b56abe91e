"""The part of a device that works by itself: a thread that steps, sleeps, and listens for its doorbell.

A step is short (about a millisecond) and holds the engine's lock. Whoever takes the lock therefore stands between two
steps: no DMA is under way, and all that was written is marked.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from types import TracebackType

from common import hooks

__all__ = ["Engine", "Turns"]


class Turns:
    """A lock that waiters get in turn, so that an engine that hardly lets go of it cannot starve a command.

    Whoever is next waits in the doorway with the first lock held; who has just left must queue behind.
    """

    def __init__(self) -> None:
        self._doorway = threading.Lock()
        self._room = threading.Lock()

    def __enter__(self) -> None:
        """Wait for the lock."""
        with self._doorway:
            self._room.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the lock."""
        self._room.release()


class Engine:
    """Runs `step(now)` under `lock`; a step returns the seconds until the next one, or None to wait to be woken.

    `now` is time.monotonic(). While `listening`, the doorbell wakes it too. The doorbell is an eventfd that is shared
    with whoever rings; only a running device takes rings from it, so that they outlast a stop.
    """

    def __init__(self, name: str, step: Callable[[float], float | None]) -> None:
        self.lock = Turns()
        self.watching = threading.Lock()
        self.listening = False
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._step = step
        self._closing = False
        self._watched: dict[int, Callable[[], None]] = {}
        self._quiet, self._listening = select.poll(), select.poll()
        self._quiet.register(self._wake, select.POLLIN)
        self._listening.register(self._wake, select.POLLIN)
        self._listening.register(self.doorbell, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"{name}-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after its step and close the descriptors."""
        self._closing = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self.doorbell)
        os.close(self._wake)

    def wake(self) -> None:
        """Make the engine step now: something has changed."""
        os.eventfd_write(self._wake, 1)

    def ring(self) -> None:
        """Ring the doorbell, as a write to it does that was trapped."""
        os.eventfd_write(self.doorbell, 1)

    def take_ring(self) -> bool:
        """Take the rings that came since the last time; return whether there were any."""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self.doorbell) > 0
        return False

    def watch(self, eventfd: int, action: Callable[[], None]) -> None:
        """Call `action`, under `watching`, whenever an eventfd is signalled, until `unwatch`. Called under it."""
        self._watched[eventfd] = action
        for poll in (self._quiet, self._listening):
            poll.register(eventfd, select.POLLIN)
        self.wake()

    def unwatch(self, eventfd: int) -> None:
        """Watch an eventfd no longer; it may be closed then. Called under `watching`, or after `close`."""
        del self._watched[eventfd]
        for poll in (self._quiet, self._listening):
            poll.unregister(eventfd)

    def _run(self) -> None:
        while not self._closing:
            with self.lock if hooks.guarded("report-before-data") else contextlib.nullcontext():
                delay = self._step(time.monotonic())
                poll = self._listening if self.listening else self._quiet
            ready = poll.poll(None if delay is None else delay * 1000)
            if not ready:
                hooks.reach("device.due")
            if (self.doorbell, select.POLLIN) in ready:
                hooks.reach("device.rung")
            if not self._watched.keys().isdisjoint(fd for fd, _ in ready):
                self._call_watchers(poll)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)

    def _call_watchers(self, poll: select.poll) -> None:
        with self.watching:
            # Asked again: one that was ready may be closed by now, and its number another's.
            for fd, _ in poll.poll(0):
                if action := self._watched.get(fd):
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                    action()
