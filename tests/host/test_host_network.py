from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from common.host.network import Network, Security
from common.rpc.access import Access
from common.rpc.tls import TlsError
from console.certs import make_certificates


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that knows some names."""
    known = {"here": ["127.0.0.1", "::1"], "both": ["127.0.0.1", "192.0.2.7"], "there": ["192.0.2.7"]}
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        return [entry for address in known.get(host, [host]) for entry in resolve(address, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.9.1:7700", "[::1]:0", "localhost:7700", "here:7700"])
def test_loopback_needs_no_tls(listen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Network(listen).secure() == Security()
    assert Network(listen, insecure=True).secure() == Security()
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.7:7700", "0:7700", "there:7700", "both:7700"])
def test_beyond_loopback_tls_or_a_word_is_needed(listen: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TlsError, match="can be reached from other hosts") as raised:
        Network(listen).secure()
    assert str(raised.value).startswith(listen) and "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")
    assert Network(listen, insecure=True).secure() == Security()
    printed = capsys.readouterr()
    warning = printed.out + printed.err
    assert "no TLS" in warning and listen in warning and warning.count("\n") == 1


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match="cannot listen on nowhere:1: Name or service not known"):
        Network("nowhere:1").secure()


def test_tls_opens_every_address(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["host1"], ["ops"])
    access = Access(operators=frozenset({"ops"}))
    security = Network("0.0.0.0:0", tmp_path / "host1", access=access).secure()
    assert security.server is not None and security.channel is not None and security.access is access


def test_words_that_contradict_each_other(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["host1"], [])
    with pytest.raises(TlsError, match="--tls and --insecure contradict"):
        Network("127.0.0.1:0", tmp_path / "host1", insecure=True).secure()
    for access in (Access(sources=frozenset({"a"})), Access(operators=frozenset())):
        with pytest.raises(TlsError, match="names of certificates: give --tls"):
            Network("127.0.0.1:0", access=access).secure()


@pytest.mark.parametrize(
    ("listen", "host"), [("127.0.0.1:7700", "127.0.0.1"), ("[::1]:0", "::1"), ("host1:1", "host1")]
)
def test_page_lanes_are_listened_for_where_the_daemon_is(listen: str, host: str) -> None:
    assert Network(listen, lane_port=7701).lane_listen == (host, 7701)
