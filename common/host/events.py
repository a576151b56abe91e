"""What happens at a daemon, told to whoever watches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from switchover.v1 import host_pb2

__all__ = ["Events"]

Event = host_pb2.WatchEventsResponse
QUEUE_LIMIT = 10_000


class Events:
    """Events of this daemon: what came before in the watched session first, then the rest as it comes.

    Only the newest progress of a session is kept, and nothing of what happens outside of sessions, so what is left
    behind is short.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past: list[Event] = []
        self._watchers: dict[queue.Queue[Event | None], str] = {}

    def publish(self, session_id: str = "", **event: object) -> None:
        """Publish one event, given as the member of the oneof that it sets."""
        message = Event(unix_ms=time.time_ns() // 1_000_000, session_id=session_id, **event)  # type: ignore[arg-type]  # one of the oneof's members, by name
        with self._lock:
            if message.HasField("progress"):
                self._past = [
                    past for past in self._past if not (past.HasField("progress") and past.session_id == session_id)
                ]
            elif message.HasField("phase") and message.phase == "setup":
                self._past = []
            if session_id:
                self._past.append(message)
            for watcher, wanted in self._watchers.items():
                # A watcher that does not keep up misses progress, but nothing else.
                behind = watcher.qsize() >= QUEUE_LIMIT
                if wanted in ("", session_id) and not (behind and message.HasField("progress")):
                    watcher.put(message)

    def end(self) -> None:
        """Let go of whoever watches everything: the daemon ends. Who watches a session still gets its result."""
        with self._lock:
            for watcher, wanted in self._watchers.items():
                if not wanted:
                    watcher.put(None)

    def watch(self, session_id: str, *, on_end: Callable[[Callable[[], None]], bool]) -> Iterator[Event]:
        """Yield events until the session's result, or without end for all sessions.

        `on_end` is given a function that ends the iteration, to be called when the watcher has gone away; it returns
        False if that has happened already.
        """
        watcher: queue.Queue[Event | None] = queue.Queue()
        with self._lock:
            for event in self._past:
                if session_id and event.session_id == session_id:
                    watcher.put(event)
            self._watchers[watcher] = session_id
        try:
            if not on_end(lambda: watcher.put(None)):
                return
            while (event_or_end := watcher.get()) is not None:
                yield event_or_end
                if session_id and event_or_end.HasField("result"):
                    return
        finally:
            with self._lock:
                del self._watchers[watcher]
