"""Losses of the network, and who waits for what: the test is the destination, which answers when it likes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import pytest
from switchover.v1 import migration_pb2 as pb

from common.rpc.errors import PeerError
from source import reconnect
from source.reconnect import Connection, Link, is_loss

SECONDS = 10.0
LOSS = PeerError("UNREACHABLE", "cannot be reached: reset", grpc.StatusCode.UNAVAILABLE)
REFUSAL = PeerError("WRONG_STATE", "the session is REVOKED", grpc.StatusCode.FAILED_PRECONDITION)
BEGINS = pb.ReconnectResponse(lanes=[pb.SendPagesResponse()] * 2)
ANSWER = pb.ReconnectResponse(lanes=[pb.SendPagesResponse(applied_sequence=number) for number in (3, 4)])


class Failed(grpc.RpcError):
    """What gRPC raises for a call that has failed."""

    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__()
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "so it says"


class Call:
    """One call of Reconnect, until it is answered, fails, or is cancelled."""

    def __init__(self, request: pb.ReconnectRequest, timeout: float) -> None:
        self.request = request
        self.timeout = timeout
        self.cancelled = False
        self._answers: queue.Queue[object] = queue.Queue()

    def say(self, answer: object) -> None:
        self._answers.put(answer)

    def cancel(self) -> None:
        self.cancelled = True
        self.say(grpc.FutureCancelledError())

    def result(self) -> object:
        answer = self._answers.get(timeout=SECONDS)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Destination:
    """In place of the stub: every call is one that the test may answer."""

    def __init__(self) -> None:
        self.calls: queue.Queue[Call] = queue.Queue()
        self.Reconnect = self  # as gRPC has it
        self.heard: list[str] = []
        self.losses: list[Exception] = []
        self.link = Link(cast("Any", self), "5e55", self.heard.append, self.losses.append)
        self.link.open(BEGINS, 30.0)

    def future(self, request: pb.ReconnectRequest, timeout: float, *, wait_for_ready: bool) -> Call:
        assert wait_for_ready
        call = Call(request, timeout)
        self.calls.put(call)
        return call

    def next_call(self) -> Call:
        return self.calls.get(timeout=SECONDS)


class Waiting:
    """Somebody whose stream is lost, in a thread of his own."""

    def __init__(self, link: Link, failure: Exception = LOSS) -> None:
        self.outcome: object = None
        self._link, self._connection, self._failure = link, link.current, failure
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self._link.restore(self._connection, self._failure)
        except Exception as error:  # noqa: BLE001  # what it was is what the test looks at
            self.outcome = error

    def ended(self) -> object:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self.outcome


@pytest.fixture
def destination(monkeypatch: pytest.MonkeyPatch) -> Iterator[Destination]:
    monkeypatch.setattr(reconnect, "RETRY_SECONDS", 0.0)
    made = Destination()
    yield made
    made.link.interrupt(KeyError("the test has ended"))


def raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:  # which one is what is returned
        call()
    return caught.value


def test_a_loss_is_nobodys_decision() -> None:
    assert is_loss(LOSS)
    assert not any(map(is_loss, (REFUSAL, ConnectionError("an ack of what was never sent"), KeyError("cancelled"))))


def test_who_has_lost_his_stream_gets_the_next_connection(destination: Destination) -> None:
    link = destination.link
    waiting = Waiting(link)
    call = destination.next_call()
    assert (call.request.session_id, call.request.generation) == ("5e55", 1)
    assert destination.losses == [LOSS] and link.lost_s > 0 and link.reconnects == 0
    assert raised(lambda: link.check(link.current)) is LOSS
    call.say(ANSWER)
    connection = waiting.ended()
    assert connection == Connection(1, ANSWER) and connection is link.current
    assert (link.reconnects, link.lost_s) == (1, 0.0) and link.without_s > 0
    assert [line.partition(" is lost" if " is lost" in line else " after")[1] for line in destination.heard] == [
        " is lost",
        " after",
    ]
    link.check(link.current)


def test_one_asks_for_all(destination: Destination) -> None:
    """Who comes later, or has failed of whatever kind because of it, goes on too."""
    link = destination.link
    waiting = [Waiting(link), Waiting(link)]
    old = link.current
    destination.next_call().say(ANSWER)
    assert [each.ended() for each in waiting] == [link.current] * 2
    assert link.restore(old, REFUSAL) is link.current
    assert destination.calls.empty() and len(destination.losses) == 1 and link.reconnects == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_it_is_asked_until_it_answers_each_time_for_a_newer_generation(
    destination: Destination, code: grpc.StatusCode
) -> None:
    waiting = Waiting(destination.link)
    for generation in (1, 2, 3):
        call = destination.next_call()
        assert call.request.generation == generation and call.timeout <= reconnect.ATTEMPT_SECONDS
        call.say(Failed(code) if generation < 3 else ANSWER)
    assert waiting.ended() == Connection(3, ANSWER)


def test_a_destination_that_refuses_is_not_asked_again(destination: Destination) -> None:
    link = destination.link
    waiting = [Waiting(link), Waiting(link)]
    destination.next_call().say(Failed(grpc.StatusCode.FAILED_PRECONDITION))
    outcomes = [each.ended() for each in waiting]
    assert outcomes[0] is outcomes[1] and str(outcomes[0]) == "so it says"
    assert raised(lambda: link.restore(link.current, LOSS)) is outcomes[0]
    assert destination.calls.empty() and link.reconnects == 0


def test_a_destination_with_other_lanes_is_none_to_go_on_with(destination: Destination) -> None:
    waiting = Waiting(destination.link)
    destination.next_call().say(pb.ReconnectResponse())
    assert str(waiting.ended()) == "the destination goes on with 0 page lanes"


def test_who_finds_out_tells_all_who_use_it(destination: Destination) -> None:
    link = destination.link
    old = link.current
    link.notice(old, REFUSAL)
    assert destination.losses == []
    link.notice(old, LOSS)
    assert destination.losses == [LOSS] and destination.calls.empty()
    waiting = Waiting(link)
    destination.next_call().say(ANSWER)
    waiting.ended()
    link.notice(old, LOSS)
    assert destination.losses == [LOSS, LOSS]


def test_what_is_no_loss_is_raised_as_it_is(destination: Destination) -> None:
    link = destination.link
    assert raised(lambda: link.restore(link.current, REFUSAL)) is REFUSAL
    assert destination.calls.empty() and destination.losses == []
    link.check(link.current)


def test_who_must_not_wait_fails_at_once(destination: Destination) -> None:
    link = destination.link
    link.wait_no_longer_than(time.monotonic() - 1)
    assert raised(lambda: link.restore(link.current, LOSS)) is LOSS
    link.wait_no_longer_than(float("inf"))
    link.open(BEGINS, 0.0)
    assert raised(lambda: link.restore(link.current, LOSS)) is LOSS
    assert destination.calls.empty()


def test_the_time_that_is_allowed_ends(destination: Destination) -> None:
    link = destination.link
    link.wait_no_longer_than(time.monotonic() + 0.05)
    waiting = Waiting(link)
    call = destination.next_call()
    assert call.timeout <= 0.05
    time.sleep(0.06)
    call.say(Failed(grpc.StatusCode.DEADLINE_EXCEEDED))
    failure = waiting.ended()
    assert isinstance(failure, PeerError) and failure.reason == "UNREACHABLE"
    assert str(failure) == "cannot be reached: reset; it was not there again in time"


def test_who_waits_is_interrupted_and_so_is_who_comes(destination: Destination) -> None:
    link = destination.link
    waiting = [Waiting(link), Waiting(link)]
    call = destination.next_call()
    cancelled = KeyError("cancelled")
    link.interrupt(cancelled)
    link.interrupt(KeyError("later"))
    assert [each.ended() for each in waiting] == [cancelled] * 2 and call.cancelled
    assert raised(lambda: link.restore(link.current, LOSS)) is cancelled
    assert raised(lambda: link.check(link.current)) is cancelled
    assert destination.calls.empty()


def test_connections_that_do_not_last_gain_no_time(destination: Destination) -> None:
    link = destination.link
    link.open(BEGINS, 0.3)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        waiting = Waiting(link)
        if waiting_for := _call(destination, waiting):
            waiting_for.say(ANSWER)
        outcome = waiting.ended()
        if isinstance(outcome, PeerError):
            break
    assert isinstance(outcome, PeerError) and outcome.reason == "UNREACHABLE" and link.reconnects >= 1


def _call(destination: Destination, waiting: Waiting) -> Call | None:
    """Return the call that somebody makes, None if he is refused without."""
    while waiting.outcome is None:
        try:
            return destination.calls.get(timeout=0.01)
        except queue.Empty:
            continue
    return None
