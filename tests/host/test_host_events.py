from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from switchover.v1 import host_pb2

from common.host import events as events_module
from common.host.events import Event, Events


class Watcher:
    """Collects in a thread what a watcher is told."""

    def __init__(self, events: Events, session_id: str) -> None:
        self.end: Callable[[], None] = lambda: None
        self.seen: list[Event] = []
        self._watching = threading.Event()
        self._events = events
        self._session_id = session_id
        self.thread = threading.Thread(target=self._collect)
        self.thread.start()
        assert self._watching.wait(10)

    def _register(self, end: Callable[[], None]) -> bool:
        self.end = end
        self._watching.set()
        return True

    def _collect(self) -> None:
        self.seen += self._events.watch(self._session_id, on_end=self._register)

    def join(self) -> list[Event]:
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.seen


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def watch(events: Events) -> Iterator[Callable[[str], Watcher]]:
    watchers: list[Watcher] = []

    def start(session_id: str = "") -> Watcher:
        watchers.append(Watcher(events, session_id))
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.end()
        watcher.join()
    assert not events._watchers  # whoever goes leaves nothing behind


def said(events: list[Event]) -> list[str]:
    return [event.message for event in events if event.HasField("message")]


def progress(sent_bytes: int) -> host_pb2.Progress:
    return host_pb2.Progress(sent_bytes=sent_bytes)


def result() -> host_pb2.MigrationResult:
    return host_pb2.MigrationResult(result="completed")


def test_what_came_before_comes_first(events: Events, watch: Callable[[str], Watcher]) -> None:
    events.publish("a", phase="setup")
    events.publish("a", message="one")
    events.publish("b", message="of another session")
    watcher = watch("a")
    events.publish("a", message="two")
    events.publish("b", message="of another session")
    events.publish(message="of none")
    events.publish("a", result=result())
    seen = watcher.join()
    assert said(seen) == ["one", "two"] and seen[0].phase == "setup" and seen[-1].HasField("result")
    assert all(event.session_id == "a" and event.unix_ms > 0 for event in seen)


def test_whoever_comes_late_is_told_all_of_it_and_the_end(events: Events, watch: Callable[[str], Watcher]) -> None:
    events.publish("a", phase="setup")
    events.publish("a", message="one")
    events.publish("a", result=result())
    seen = watch("a").join()
    assert [event.WhichOneof("event") for event in seen] == ["phase", "message", "result"]


def test_only_the_newest_progress_is_kept(events: Events, watch: Callable[[str], Watcher]) -> None:
    events.publish("a", phase="setup")
    for sent in range(1000):
        events.publish("a", progress=progress(sent))
        if sent % 100 == 0:
            events.publish("b", progress=progress(sent))
    events.publish("a", message="after")
    assert len(events._past) == 4
    events.publish("a", result=result())
    seen = watch("a").join()
    assert [event.progress.sent_bytes for event in seen if event.HasField("progress")] == [999]


def test_a_watcher_that_is_there_sees_all_progress(events: Events, watch: Callable[[str], Watcher]) -> None:
    watcher = watch("a")
    for sent in range(50):
        events.publish("a", progress=progress(sent))
    events.publish("a", result=result())
    assert [event.progress.sent_bytes for event in watcher.join()[:-1]] == list(range(50))


def test_a_new_migration_forgets_the_last_one(events: Events, watch: Callable[[str], Watcher]) -> None:
    events.publish("a", phase="setup")
    events.publish("a", result=result())
    events.publish("b", phase="setup")
    assert [event.session_id for event in events._past] == ["b"]


def test_watching_everything_has_no_past_and_no_end_of_its_own(events: Events, watch: Callable[[str], Watcher]) -> None:
    events.publish("a", message="before")
    watcher = watch("")
    events.publish("a", message="one")
    events.publish("a", result=result())
    events.publish("b", message="two")
    events.publish(machine_state="paused")
    watcher.end()
    seen = watcher.join()
    assert said(seen) == ["one", "two"] and seen[-1].machine_state == "paused" and len(seen) == 4


def test_a_daemon_that_ends_lets_go_of_all_but_those_who_wait_for_a_result(
    events: Events, watch: Callable[[str], Watcher]
) -> None:
    everything, session = watch(""), watch("a")
    events.publish("a", message="one")
    events.end()
    assert said(everything.join()) == ["one"]
    events.publish("a", result=result())
    assert session.join()[-1].HasField("result")


def test_a_watcher_that_goes_away_is_forgotten(events: Events, watch: Callable[[str], Watcher]) -> None:
    watcher = watch("a")
    assert len(events._watchers) == 1
    watcher.end()
    assert watcher.join() == [] and not events._watchers
    events.publish("a", message="to nobody")


def test_what_is_published_is_a_copy(events: Events, watch: Callable[[str], Watcher]) -> None:
    mine = progress(1)
    events.publish("a", progress=mine)
    mine.sent_bytes = 2
    events.publish("a", result=result())
    assert watch("a").join()[0].progress.sent_bytes == 1


def test_a_watcher_that_has_gone_before_it_began_is_forgotten(events: Events) -> None:
    events.publish("a", message="one")
    assert list(events.watch("a", on_end=lambda _: False)) == []
    assert not events._watchers


def test_a_watcher_that_does_not_keep_up_misses_progress_only(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "QUEUE_LIMIT", 3)
    watching = events.watch("a", on_end=lambda _: True)
    events.publish("a", message="before")
    assert next(watching).message == "before"
    for sent in range(10):
        events.publish("a", progress=progress(sent))
    events.publish("a", message="after")
    events.publish("a", result=result())
    seen = list(watching)
    assert [event.progress.sent_bytes for event in seen if event.HasField("progress")] == [0, 1, 2]
    assert said(seen) == ["after"] and seen[-1].HasField("result")
