"""A stream across connections: what comes again is what was not applied, under its number, and nothing else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import pytest
from switchover.v1 import migration_pb2 as pb

from common.rpc.errors import PeerError
from source import reconnect
from source.reconnect import Connection, Link
from source.resuming import MAX_KEPT, ResumingStream

SECONDS = 10.0
Acks = list[int]


class Lost(grpc.RpcError):
    """What gRPC raises when a connection is gone."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "reset"


class Call:
    """The stream of one connection, in place of gRPC's: takes what comes, and acknowledges what it is told to."""

    def __init__(self, requests: Iterator[pb.SendDeviceStateRequest]) -> None:
        self.received: queue.Queue[tuple[int, bytes]] = queue.Queue()
        self._answers: queue.Queue[pb.SendDeviceStateResponse | Exception] = queue.Queue()
        threading.Thread(target=self._take, args=(requests,), daemon=True).start()

    def _take(self, requests: Iterator[pb.SendDeviceStateRequest]) -> None:
        for request in requests:
            self.received.put((request.sequence, request.data))

    def __iter__(self) -> Iterator[pb.SendDeviceStateResponse]:
        while True:
            answer = self._answers.get()
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def ack(self, sequence: int) -> None:
        self._answers.put(pb.SendDeviceStateResponse(applied_sequence=sequence))

    def cancel(self) -> None:
        self._answers.put(Lost())

    lose = cancel

    def take(self, count: int) -> list[tuple[int, bytes]]:
        return [self.received.get(timeout=SECONDS) for _ in range(count)]


class Destination:
    """All connections, and what the destination says when it is asked where to go on."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.generations: list[int] = []
        self.applied = 0
        self.acked: list[int] = []
        self.broken_at_once = 0
        self.Reconnect = self
        link = Link(cast("Any", self), "5e55", lambda _: None, lambda _: None)
        link.open(pb.ReconnectResponse(), 30.0)
        self.link = link
        self.stream: ResumingStream[pb.SendDeviceStateRequest, pb.SendDeviceStateResponse] = ResumingStream(
            link, self.open, lambda begins: begins.devices["nic0"], lambda ack: self.acked.append(ack.applied_sequence)
        )

    def open(self, requests: Iterator[pb.SendDeviceStateRequest], connection: Connection) -> Call:
        self.generations.append(connection.generation)
        call = Call(requests)
        self.calls.append(call)
        if len(self.calls) > 1 and self.broken_at_once:
            self.broken_at_once -= 1
            call.lose()
        return call

    def future(self, request: pb.ReconnectRequest, **_: Any) -> Any:
        answer = pb.ReconnectResponse(devices={"nic0": pb.SendDeviceStateResponse(applied_sequence=self.applied)})

        class Answered:
            def result(self) -> pb.ReconnectResponse:
                return answer

            def cancel(self) -> None:
                pass

        return Answered()

    def send(self, count: int) -> None:
        for _ in range(count):
            number = self.stream.next_sequence()
            self.stream.send(pb.SendDeviceStateRequest(sequence=number, data=bytes([number])))


@pytest.fixture
def destination(monkeypatch: pytest.MonkeyPatch) -> Iterator[Destination]:
    monkeypatch.setattr(reconnect, "RETRY_SECONDS", 0.0)
    made = Destination()
    yield made
    made.link.interrupt(KeyError("the test has ended"))
    made.stream.close(abort=True)


def numbered(first: int, last: int) -> list[tuple[int, bytes]]:
    return [(number, bytes([number])) for number in range(first, last + 1)]


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_what_was_not_applied_is_sent_again_and_nothing_else(destination: Destination) -> None:
    destination.send(3)
    (first,) = destination.calls
    assert first.take(3) == numbered(1, 3)
    first.ack(1)
    destination.applied = 2
    first.lose()
    draining = in_background(destination.stream.drain)
    _until(lambda: len(destination.calls) == 2)
    second = destination.calls[1]
    assert second.take(1) == numbered(3, 3)
    second.ack(3)
    draining.join(SECONDS)
    assert not draining.is_alive()
    destination.send(1)
    assert second.take(1) == numbered(4, 4) and second.received.empty()
    assert destination.generations == [0, 1]
    # That the second was applied is told like an ack.
    assert destination.acked == [1, 2, 3]


def test_a_loss_that_is_noticed_by_sending(destination: Destination) -> None:
    destination.send(1)
    destination.calls[0].lose()
    destination.stream._stream._acks.join(SECONDS)
    destination.send(1)
    assert destination.calls[1].take(2) == numbered(1, 2)
    assert destination.stream.sequence == 2


def test_connections_that_break_at_once_lose_nothing(destination: Destination) -> None:
    destination.broken_at_once = 3
    destination.send(5)
    destination.applied = 4
    destination.calls[0].lose()
    draining = in_background(destination.stream.drain)
    _until(lambda: len(destination.calls) == 5)
    assert destination.calls[4].take(1) == numbered(5, 5)
    destination.calls[4].ack(5)
    draining.join(SECONDS)
    assert not draining.is_alive() and destination.generations == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("applied", [1, 4])
def test_a_destination_that_has_applied_what_cannot_be(destination: Destination, applied: int) -> None:
    destination.send(3)
    destination.calls[0].ack(2)
    _until(lambda: destination.acked == [2])
    destination.applied = applied
    destination.calls[0].lose()
    with pytest.raises(ConnectionError, match=f"goes on behind {applied} of 3"):
        destination.stream.drain()


def test_only_so_much_is_kept(destination: Destination) -> None:
    sending = in_background(lambda: destination.send(MAX_KEPT + 2))
    destination.calls[0].take(MAX_KEPT + 1)
    sending.join(0.05)
    assert sending.is_alive() and destination.calls[0].received.empty()
    destination.calls[0].ack(2)
    sending.join(SECONDS)
    assert not sending.is_alive() and len(destination.stream._kept) == MAX_KEPT


def test_what_ends_the_migration_ends_the_stream(destination: Destination) -> None:
    destination.send(1)
    destination.link.interrupt(KeyError("cancelled"))
    destination.calls[0].lose()
    with pytest.raises(KeyError):
        destination.stream.drain()


def test_a_network_that_is_not_waited_for_is_the_streams_failure(destination: Destination) -> None:
    destination.link.wait_no_longer_than(0.0)
    destination.send(1)
    destination.calls[0].lose()
    for call in (destination.stream.drain, destination.stream.check):
        with pytest.raises(PeerError, match="cannot be reached: reset"):
            call()


def _until(condition: Callable[[], bool]) -> None:
    ended = threading.Event()
    for _ in range(int(SECONDS / 0.005)):
        if condition():
            return
        ended.wait(0.005)
    raise AssertionError("it never happens")
