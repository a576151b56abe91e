"""One stream of each name, all of one generation, and none of an earlier one behind the next."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from common.rpc.errors import RefusalError
from destination import streams as streams_module
from destination.streams import OpenStreams

SECONDS = 10.0


class Served:
    """A stream in a thread of its own that ends some time after it was told to."""

    def __init__(self, streams: OpenStreams, name: str, generation: int = 0) -> None:
        self.told = threading.Event()
        self.may_end = threading.Event()
        open_now = threading.Event()

        def serve() -> None:
            with streams.serving(name, generation, self.told.set):
                open_now.set()
                self.may_end.wait(SECONDS)

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        assert open_now.wait(SECONDS)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RefusalError) as refusal:
        call()
    return refusal.value.reason


def serve(streams: OpenStreams, name: str, generation: int) -> None:
    with streams.serving(name, generation, lambda: None):
        pass


def test_there_is_one_stream_of_each_name() -> None:
    streams = OpenStreams()
    assert not streams
    first = Served(streams, "lane 0")
    assert streams and refused(lambda: serve(streams, "lane 0", 0)) == "BAD_REQUEST"
    serve(streams, "lane 1", 0)
    first.may_end.set()
    first.thread.join(SECONDS)
    assert not streams
    serve(streams, "lane 0", 0)


def test_a_generation_begins_when_the_one_before_has_ended() -> None:
    streams = OpenStreams()
    held = [Served(streams, name) for name in ("lane 0", "mappings")]
    begun = threading.Event()
    threading.Thread(target=lambda: (streams.begin(2), begun.set()), daemon=True).start()
    assert all(stream.told.wait(SECONDS) for stream in held)
    held[0].may_end.set()
    held[0].thread.join(SECONDS)
    assert not begun.wait(0.05)
    # Neither is anything of the new one served before.
    for generation in (0, 1, 2, 3):
        assert refused(lambda generation=generation: serve(streams, "lane 1", generation)) == "OLD_GENERATION"
    held[1].may_end.set()
    assert begun.wait(SECONDS)
    serve(streams, "lane 0", 2)
    assert refused(lambda: serve(streams, "lane 0", 0)) == "OLD_GENERATION"


def test_a_generation_is_newer_than_all_before() -> None:
    streams = OpenStreams()
    assert refused(lambda: streams.begin(0)) == "OLD_GENERATION"
    streams.begin(5)
    for generation in (1, 5):
        assert refused(lambda generation=generation: streams.begin(generation)) == "OLD_GENERATION"


def test_who_begins_a_newer_one_overtakes() -> None:
    streams = OpenStreams()
    held = Served(streams, "lane 0")
    reasons: list[str] = []
    overtaken = threading.Thread(target=lambda: reasons.append(refused(lambda: streams.begin(1))), daemon=True)
    overtaken.start()
    assert held.told.wait(SECONDS)
    held.told.clear()
    newer = threading.Thread(target=streams.begin, args=(2,), daemon=True)
    newer.start()
    overtaken.join(SECONDS)
    assert reasons == ["OLD_GENERATION"] and held.told.wait(SECONDS)
    held.may_end.set()
    newer.join(SECONDS)
    assert not newer.is_alive()
    serve(streams, "lane 0", 2)


def test_a_stream_that_does_not_end_is_waited_for_so_long_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "END_SECONDS", 0.05)
    streams = OpenStreams()
    held = Served(streams, "device nic0")
    with pytest.raises(RefusalError, match="device nic0") as refusal:
        streams.begin(1)
    assert refusal.value.reason == "CANNOT_LOAD"
    assert refused(lambda: serve(streams, "lane 0", 1)) == "OLD_GENERATION"
    held.may_end.set()
    held.thread.join(SECONDS)
    streams.begin(2)
    serve(streams, "lane 0", 2)
