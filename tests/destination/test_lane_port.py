"""Strangers at the port for page lanes: without a token that is unused nobody gets a byte, or stays."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.rpc.lane_frame import HELLO_SIZE, pack_hello
from common.rpc.lane_socket import LaneSocket
from common.rpc.tls import client_context, server_context
from console.certs import make_certificates
from destination import lane_port
from destination.lane_port import LanePort

SECONDS = 10.0  # after which a test has hung


class Opened:
    """A port whose lanes echo one byte, and then wait until they are ended."""

    def __init__(self, lanes: int, context: ssl.SSLContext | None) -> None:
        self.served: queue.Queue[tuple[int, int]] = queue.Queue()
        self.port = LanePort("127.0.0.1", 0, context, lanes, self.serve)

    def serve(self, generation: int, lane: int, connection: LaneSocket) -> None:
        self.served.put((generation, lane))
        connection.send([connection.receive_some(1)])
        connection.receive_some(1)

    def connect(self, hello: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port.port), SECONDS)
        connection.sendall(hello)
        return connection

    def gets_in(self, hello: bytes) -> bool:
        """Return whether a hello opens a lane."""
        with self.connect(hello) as connection:
            return is_served(connection)


def is_served(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
        return connection.recv(100) == b"x"
    except ConnectionError:
        return False


def stays_open(connection: socket.socket, data: bytes) -> bool:
    """Send something; return whether the other side lets us wait for an answer."""
    try:
        connection.sendall(data)
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


@pytest.fixture
def opened() -> Iterator[Callable[..., Opened]]:
    made: list[Opened] = []

    def start(lanes: int = 1, context: ssl.SSLContext | None = None) -> Opened:
        made.append(Opened(lanes, context))
        return made[-1]

    yield start
    for item in made:
        item.port.close()
    # One that has let go of its connection may have a moment to live.
    for thread in threading.enumerate():
        if thread.name.startswith("lane"):
            thread.join(20)
            assert not thread.is_alive(), thread.name


def test_each_token_opens_its_lane(opened: Callable[..., Opened]) -> None:
    port = opened(3)
    for lane in (2, 0, 1):
        assert port.gets_in(pack_hello(port.port.tokens[lane]))
        assert port.served.get_nowait() == (0, lane)


def test_a_token_is_good_for_once(opened: Callable[..., Opened]) -> None:
    port = opened(2)
    hello = pack_hello(port.port.tokens[0])
    assert port.gets_in(hello) and not port.gets_in(hello)
    assert port.served.qsize() == 1


def test_a_new_generation_has_tokens_of_its_own(opened: Callable[..., Opened]) -> None:
    port = opened(2)
    old = port.port.tokens
    assert port.gets_in(pack_hello(old[0])) and port.served.get_nowait() == (0, 0)
    new = port.port.renew(3)
    assert not port.gets_in(pack_hello(old[1]))
    for lane, token in enumerate(new):
        assert port.gets_in(pack_hello(token)) and port.served.get_nowait() == (3, lane)


@pytest.mark.parametrize(
    "hello",
    [
        pack_hello(bytes(32)),
        b"SWPL\x02\0\0\0" + bytes(32),
        b"GET / HTTP/1.1\r\nHost: switchover\r\n\r\n".ljust(HELLO_SIZE),
        b"\x16\x03\x01" * 100,
    ],
)
def test_who_has_no_token_gets_nothing(opened: Callable[..., Opened], hello: bytes) -> None:
    port = opened()
    with port.connect(hello) as connection:
        try:
            said = connection.recv(100)
        except ConnectionError:
            said = b""
    assert said == b"" and port.served.empty()
    assert port.gets_in(pack_hello(port.port.tokens[0]))


def test_who_says_nothing_is_sent_away(opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_port, "HELLO_SECONDS", 0.1)
    port = opened()
    with port.connect() as silent, port.connect(pack_hello(bytes(32))[:-1]) as slow:
        assert silent.recv(1) == b"" and slow.recv(1) == b""
    assert port.served.empty()


def test_a_byte_now_and_then_gains_no_time(opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_port, "HELLO_SECONDS", 0.3)
    port = opened()
    hello = pack_hello(port.port.tokens[0])
    with port.connect() as slow:
        slow.settimeout(0.1)
        # Each byte comes in time, all of them would take 4 s.
        sent = next(count for count in range(1, HELLO_SIZE + 1) if not stays_open(slow, hello[count - 1 : count]))
    assert sent < HELLO_SIZE and port.served.empty()


def test_those_who_dawdle_keep_nobody_out(opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_port, "MAX_STRANGERS", 3)
    port = opened(2)
    crowd = [port.connect() for _ in range(10)]
    assert port.gets_in(pack_hello(port.port.tokens[0]))
    # All but the last of them were sent away for those who came later.
    for connection in crowd[:7]:
        assert connection.recv(1) == b""
    with port.port._lock:
        assert len(port.port._strangers) <= 3
    for connection in crowd:
        connection.close()


def test_nobody_is_left_when_it_is_closed(opened: Callable[..., Opened]) -> None:
    port = opened(2)
    stranger, lane = port.connect(), port.connect(pack_hello(port.port.tokens[0]))
    assert is_served(lane)
    port.port.close()
    assert stranger.recv(1) == b"" and lane.recv(1) == b""
    with pytest.raises(ConnectionError):
        port.connect(pack_hello(port.port.tokens[1]))
    stranger.close()
    lane.close()


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lane-certs")
    make_certificates(directory, ["host1,127.0.0.1", "host2,elsewhere"], [])
    make_certificates(directory / "other", ["host1,127.0.0.1"], [])
    return directory


def test_with_tls_a_token_is_shown_to_the_right_host_only(opened: Callable[..., Opened], certs: Path) -> None:
    port = opened(context=server_context(certs / "host1"))
    hello = pack_hello(port.port.tokens[0])
    connection = LaneSocket(port.connect(), client_context(certs / "host1"), "127.0.0.1")
    connection.begin(SECONDS, send=hello)
    connection.send([b"x"])
    assert connection.receive_some(10) == b"x"
    connection.close()


@pytest.mark.parametrize("theirs", ["host2", "other/host1"])
def test_another_host_is_not_told_the_token(opened: Callable[..., Opened], certs: Path, theirs: str) -> None:
    port = opened(context=server_context(certs / theirs))
    connection = LaneSocket(port.connect(), client_context(certs / "host1"), "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        connection.begin(SECONDS, send=pack_hello(port.port.tokens[0]))
    connection.close()
    assert port.served.empty()


def test_with_tls_a_token_without_a_certificate_of_the_ca_opens_nothing(
    opened: Callable[..., Opened], certs: Path
) -> None:
    port = opened(context=server_context(certs / "host1"))
    hello = pack_hello(port.port.tokens[0])
    assert not port.gets_in(hello)
    for certificate in (None, certs / "other" / "host1"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if certificate is not None:
            context.load_cert_chain(certificate / "client-cert.pem", certificate / "client-key.pem")
        with context.wrap_socket(port.connect()) as connection:
            assert not stays_open(connection, hello)
    assert port.served.empty()
