"""TLS with real certificates and real servers: what is refused before use, at the handshake, and by name."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Self, cast

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from switchover.v1 import host_pb2, host_pb2_grpc, migration_pb2

from common.host.host import Host
from common.host.service import HostServicer
from common.rpc.access import ANYBODY, Access, caller, is_allowed
from common.rpc.channel import open_bulk_channel, open_channel
from common.rpc.errors import PeerError, peer_error
from common.rpc.server import Server
from common.rpc.tls import TlsError, channel_credentials, server_credentials
from console import certs
from console.certs import make_certificates
from destination import service as arrivals
from destination.service import MigrationServicer

HOST = "switchover.v1.HostService"
MIGRATION = "switchover.v1.MigrationService"
NAMES = ("localhost", "127.0.0.1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory, [f"host1,{','.join(NAMES)}", "host2"], ["ops"])
    make_certificates(directory / "other", ["host1,localhost,127.0.0.1"], ["ops"])
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "host1", tmp_path / "tls"))


class Anybody(HostServicer):
    """Answers, and notes who has asked."""

    def __init__(self) -> None:
        super().__init__(cast("Host", None))
        self.names: set[str] = set()

    def Pause(self, request: host_pb2.PauseRequest, context: grpc.ServicerContext) -> host_pb2.PauseResponse:  # noqa: N802
        self.names = set(caller(context))
        return host_pb2.PauseResponse()


class Served:
    """A server with all services, as a host has them."""

    def __init__(self, credentials: grpc.ServerCredentials | None, access: Access = ANYBODY) -> None:
        self.servicer = Anybody()

        def register(server: grpc.Server) -> None:
            host_pb2_grpc.add_HostServiceServicer_to_server(self.servicer, server)
            arrivals.register(MigrationServicer(cast("Host", None)), server)

        self.server = Server("127.0.0.1:0", register, [HOST, MIGRATION], credentials, access)
        self.address = self.server.address

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(0)


@pytest.fixture(scope="module")
def served(made: Path) -> Iterator[Served]:
    with Served(server_credentials(made / "host1")) as server:
        yield server


def pause(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    with open_channel(address, credentials) as channel:
        host_pb2_grpc.HostServiceStub(channel).Pause(host_pb2.PauseRequest(), timeout=10)


def failure(address: str, credentials: grpc.ChannelCredentials | None) -> PeerError:
    with pytest.raises(grpc.RpcError) as raised:
        pause(address, credentials)
    return peer_error(raised.value)


def pem(*path: Path) -> list[bytes]:
    return [part.read_bytes() for part in path]


# The directory.


def replaced(name: str, by: Callable[[Path], Path]) -> Callable[[Path, Path], None]:
    return lambda tls, made: cast("None", shutil.copy(by(made), tls / name))


def with_passphrase(tls: Path, _: Path) -> None:
    path = tls / "server-key.pem"
    key = load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda tls, _: (tls / "server-cert.pem").unlink(), "server-cert.pem: No such file or directory"),
    "no CA": (lambda tls, _: (tls / "ca-cert.pem").unlink(), "ca-cert.pem: No such file or directory"),
    "a directory": (
        lambda tls, _: ((tls / "server-key.pem").unlink(), (tls / "server-key.pem").mkdir()),
        "server-key.pem: Is a directory",
    ),
    "empty": (lambda tls, _: (tls / "ca-cert.pem").write_text(""), "ca-cert.pem: not a certificate in PEM"),
    "nonsense": (lambda tls, _: (tls / "server-key.pem").write_text("x"), "server-key.pem: not a private key in PEM"),
    "passphrase": (with_passphrase, "server-key.pem: has a passphrase"),
    "another key": (replaced("server-key.pem", lambda made: made / "host2/server-key.pem"), "not the key of"),
    "another CA": (replaced("ca-cert.pem", lambda made: made / "other/ca/ca-cert.pem"), "not issued by the CA of"),
    "the client's": (
        replaced("server-cert.pem", lambda made: made / "host1/client-cert.pem"),
        "not a certificate for a server",
    ),
    "read by all": (
        lambda tls, _: (tls / "server-key.pem").chmod(0o604),
        "others than its owner may use it: chmod 600",
    ),
    "read by a group": (lambda tls, _: (tls / "server-key.pem").chmod(0o640), "others than its owner may use it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_directory_is_one_line(made: Path, copy: Path, case: str) -> None:
    server_credentials(copy)  # it was right
    spoil, complaint = BROKEN[case]
    spoil(copy, made)
    with pytest.raises(TlsError) as raised:
        server_credentials(copy)
    text = str(raised.value)
    assert complaint in text and str(copy) in text and "\n" not in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(copy: Path) -> None:
    (copy / "ca-cert.pem").chmod(0)
    with pytest.raises(TlsError, match=r"ca-cert.pem: Permission denied"):
        channel_credentials(copy)


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match="nothing: not a directory"):
        channel_credentials(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("backdated", "valid", "complaint"),
    [
        (timedelta(hours=2), timedelta(hours=-1), r"client-cert.pem: expired on "),
        (timedelta(hours=-1), timedelta(hours=2), r"ca-cert.pem: not valid before "),
    ],
)
def test_a_certificate_has_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backdated: timedelta, valid: timedelta, complaint: str
) -> None:
    monkeypatch.setattr(certs, "BACKDATED", backdated)
    monkeypatch.setattr(certs, "VALID", valid)
    make_certificates(tmp_path, [], ["ops"])
    with pytest.raises(TlsError, match=complaint):
        channel_credentials(tmp_path / "ops")


def test_an_operator_calls_and_does_not_serve(made: Path) -> None:
    channel_credentials(made / "ops")
    with pytest.raises(TlsError, match=r"server-cert.pem: No such file"):
        server_credentials(made / "ops")


# The handshake.


@pytest.mark.parametrize("host", NAMES)
def test_both_sides_know_each_other(served: Served, made: Path, host: str) -> None:
    port = served.address.rpartition(":")[2]
    pause(f"{host}:{port}", channel_credentials(made / "host1"))
    assert served.servicer.names == {"host1", *NAMES}
    pause(f"{host}:{port}", channel_credentials(made / "ops"))
    assert served.servicer.names == {"ops"}


def test_bulk_streams_are_encrypted_too(served: Served, made: Path) -> None:
    with open_bulk_channel(served.address, channel_credentials(made / "ops")) as channel:
        host_pb2_grpc.HostServiceStub(channel).Pause(host_pb2.PauseRequest(), timeout=10)
    assert served.servicer.names == {"ops"}
    with open_bulk_channel(served.address) as channel, pytest.raises(grpc.RpcError):
        host_pb2_grpc.HostServiceStub(channel).Pause(host_pb2.PauseRequest(), timeout=10)


HANGS_UP = "cannot be reached: it hangs up at once; if it speaks TLS, it wants --tls with a certificate of its CA"


def test_a_caller_without_a_certificate_of_the_ca_does_not_get_in(served: Served, made: Path) -> None:
    """The CA alone, a certificate of another CA, and one that is not for a client."""
    authority = (made / "ca/ca-cert.pem").read_bytes()
    strangers = {
        "plain": None,
        "no certificate": grpc.ssl_channel_credentials(authority),
        "another CA": grpc.ssl_channel_credentials(
            authority, *pem(made / "other/ops/client-key.pem", made / "other/ops/client-cert.pem")
        ),
        "a server's": grpc.ssl_channel_credentials(
            authority, *pem(made / "host1/server-key.pem", made / "host1/server-cert.pem")
        ),
    }
    served.servicer.names = {"nobody"}
    for stranger, credentials in strangers.items():
        error = failure(served.address, credentials)
        assert (stranger, error.reason, str(error)) == (stranger, "UNREACHABLE", HANGS_UP)
    assert served.servicer.names == {"nobody"}


def test_a_daemon_of_another_ca_is_not_trusted(served: Served, made: Path) -> None:
    error = failure(served.address, channel_credentials(made / "other/ops"))
    assert error.reason == "UNREACHABLE"
    assert str(error).startswith("cannot be reached: TLS: the daemon's certificate is not trusted: unable to get ")


def test_a_daemon_that_is_another_host_is_not_trusted(made: Path) -> None:
    with Served(server_credentials(made / "host2")) as server:
        error = failure(server.address, channel_credentials(made / "ops"))
    assert error.reason == "UNREACHABLE"
    assert str(error) == "cannot be reached: TLS: the daemon's certificate is for other names than that of this address"


def test_a_daemon_without_tls(made: Path) -> None:
    with Served(None) as server:
        error = failure(server.address, channel_credentials(made / "ops"))
    assert (error.reason, str(error)) == ("UNREACHABLE", "cannot be reached: TLS: the daemon speaks no TLS")


def test_nobody_there_is_no_matter_of_tls(made: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = failure(f"127.0.0.1:{unused.getsockname()[1]}", channel_credentials(made / "ops"))
    assert error.reason == "UNREACHABLE" and "TLS" not in str(error)


# Names.

OPERATORS = Access(operators=frozenset({"ops", "host9"}))
SOURCES = Access(sources=frozenset({"host1"}))
BOTH = Access(sources=frozenset({"host1"}), operators=frozenset({"ops"}))


@pytest.mark.parametrize(
    ("call", "names", "access", "allowed"),
    [
        (f"/{MIGRATION}/Prepare", {"host7"}, ANYBODY, True),
        (f"/{MIGRATION}/Prepare", set(), ANYBODY, True),
        (f"/{MIGRATION}/Prepare", {"host7"}, SOURCES, False),
        (f"/{MIGRATION}/Prepare", {"host1", "127.0.0.1"}, SOURCES, True),
        (f"/{MIGRATION}/Prepare", {"host7"}, OPERATORS, True),
        (f"/{MIGRATION}/Prepare", {"ops"}, BOTH, False),
        (f"/{MIGRATION}/Halt", {"host7"}, OPERATORS, True),  # what a source has brought it may halt
        (f"/{MIGRATION}/Halt", {"ops"}, BOTH, False),
        (f"/{HOST}/Migrate", {"host7"}, OPERATORS, False),
        (f"/{HOST}/Migrate", set(), OPERATORS, False),
        (f"/{HOST}/Migrate", {"host9"}, OPERATORS, True),
        (f"/{HOST}/Migrate", {"host7"}, SOURCES, True),
        (f"/{HOST}/StopMachine", {"host1"}, BOTH, False),
        (f"/{HOST}/GetMachine", {"host7"}, BOTH, True),
        (f"/{HOST}/WatchEvents", {"host7"}, BOTH, True),
        (f"/{HOST}/Pause", {"host1"}, BOTH, False),
        (f"/{HOST}/Pause", {"host1"}, OPERATORS, False),
        (f"/{HOST}/Resume", {"host1"}, BOTH, False),
        (f"/{HOST}/SomethingNew", {"host7"}, OPERATORS, False),
        ("/grpc.health.v1.Health/Check", {"host7"}, BOTH, True),
    ],
)
def test_who_may_call_what(call: str, names: set[str], access: Access, allowed: bool) -> None:
    assert is_allowed(call, names, access) is allowed


def every_call() -> list[str]:
    files = (host_pb2.DESCRIPTOR, migration_pb2.DESCRIPTOR)
    services = [service for file in files for service in file.services_by_name.values()]
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]


def test_every_call_is_refused_to_those_who_are_not_named(made: Path) -> None:
    nobody = Access(sources=frozenset({"x"}), operators=frozenset({"x"}))
    refused = set()
    with (
        Served(server_credentials(made / "host1"), nobody) as server,
        open_channel(server.address, channel_credentials(made / "host2")) as channel,
    ):
        for method in every_call():
            if method in (f"/{HOST}/GetMachine", f"/{HOST}/WatchEvents"):
                continue
            with pytest.raises(grpc.RpcError) as raised:
                list(channel.stream_stream(method)(iter([b""]), timeout=10))
            error = peer_error(raised.value)
            assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED")
            assert str(error) == f"host2 may not call {method.rpartition('/')[2]} here"
            refused.add(method)
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert len(refused) > 15
