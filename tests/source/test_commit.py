"""Who decides a handover: the destination by its answer, or an operator in its place, and never both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
from switchover.v1 import migration_pb2 as pb
from switchover.v1.migration_pb2_grpc import (
    MigrationServiceServicer,
    MigrationServiceStub,
    add_MigrationServiceServicer_to_server,
)

from source import commit
from source.commit import Handover, NotStartedError, UndecidedError
from source.handover import Event

State = pb.SessionState


class Destination(MigrationServiceServicer):
    """Answers with one state after the other; None: not at all before the test ends."""

    def __init__(self) -> None:
        self.states: list[State.ValueType | None] = []
        self.failure = ""
        self.calls: list[str] = []
        self.asked = threading.Semaphore(0)
        self.over = threading.Event()

    def _next(self, name: str, context: grpc.ServicerContext) -> State.ValueType:
        self.calls.append(name)
        state = self.states.pop(0)
        self.asked.release()
        if state is None:
            self.over.wait(60)
        if state is None or state == State.SESSION_STATE_UNSPECIFIED:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        return state

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:  # noqa: N802
        return pb.CommitResponse(state=self._next("Commit", context), start_us=4000)

    def Resolve(self, request: pb.ResolveRequest, context: grpc.ServicerContext) -> pb.ResolveResponse:  # noqa: N802
        return pb.ResolveResponse(state=self._next("Resolve", context))

    def GetSession(self, request: pb.GetSessionRequest, context: grpc.ServicerContext) -> pb.GetSessionResponse:  # noqa: N802
        return pb.GetSessionResponse(state=self._next("GetSession", context), failure=self.failure)


@pytest.fixture
def destination(monkeypatch: pytest.MonkeyPatch) -> Iterator[Destination]:
    monkeypatch.setattr(commit, "RETRY_SECONDS", 0.01)
    yield (its := Destination())
    its.over.set()


@pytest.fixture
def handover(destination: Destination) -> Iterator[Handover]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_MigrationServiceServicer_to_server(destination, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Handover(MigrationServiceStub(channel), "5e55", 4, lambda _: None)
    destination.over.set()
    server.stop(0).wait()


LOST = State.SESSION_STATE_UNSPECIFIED  # here: the call fails


@pytest.mark.parametrize(
    ("states", "answer", "calls"),
    [
        ([State.SESSION_STATE_RUNNING], Event.COMMITTED, ["Commit"]),
        ([State.SESSION_STATE_STARTING], Event.COMMITTED, ["Commit"]),
        ([LOST, State.SESSION_STATE_RUNNING], Event.COMMITTED, ["Commit", "Resolve"]),
        ([LOST, State.SESSION_STATE_REVOKED], Event.REVOKED, ["Commit", "Resolve"]),
        ([LOST, LOST, State.SESSION_STATE_REVOKED], Event.REVOKED, ["Commit", "Resolve", "Resolve"]),
        # What is committed and not begun may still be revoked: it is told to begin, and asked again.
        (
            [LOST, State.SESSION_STATE_COMMITTED, LOST, State.SESSION_STATE_REVOKED],
            Event.REVOKED,
            ["Commit", "Resolve", "Commit", "Resolve"],
        ),
        ([State.SESSION_STATE_COMMITTED, State.SESSION_STATE_RUNNING], Event.COMMITTED, ["Commit", "Resolve"]),
    ],
)
def test_the_destination_decides(
    destination: Destination, handover: Handover, states: list[State.ValueType | None], answer: Event, calls: list[str]
) -> None:
    destination.states = [*states]
    decided, start_ms = handover.commit()
    assert (decided, destination.calls) == (answer, calls)
    assert start_ms == (4.0 if len(calls) == 1 else 0.0)
    # Too late for anybody else.
    assert not handover.declare(Event.DECLARED_HERE)


class Asking:
    """`commit` in a thread, until it has an answer or an error."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self.answer: object = None
        self._ask = ask
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._ask()
        except (UndecidedError, NotStartedError) as error:
            self.answer = error

    def end(self) -> object:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.answer


@pytest.mark.parametrize("event", [Event.DECLARED_HERE, Event.DECLARED_THERE])
@pytest.mark.parametrize("before", [[None], [LOST, None], [LOST, State.SESSION_STATE_COMMITTED, None]])
def test_an_operator_decides_while_nobody_answers(
    destination: Destination, handover: Handover, before: list[State.ValueType | None], event: Event
) -> None:
    destination.states = [*before]

    def ask() -> Event:
        answer, _ = handover.commit()
        handover.recorded()
        return answer

    asking = Asking(ask)
    for _ in before:
        assert destination.asked.acquire(timeout=20)
    assert handover.declare(event)
    assert asking.end() is event
    assert not handover.declare(Event.DECLARED_HERE)


def test_an_operator_who_was_first_counts(destination: Destination, handover: Handover) -> None:
    """Even if nothing was asked yet: then COMMIT is not sent at all."""
    handover.recorded()
    assert handover.declare(Event.DECLARED_HERE)
    assert handover.commit() == (Event.DECLARED_HERE, 0.0)
    assert destination.calls == []


@pytest.mark.parametrize("before", [[None], [LOST, None]])
def test_a_daemon_that_ends_decides_nothing(
    destination: Destination, handover: Handover, before: list[State.ValueType | None]
) -> None:
    destination.states = [*before]
    asking = Asking(handover.commit)
    for _ in before:
        assert destination.asked.acquire(timeout=20)
    handover.end()
    assert isinstance(asking.end(), UndecidedError)
    assert not handover.declare(Event.DECLARED_HERE)


def test_a_machine_that_does_not_start_there(destination: Destination, handover: Handover) -> None:
    destination.states = [LOST, State.SESSION_STATE_STARTING, State.SESSION_STATE_RUNNING]
    handover.wait_until_started()
    destination.states = [State.SESSION_STATE_REVOKED]
    with pytest.raises(NotStartedError, match="does not know it any more"):
        handover.wait_until_started()
    destination.failure, destination.states = "nic0 has ended", [State.SESSION_STATE_STARTING]
    with pytest.raises(NotStartedError, match="could not start it: nic0 has ended"):
        handover.wait_until_started()
