"""A stream without gRPC: the test is the destination, which takes requests when it likes and answers what it likes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from common.rpc.errors import PeerError
from source.stream import QUEUED_REQUESTS, AckedStream

SECONDS = 10.0  # after which a test has hung


class Broken(grpc.RpcError):
    """What gRPC raises for a call that has failed."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__()
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


@dataclass
class Ack:
    applied_sequence: int


class Destination:
    """The other end of the stream, in place of gRPC's call object: as there, a thread takes the requests."""

    def __init__(self, *, reads: bool = True) -> None:
        self.received: queue.Queue[int] = queue.Queue()
        self.cancelled = threading.Event()
        self._answers: queue.Queue[Ack | Exception | None] = queue.Queue()
        self._may_read = threading.Event()
        self._thread: threading.Thread | None = None
        if reads:
            self._may_read.set()

    def open(self, requests: Iterator[int]) -> Destination:
        self._thread = threading.Thread(target=self._consume, args=(requests,))
        self._thread.start()
        return self

    def _consume(self, requests: Iterator[int]) -> None:
        self._may_read.wait()
        for request in requests:
            self.received.put(request)
        if not self.cancelled.is_set():
            self._answers.put(None)  # the destination ends its side when ours has ended

    def __iter__(self) -> Iterator[Ack]:
        while (answer := self._answers.get()) is not None:
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def cancel(self) -> None:
        self.cancelled.set()
        self._may_read.set()
        self._answers.put(Broken(grpc.StatusCode.CANCELLED, "Locally cancelled by application!"))

    def ack(self, sequence: int) -> None:
        self._answers.put(Ack(sequence))

    def end(self, failure: Exception | None = None) -> None:
        self._answers.put(failure)

    def has_ended(self) -> bool:
        assert self._thread is not None
        self._thread.join(SECONDS)
        return not self._thread.is_alive()


Opened = tuple[AckedStream[int, Ack], Destination]


@pytest.fixture
def opened() -> Iterator[Callable[..., Opened]]:
    """Open streams; whatever a test does to one, no thread of it is left."""
    made: list[Opened] = []

    def start(*, reads: bool = True, on_ack: Callable[[Ack], None] = lambda _: None) -> Opened:
        destination = Destination(reads=reads)
        made.append((AckedStream(destination.open, on_ack), destination))
        return made[-1]

    yield start
    for stream, destination in made:
        if stream._acks.is_alive():
            stream.close(abort=True)
        else:
            stream._queue.put(None)
        assert destination.has_ended()
        assert not stream._acks.is_alive()


class Background:
    """A call in a thread of its own, and what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.failure: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:  # noqa: BLE001  # what it was is what the test looks at
            self.failure = error

    def waits(self) -> bool:
        self._thread.join(0.05)
        return self._thread.is_alive()

    def ended(self) -> bool:
        self._thread.join(SECONDS)
        return not self._thread.is_alive()


def send(stream: AckedStream[int, Ack], count: int = 1) -> None:
    for _ in range(count):
        stream.send(stream.next_sequence())


def calls(stream: AckedStream[int, Ack]) -> list[Callable[[], Any]]:
    """All that may be asked of a stream with something under way."""
    return [lambda: stream.send(99), stream.check, stream.drain]


def test_what_is_sent_arrives_in_order_and_is_applied_when_drained(opened: Callable[..., Opened]) -> None:
    seen: list[int] = []
    stream, destination = opened(on_ack=lambda ack: seen.append(ack.applied_sequence))
    send(stream, 3)
    assert [destination.received.get(timeout=SECONDS) for _ in range(3)] == [1, 2, 3]
    draining = Background(stream.drain)
    destination.ack(1)
    destination.ack(2)
    assert draining.waits()
    destination.ack(3)
    assert draining.ended() and draining.failure is None
    assert seen == [1, 2, 3] and stream.sequence == 3
    stream.check()


def test_many_are_taken_by_the_thread_that_sends_them(opened: Callable[..., Opened]) -> None:
    stream, destination = opened()
    threads: list[str] = []

    def requests() -> Generator[int]:
        for _ in range(100):
            threads.append(threading.current_thread().name)
            yield stream.next_sequence()

    stream.send_all(requests())
    send(stream)
    assert [destination.received.get(timeout=SECONDS) for _ in range(101)] == [*range(1, 102)]
    assert destination._thread is not None and set(threads) == {destination._thread.name}


def test_a_failure_among_many_is_raised_and_ends_the_stream(opened: Callable[..., Opened]) -> None:
    stream, destination = opened()

    def requests() -> Generator[int]:
        yield stream.next_sequence()
        raise OSError(12, "no memory")

    for call in (lambda: stream.send_all(requests()), stream.drain):
        with pytest.raises(OSError, match="no memory"):
            call()
    assert destination.received.get(timeout=SECONDS) == 1


def test_nothing_is_taken_any_more_when_many_have_failed(opened: Callable[..., Opened]) -> None:
    """Whoever goes on elsewhere with what is left shares it with nobody."""
    stream, destination = opened()
    inside, go_on = threading.Event(), threading.Event()
    taken: list[int] = []

    def requests() -> Generator[int]:
        for number in range(3):
            taken.append(number)
            inside.set()
            assert go_on.wait(SECONDS)
            yield stream.next_sequence()

    sending = Background(lambda: stream.send_all(requests()))
    assert inside.wait(SECONDS)
    destination.end(Broken(grpc.StatusCode.UNAVAILABLE, "gone"))
    assert sending.waits()  # it is just being asked for a request
    go_on.set()
    assert sending.ended() and isinstance(sending.failure, PeerError)
    count = len(taken)
    time.sleep(0.05)
    assert len(taken) == count


def test_many_that_nobody_takes_are_given_up_with_the_stream(opened: Callable[..., Opened]) -> None:
    stream, _ = opened(reads=False)
    sending = Background(lambda: stream.send_all(number for number in (1, 2)))
    assert sending.waits()
    stream.interrupt(ConnectionError("enough"))
    assert sending.ended() and str(sending.failure) == "enough"


def test_nothing_sent_is_drained(opened: Callable[..., Opened]) -> None:
    stream, _ = opened()
    stream.drain()
    assert stream.sequence == 0


def test_an_ack_may_stand_for_several(opened: Callable[..., Opened]) -> None:
    stream, destination = opened()
    send(stream, 3)
    destination.ack(0)
    destination.ack(3)
    destination.ack(3)
    stream.drain()
    stream.check()


def test_an_ack_is_seen_before_its_request_counts_as_applied(opened: Callable[..., Opened]) -> None:
    """Who has drained may rely on all that acks have told."""
    seen, go_on = threading.Event(), threading.Event()

    def look(_: Ack) -> None:
        seen.set()
        assert go_on.wait(SECONDS)

    stream, destination = opened(on_ack=look)
    send(stream)
    draining = Background(stream.drain)
    destination.ack(1)
    assert seen.wait(SECONDS) and draining.waits()
    go_on.set()
    assert draining.ended() and draining.failure is None


@pytest.mark.parametrize("sequence", [3, 1 << 63])
def test_an_ack_of_what_was_never_sent_is_refused(opened: Callable[..., Opened], sequence: int) -> None:
    seen: list[Ack] = []
    stream, destination = opened(on_ack=seen.append)
    send(stream, 2)
    destination.ack(sequence)
    for call in calls(stream)[1:]:
        assert Background(lambda: stream._acks.join(SECONDS)).ended()
        with pytest.raises(ConnectionError, match=f"acknowledges {sequence}, never sent"):
            call()
    assert seen == []


def test_an_ack_does_not_go_back(opened: Callable[..., Opened]) -> None:
    stream, destination = opened()
    send(stream, 3)
    destination.ack(2)
    destination.ack(1)
    with pytest.raises(ConnectionError, match="acknowledges 1"):
        stream.drain()


@pytest.mark.parametrize("which", range(3))
def test_a_failure_of_the_call_is_kept_and_raised_by_every_later_call(
    opened: Callable[..., Opened], which: int
) -> None:
    stream, destination = opened()
    send(stream)
    destination.end(Broken(grpc.StatusCode.UNAVAILABLE, "gone"))
    stream._acks.join(SECONDS)
    for _ in range(2):
        with pytest.raises(PeerError, match="cannot be reached: gone") as failed:
            calls(stream)[which]()
        assert failed.value.reason == "UNREACHABLE"


def test_what_has_ended_it_is_told_while_nobody_uses_it() -> None:
    ended: queue.Queue[Exception] = queue.Queue()
    destination = Destination()
    stream: AckedStream[int, Ack] = AckedStream(destination.open, on_end=ended.put)
    destination.end(Broken(grpc.StatusCode.UNAVAILABLE, "gone"))
    failure = ended.get(timeout=SECONDS)
    with pytest.raises(PeerError) as raised:
        stream.check()
    assert raised.value is failure
    stream.close(abort=True)
    assert destination.has_ended()


@pytest.mark.parametrize("which", range(3))
def test_a_stream_that_the_destination_ends_has_failed(opened: Callable[..., Opened], which: int) -> None:
    stream, destination = opened()
    send(stream)
    destination.end()
    stream._acks.join(SECONDS)
    with pytest.raises(ConnectionError, match="the destination has ended a stream"):
        calls(stream)[which]()


def test_the_queue_is_short_and_who_waits_for_it_is_interrupted(opened: Callable[..., Opened]) -> None:
    stream, _ = opened(reads=False)
    sending = Background(lambda: send(stream, 100))
    assert sending.waits()
    assert stream.sequence == QUEUED_REQUESTS + 1
    stream.interrupt(KeyError("cancelled"))
    assert sending.ended() and isinstance(sending.failure, KeyError)


def test_who_waits_for_acks_is_interrupted(opened: Callable[..., Opened]) -> None:
    stream, _ = opened()
    send(stream)
    draining = Background(stream.drain)
    assert draining.waits()
    stream.interrupt(KeyError("cancelled"))
    assert draining.ended() and isinstance(draining.failure, KeyError)
    for call in calls(stream):
        with pytest.raises(KeyError):
            call()


def test_the_first_failure_counts(opened: Callable[..., Opened]) -> None:
    stream, destination = opened()
    send(stream)
    stream.interrupt(KeyError("first"))
    stream.interrupt(ValueError("second"))
    destination.end(Broken(grpc.StatusCode.UNAVAILABLE, "third"))
    stream._acks.join(SECONDS)
    with pytest.raises(KeyError, match="first"):
        stream.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a defect, which is to be seen
def test_an_ack_that_cannot_be_taken_ends_the_stream(opened: Callable[..., Opened]) -> None:
    def broken(_: Ack) -> None:
        raise ZeroDivisionError

    stream, destination = opened(on_ack=broken)
    send(stream)
    draining = Background(stream.drain)
    destination.ack(1)
    assert draining.ended() and isinstance(draining.failure, ConnectionError)
    with pytest.raises(ConnectionError):
        send(stream)


def test_closing_in_good_order_sends_what_was_handed_over_and_waits(opened: Callable[..., Opened]) -> None:
    stream, destination = opened()
    send(stream, 3)
    stream.close(abort=False)
    assert destination.has_ended() and not stream._acks.is_alive()
    assert destination.received.qsize() == 3 and not destination.cancelled.is_set()


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("sent", [0, 1, QUEUED_REQUESTS])
def test_closing_at_once_ends_all_threads(opened: Callable[..., Opened], sent: int, reads: bool) -> None:
    stream, destination = opened(reads=reads)
    send(stream, sent)
    closing = Background(lambda: stream.close(abort=True))
    assert closing.ended() and closing.failure is None
    assert destination.cancelled.is_set() and destination.has_ended() and not stream._acks.is_alive()
    with pytest.raises(PeerError):
        stream.check()


def test_closing_at_once_lets_go_who_still_sends_and_waits(opened: Callable[..., Opened]) -> None:
    stream, destination = opened(reads=False)
    sending = Background(lambda: send(stream, 100))
    draining = Background(stream.drain)
    assert sending.waits() and draining.waits()
    stream.interrupt(KeyError("cancelled"))
    closing = Background(lambda: stream.close(abort=True))
    assert closing.ended() and sending.ended() and draining.ended()
    assert isinstance(sending.failure, KeyError) and isinstance(draining.failure, KeyError)
    assert destination.has_ended()


def test_a_stream_that_has_failed_is_cancelled_however_it_is_closed(opened: Callable[..., Opened]) -> None:
    """Its destination will not end it."""
    stream, destination = opened(reads=False)
    send(stream, QUEUED_REQUESTS)
    stream.interrupt(KeyError("cancelled"))
    closing = Background(lambda: stream.close(abort=False))
    assert closing.ended() and destination.cancelled.is_set() and destination.has_ended()
