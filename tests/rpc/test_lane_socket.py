"""The socket of a page lane: many pieces over a real connection that takes little at a time, with and without TLS."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.memory.pages import MAX_PIECES
from common.rpc.lane_socket import LaneSocket
from common.rpc.tls import client_context, server_context
from console.certs import make_certificates

SECONDS = 10.0
PIECE = 4096
Pair = tuple[LaneSocket, LaneSocket]


@pytest.fixture(params=["plain", "TLS"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """The source's end and the destination's."""
    contexts: list[ssl.SSLContext | None] = [None, None]
    if request.param == "TLS":
        make_certificates(tmp_path, ["host1,localhost", "host2"], ["ops"])
        contexts = [client_context(tmp_path / "host2"), server_context(tmp_path / "host1")]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sockets = [socket.create_connection(listener.getsockname())]
        sockets.append(listener.accept()[0])
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    sockets[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    ends = [
        LaneSocket(each, context, name)
        for each, context, name in zip(sockets, contexts, ("localhost", None), strict=True)
    ]
    welcome = threading.Thread(target=ends[1].begin, args=(SECONDS,))
    welcome.start()
    ends[0].begin(SECONDS)
    welcome.join()
    yield ends
    for end in ends:
        end.close()


def send(pair: Pair, parts: list[memoryview], then: Callable[[], object] = lambda: None) -> threading.Thread:
    def run() -> None:
        pair[0].send(parts)
        then()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("pieces", [1, 64, 65, MAX_PIECES])
def test_a_header_and_as_many_pieces_as_there_may_be_arrive_in_their_places(pair: Pair, pieces: int) -> None:
    sent = [memoryview(bytes([number % 251 + 1]) * PIECE) for number in range(pieces)]
    thread = send(pair, [memoryview(b"header"), *sent])
    header = bytearray(6)
    ram = memoryview(bytearray(2 * PIECE * pieces))
    pair[1].receive([memoryview(header)])
    pair[1].receive([ram[2 * PIECE * number :][:PIECE] for number in range(pieces)])
    thread.join()
    assert bytes(header) == b"header"
    for number, piece in enumerate(sent):
        begin = 2 * PIECE * number
        assert ram[begin : begin + PIECE] == piece and not any(ram[begin + PIECE : begin + 2 * PIECE])


def test_what_ends_in_the_middle_of_a_piece_is_a_connection_that_is_lost(pair: Pair) -> None:
    thread = send(pair, [memoryview(bytes(PIECE))] * 3, pair[0].shutdown)
    ram = memoryview(bytearray(b"\x01" * 5 * PIECE))
    with pytest.raises(OSError):
        pair[1].receive([ram[PIECE * number :][:PIECE] for number in range(5)])
    thread.join()
    assert not any(ram[: 3 * PIECE]) and ram[3 * PIECE :] == b"\x01" * 2 * PIECE
