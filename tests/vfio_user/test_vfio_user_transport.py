"""A connection on which both sides ask, and peers that break it."""

import contextlib
import errno
import fcntl
import os
import queue
import socket
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from common.vfio_user.codec import FLAG_REPLY, HEADER_SIZE, Header
from common.vfio_user.transport import Connection, ConnectionLostError, Message

LIMIT = 8 << 20
Answer = Callable[[Connection, Message], None]


def echo(connection: Connection, command: Message) -> None:
    connection.reply(command, [command.body])


class Side:
    """A connection with a thread that answers its commands."""

    def __init__(self, sock: socket.socket, answer: Answer, timeout: float | None = None) -> None:
        self.connection = Connection(sock, limit=LIMIT, timeout=timeout)
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while (command := self.connection.next_command()) is not None:
                self._answer(self.connection, command)
                command.close_fds()
        except ConnectionLostError:
            pass
        finally:
            self.connection.shutdown()

    def close(self) -> None:
        self.connection.shutdown()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.connection.close()


@contextmanager
def two_sides(first: Answer = echo, second: Answer = echo) -> Iterator[tuple[Connection, Connection]]:
    left, right = socket.socketpair()
    sides = Side(left, first), Side(right, second)
    try:
        yield sides[0].connection, sides[1].connection
    finally:
        for side in sides:
            side.close()


@contextmanager
def one_side(answer: Answer = echo, timeout: float | None = None) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and its peer as a bare socket."""
    ours, peer = socket.socketpair()
    side = Side(ours, answer, timeout)
    peer.settimeout(10)
    try:
        yield side.connection, peer
    finally:
        side.close()
        peer.close()


def in_threads(*calls: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again in the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "the two sides wait for each other"
    if errors:
        raise errors[0]


def test_replies_go_to_whoever_asked() -> None:
    with two_sides() as (left, right):

        def ask(connection: Connection, name: str) -> Callable[[], None]:
            def run() -> None:
                for number in range(150):
                    body = f"{name} {number}".encode() * (number % 7 + 1)
                    assert connection.request(9, [body]).body == body

            return run

        in_threads(ask(left, "a"), ask(left, "b"), ask(right, "c"), ask(right, "d"))


def test_a_reply_may_wait_for_a_command_of_the_other_side() -> None:
    def ask_back(connection: Connection, command: Message) -> None:
        asked = connection.request(11, [b"what?"])
        connection.reply(command, [asked.body, command.body])

    def answer(connection: Connection, command: Message) -> None:
        connection.reply(command, [b"that: "])

    with two_sides(answer, ask_back) as (left, _):
        for _ in range(20):
            assert bytes(left.request(9, [b"x"]).body) == b"that: x"


def test_two_sides_that_send_more_than_the_sockets_hold() -> None:
    with two_sides() as (left, right):
        big = os.urandom(3 << 20)

        def ask(connection: Connection) -> Callable[[], None]:
            def run() -> None:
                for _ in range(4):
                    assert connection.request(9, [big[:5], big[5:]]).body == big

            return run

        in_threads(ask(left), ask(right), ask(left), ask(right))


def test_commands_keep_their_order() -> None:
    seen: list[bytes] = []

    def note(connection: Connection, command: Message) -> None:
        seen.append(bytes(command.body))
        connection.reply(command)

    with one_side(note) as (connection, peer):
        # Half of them are read by who asks, the rest by who answers.
        asking = threading.Thread(target=lambda: connection.request(11, [b"?"]))
        asking.start()
        peer.recv(17)
        sent = [b"%d" % number for number in range(200)]
        for body in sent[:100]:
            peer.sendall(Header(1, 9, 16 + len(body)).pack() + body)
        peer.sendall(Header(1, 11, 16, 1).pack())
        for body in sent[100:]:
            peer.sendall(Header(1, 9, 16 + len(body)).pack() + body)
        asking.join(10)
        received = 0
        while received < 200 * 16:
            received += len(peer.recv(1 << 16))
        assert seen == sent


def test_descriptors_arrive_and_do_not_leak_into_children() -> None:
    def pass_back(connection: Connection, command: Message) -> None:
        connection.reply(command, [b"%d" % len(command.fds)], command.fds)

    with two_sides(second=pass_back) as (left, _):
        ours = [os.eventfd(number) for number in range(5)]
        reply = left.request(2, [b"body"], ours)
        assert bytes(reply.body) == b"5"
        assert [os.eventfd_read(fd) for fd in reply.fds[1:]] == [1, 2, 3, 4]
        assert not any(os.get_inheritable(fd) for fd in reply.fds)
        reply.close_fds()
        for fd in ours:
            os.close(fd)


def test_descriptors_that_nobody_expects_are_dropped_by_the_kernel() -> None:
    ours, peer = socket.socketpair()
    connection = Connection(ours, limit=LIMIT, timeout=10, commands_bring_fds=False)

    def answer(*fds: int) -> None:
        number = Header.unpack(memoryview(peer.recv(HEADER_SIZE)), LIMIT).message_id
        socket.send_fds(peer, [Header(number, 9, HEADER_SIZE + 1, FLAG_REPLY).pack() + b"y"], fds)

    before = len(os.listdir("/proc/self/fd"))
    for keep, kept in ((False, 0), (True, 2), (False, 0)):
        server = threading.Thread(target=answer, args=(0, 0))
        server.start()
        reply = connection.request(9, keep_fds=keep)
        server.join()
        assert len(reply.fds) == kept and bytes(reply.body) == b"y"
        reply.close_fds()
        assert len(os.listdir("/proc/self/fd")) == before
    connection.close()
    peer.close()


def test_a_descriptor_that_is_none_leaves_the_connection_as_it_was() -> None:
    with two_sides() as (left, _):
        with pytest.raises(OSError) as caught:
            left.request(2, [b"x"], [9999])
        assert caught.value.errno == errno.EBADF
        assert left.request(9, [b"y"]).body == b"y"


def test_a_message_in_pieces() -> None:
    with one_side() as (_, peer):
        message = Header(7, 9, 16 + 40).pack() + bytes(range(40))
        for at in range(len(message)):
            peer.send(message[at : at + 1])
            while int.from_bytes(fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)), "little"):
                pass  # until it has been read
        reply = b""
        while len(reply) < 56:
            reply += peer.recv(100)
        assert reply == Header(7, 9, 56, 1).pack() + bytes(range(40))


def test_commands_without_reply_get_none() -> None:
    def refuse(connection: Connection, command: Message) -> None:
        connection.reply(command, error=errno.EPERM)

    with one_side(refuse) as (_, peer):
        peer.sendall(Header(1, 9, 16, 0x10).pack() + Header(2, 9, 16).pack())
        assert peer.recv(100) == Header(2, 9, 16, 0x21, errno.EPERM).pack()


@pytest.mark.parametrize("error", [0, 5000])
def test_a_refusal_without_errno_counts_as_einval(error: int) -> None:
    assert Message(Header(1, 9, 16, 0x21, error), b"").error == errno.EINVAL
    assert Message(Header(1, 9, 16, 0x21, errno.ENOENT), b"").error == errno.ENOENT
    assert Message(Header(1, 9, 16, 0x01, error), b"").error == 0


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("<HHIII", 1, 9, 15, 1, 0),
        struct.pack("<HHIII", 1, 9, LIMIT + 1, 1, 0),
        struct.pack("<HHIII", 1, 9, 16, 3, 0),
        struct.pack("<HHIII", 2, 9, 16, 1, 0),
        struct.pack("<HHIII", 1, 8, 16, 1, 0),
        struct.pack("<HHIII", 1, 9, 20, 1, 0) + b"ab",
        b"abc",
        b"",
    ],
)
def test_a_peer_that_talks_nonsense_loses_the_connection(sent: bytes) -> None:
    with one_side() as (connection, peer):

        def answer() -> None:
            peer.recv(100)
            peer.sendall(sent)
            peer.shutdown(socket.SHUT_WR)

        def ask() -> None:
            with pytest.raises(ConnectionLostError) as caught:
                connection.request(9)
            assert caught.value.errno == errno.ENOTCONN
            with pytest.raises(ConnectionLostError):
                connection.request(9)

        in_threads(answer, ask)
        assert connection.closed.is_set()


def test_a_reply_that_nobody_asked_for_ends_the_connection() -> None:
    with one_side() as (connection, peer):
        peer.sendall(Header(1, 9, 16, 1).pack())
        assert peer.recv(1) == b""
        assert connection.closed.wait(10)


def test_a_peer_that_goes_is_noticed_without_a_request() -> None:
    with one_side() as (connection, peer):
        peer.close()
        assert connection.closed.wait(10)


def test_a_peer_that_does_not_answer() -> None:
    with one_side(timeout=0.05) as (connection, peer):
        with pytest.raises(ConnectionLostError, match=r"0\.05 seconds"):
            connection.request(9)
        assert connection.closed.is_set()
        assert len(peer.recv(100)) == 16


def test_a_peer_that_does_not_read() -> None:
    with one_side(timeout=0.05) as (connection, _), pytest.raises(ConnectionLostError, match="taken within"):
        connection.request(9, [bytes(4 << 20)])


def test_a_peer_that_does_not_read_the_reply() -> None:
    """Whoever answers holds the right to send, and would hold it for ever."""
    failed: queue.Queue[str] = queue.Queue()

    def answer(connection: Connection, command: Message) -> None:
        try:
            connection.reply(command, [bytes(4 << 20)])
        except ConnectionLostError as error:
            failed.put(str(error.strerror))

    with one_side(answer, timeout=0.05) as (connection, peer):
        peer.sendall(Header(1, 9, 16).pack())
        assert "taken within" in failed.get(timeout=10)
        with pytest.raises(ConnectionLostError):
            connection.request(9)


def test_a_peer_that_answers_in_drops() -> None:
    """The time limit is for the whole reply, not for each of its bytes."""
    over = threading.Event()
    with one_side(timeout=0.2) as (connection, peer):

        def drip() -> None:
            for byte in Header(1, 9, 16 + 200, 1).pack() + bytes(199):
                if over.wait(0.05):
                    break
                with contextlib.suppress(OSError):
                    peer.sendall(bytes([byte]))

        def ask() -> None:
            with pytest.raises(ConnectionLostError, match="no reply within"):
                connection.request(9)
            over.set()

        in_threads(drip, ask)


def test_a_peer_that_floods_whoever_asks() -> None:
    blocked = threading.Event()

    def wait(connection: Connection, command: Message) -> None:
        blocked.wait(10)

    with one_side(wait) as (connection, peer):

        def flood() -> None:
            peer.recv(100)
            message = Header(1, 9, 16 + (1 << 20), 0x10).pack() + bytes(1 << 20)
            with pytest.raises(OSError):  # noqa: PT012 - how many it takes is not the point
                for _ in range(100):
                    peer.sendall(message)

        def ask() -> None:
            with pytest.raises(ConnectionLostError, match="too many"):
                connection.request(11)
            blocked.set()

        in_threads(flood, ask)


def test_closing_ends_a_request_of_another_thread() -> None:
    with one_side() as (connection, peer):

        def close() -> None:
            peer.recv(100)
            connection.shutdown("closed here")

        def ask() -> None:
            with pytest.raises(ConnectionLostError, match="closed here"):
                connection.request(9)

        in_threads(close, ask)


def test_nothing_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with one_side() as (connection, peer):
        socket.send_fds(peer, [Header(1, 9, 20).pack()], [0, 0])
        socket.send_fds(peer, [b"ab"], [])
        assert not connection.closed.is_set()
    assert len(os.listdir("/proc/self/fd")) == before
