from __future__ import annotations

import array
import contextlib
import errno
import gc
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ipc import channel
from common.ipc.channel import Client, ClosedError, Handler, Message, RequestError, receive, send, serve

TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def serving(pair: Pair) -> Iterator[Callable[[Mapping[str, Handler]], Client]]:
    """Serve handlers in a thread; what `serve` raises is in `failed`."""
    ours, theirs = pair
    threads: list[threading.Thread] = []

    def start(handlers: Mapping[str, Handler]) -> Client:
        thread = threading.Thread(target=serve, args=(theirs, handlers))
        thread.start()
        threads.append(thread)
        return Client(ours)

    yield start
    ours.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def raw(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<II", len(header), len(payload)) + header + payload


def open_fds() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def content(fd: int) -> bytes:
    """Read a file that came as a descriptor, and close it."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()


@given(st.dictionaries(TEXT, JSON, max_size=4), st.binary(max_size=4096))
def test_round_trip(header: dict[str, object], payload: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, header, payload)
        message = receive(theirs)
        assert message.header == header and bytes(message.payload) == payload and message.fds == []


def test_descriptors_come_with_their_message(pair: Pair, tmp_path: Path) -> None:
    """A message without any between two that have some; each gets its own."""
    ours, theirs = pair
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    with (tmp_path / "a").open() as a, (tmp_path / "b").open() as b, (tmp_path / "c").open() as c:
        send(ours, {"n": 1}, b"x" * 5000, [a.fileno(), b.fileno()])
        send(ours, {"n": 2}, b"y")
        send(ours, {"n": 3}, fds=[c.fileno()])
    messages = [receive(theirs) for _ in range(3)]
    assert [message["n"] for message in messages] == [1, 2, 3]
    assert [[content(fd) for fd in message.fds] for message in messages] == [[b"a", b"b"], [], [b"c"]]


def test_a_message_that_no_buffer_of_the_kernel_holds(pair: Pair) -> None:
    ours, theirs = pair
    payload = os.urandom(1 << 20) * 8
    header = {"big": "x" * (4 << 20)}
    sender = threading.Thread(target=send, args=(ours, header, memoryview(payload)))
    sender.start()
    message = receive(theirs)
    sender.join(10)
    assert message.header == header and message.payload == payload


@pytest.mark.parametrize(
    "sizes", [(channel.MAX_HEADER + 1, 0), (2, channel.MAX_PAYLOAD + 1), (0xFFFF_FFFF, 0xFFFF_FFFF)]
)
def test_an_oversized_message_is_refused_before_anything_is_allocated(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    def allocate(_: socket.socket, size: int) -> memoryview:
        pytest.fail(f"allocates {size} bytes")

    monkeypatch.setattr(channel, "_receive_exactly", allocate)
    ours, theirs = pair
    ours.sendall(struct.pack("<II", *sizes))
    with pytest.raises(ValueError, match=rf"{sizes[0]} \+ {sizes[1]} bytes exceeds the limit"):
        receive(theirs)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 20, 29, 32])
def test_a_truncated_message_is_the_end_of_the_connection(pair: Pair, kept: int) -> None:
    ours, theirs = pair
    message = raw(b'{"method":"x","size":1}', b"ab")
    assert kept < len(message)
    ours.sendall(message[:kept])
    ours.close()
    with pytest.raises(ClosedError):
        receive(theirs)


@pytest.mark.parametrize("header", [b"", b"{", b"\xff\xfe", b"nonsense"])
def test_garbage_is_no_message(pair: Pair, header: bytes) -> None:
    ours, theirs = pair
    ours.sendall(raw(header))
    with pytest.raises(ValueError):
        receive(theirs)


@pytest.mark.parametrize("data", [struct.pack("<II", 1 << 30, 0), raw(b"{"), raw(b"[]"), raw(b"{}", b"1234")[:-1]])
def test_descriptors_of_a_malformed_message_are_closed(pair: Pair, data: bytes) -> None:
    ours, theirs = pair
    before = open_fds()
    with open("/dev/null") as null:
        ours.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()] * 3))])
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises((ValueError, ClosedError)):
        receive(theirs)
    assert open_fds() == before


def test_sending_to_nobody(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ClosedError):
        send(ours, {})


def test_a_call_gets_what_the_handler_returns(serving: Callable[[Mapping[str, Handler]], Client]) -> None:
    def add(request: Message) -> dict[str, int]:
        return {"sum": request["a"] + request["b"]}

    def reverse(request: Message) -> Message:
        return Message({"size": len(request.payload)}, bytes(request.payload)[::-1])

    client = serving({"add": add, "reverse": reverse, "nothing": lambda _: None})
    assert client.call("add", a=2, b=3)["sum"] == 5
    reply = client.call("reverse", b"abc")
    assert reply["size"] == 3 and bytes(reply.payload) == b"cba"
    assert client.call("nothing").header == {}
    assert client.call("add", a=-2, b=2)["sum"] == 0


def test_descriptors_go_both_ways(serving: Callable[[Mapping[str, Handler]], Client], tmp_path: Path) -> None:
    (tmp_path / "asked").write_text("asked")
    (tmp_path / "answered").write_text("answered")
    answer = (tmp_path / "answered").open()
    seen: list[bytes] = []

    def swap(request: Message) -> Message:
        seen.extend(content(fd) for fd in request.fds)
        return Message(fds=[answer.fileno()])

    client = serving({"swap": swap})
    with (tmp_path / "asked").open() as asked, answer:
        reply = client.call("swap", fds=[asked.fileno()])
    assert seen == [b"asked"] and [content(fd) for fd in reply.fds] == [b"answered"]


def refuse(_: Message) -> None:
    raise RequestError("EBUSY", "a migration runs")


def fail(_: Message) -> None:
    raise FileNotFoundError(errno.ENOENT, "no such thing")


def fail_oddly(_: Message) -> None:
    raise OSError("something with the disk")


@pytest.mark.parametrize(
    ("method", "reason", "message"),
    [
        ("refuse", "EBUSY", "a migration runs"),
        ("fail", "ENOENT", "[Errno 2] no such thing"),
        ("fail_oddly", "EIO", "something with the disk"),
        ("unheard_of", "ENOSYS", "no such request: unheard_of"),
    ],
)
def test_refusals_come_back_and_the_connection_goes_on(
    serving: Callable[[Mapping[str, Handler]], Client], method: str, reason: str, message: str
) -> None:
    client = serving({"refuse": refuse, "fail": fail, "fail_oddly": fail_oddly, "ping": lambda _: {"pong": 1}})
    with pytest.raises(RequestError) as refused:
        client.call(method)
    assert (refused.value.reason, str(refused.value)) == (reason, message)
    assert client.call("ping")["pong"] == 1


def test_a_defect_is_told_to_the_asker_and_raised_here(pair: Pair) -> None:
    ours, theirs = pair
    send(ours, {"method": "broken", "params": {}})
    with pytest.raises(ZeroDivisionError):
        serve(theirs, {"broken": lambda _: {"x": 1 // 0}})
    error = receive(ours)["error"]
    assert error["reason"] == "INTERNAL" and error["message"].startswith("broken: ZeroDivisionError: ")
    assert "Traceback" not in error["message"]


def test_callers_take_turns(serving: Callable[[Mapping[str, Handler]], Client]) -> None:
    """Each gets its own answer, however many ask at once. Without the turns answers are mixed up, or torn."""
    served: list[int] = []

    def echo(request: Message) -> Message:
        served.append(request["n"])
        return Message({"n": request["n"]}, request.payload)

    client = serving({"echo": echo})
    wrong: list[int] = []

    def ask(first: int) -> None:
        for n in range(first, first + 25):
            payload = bytes([n % 256]) * (20_000 + n)
            reply = client.call("echo", payload, n=n)
            if reply["n"] != n or reply.payload != payload:
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(start * 1000,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and len(served) == 150


def test_a_call_that_waits_ends_when_the_other_side_goes(pair: Pair) -> None:
    ours, theirs = pair
    ours.settimeout(None)
    client = Client(ours)
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            client.call("wait")
        except ClosedError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert receive(theirs)["method"] == "wait"
    theirs.close()
    thread.join(10)
    assert len(ended) == 1


def test_a_peer_that_goes_ends_the_service(pair: Pair) -> None:
    ours, theirs = pair
    ours.close()
    serve(theirs, {})


def test_connects_by_path(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(FileNotFoundError):
        Client.connect(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = Client.connect(path, timeout=10)
        accepted, _ = listener.accept()
        with accepted:
            thread = threading.Thread(target=serve, args=(accepted, {"ping": lambda _: {"pong": os.getpid()}}))
            thread.start()
            assert client.call("ping")["pong"] == os.getpid() and client.fileno() > 0
            client.close()
            thread.join(10)
            assert not thread.is_alive()


def test_a_client_that_nobody_answers_gives_up(pair: Pair) -> None:
    ours, _ = pair
    ours.settimeout(0.01)
    with pytest.raises(TimeoutError):
        Client(ours).call("ping")


def test_a_late_answer_is_nobodys(pair: Pair) -> None:
    """After a timeout the connection is of no use: the next call must not get the answer of the last one."""
    ours, theirs = pair
    ours.settimeout(0.01)
    client = Client(ours)
    with pytest.raises(TimeoutError):
        client.call("first")
    with contextlib.suppress(ClosedError):
        send(theirs, {"result": {"of": "first"}})
    with pytest.raises(ClosedError, match="closed here"):
        client.call("second")


def test_a_call_that_waits_ends_when_it_is_closed_here(pair: Pair) -> None:
    ours, theirs = pair
    ours.settimeout(None)
    client = Client(ours)
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            client.call("wait")
        except OSError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert receive(theirs)["method"] == "wait"
    client.close()
    thread.join(10)
    assert not thread.is_alive() and [type(error) for error in ended] == [ClosedError]
    with pytest.raises(ClosedError):
        client.call("again")


@pytest.mark.parametrize("header", [b"[]", b"1", b"null", b'"x"'])
def test_a_header_is_an_object(pair: Pair, header: bytes) -> None:
    ours, theirs = pair
    ours.sendall(raw(header))
    with pytest.raises(ValueError, match="not an object"):
        receive(theirs)


def test_more_descriptors_than_a_message_takes_are_refused_before_it_is_sent(pair: Pair) -> None:
    ours, theirs = pair
    with pytest.raises(ValueError, match="254 descriptors"):
        send(ours, {}, fds=[0] * 254)
    send(ours, {"n": 1})
    assert receive(theirs)["n"] == 1


def test_a_header_is_json_on_the_wire(pair: Pair) -> None:
    """The format is a contract between processes that may be of two versions."""
    ours, theirs = pair
    send(ours, {"method": "x", "params": {"n": 1}}, b"pq")
    data = theirs.recv(1000)
    assert struct.unpack_from("<II", data) == (len(data) - 10, 2)
    assert json.loads(data[8:-2]) == {"method": "x", "params": {"n": 1}} and data[-2:] == b"pq"
