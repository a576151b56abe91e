"""How a daemon is on the network: with TLS, on loopback only, or open to everybody because its operator says so."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from common.rpc.access import ANYBODY, Access
from common.rpc.tls import TlsError, channel_credentials, client_context, server_context, server_credentials

__all__ = ["Network", "Security"]

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Security:
    """What a daemon serves and calls others with; None: without TLS."""

    server: grpc.ServerCredentials | None = None
    channel: grpc.ChannelCredentials | None = None
    access: Access = ANYBODY
    lane_server: ssl.SSLContext | None = None
    lane_client: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """The operator's word on it: a directory as `common.rpc.tls` reads, and whose certificates may do what.

    `metrics` is where Prometheus may ask, None: nowhere.
    `lane_port` is for page lanes of the kind tcp, on the host of `listen`; 0: any.
    """

    listen: str
    tls: Path | None = None
    insecure: bool = False
    access: Access = ANYBODY
    metrics: str | None = None
    lane_port: int = 0

    @property
    def lane_listen(self) -> tuple[str, int]:
        """Where page lanes of the kind tcp are listened for: host and port."""
        return self.listen.rpartition(":")[0].strip("[]"), self.lane_port

    def secure(self) -> Security:
        """Return credentials and rules; raise TlsError if files are wrong, or if anybody could reach the port."""
        if self.tls is not None:
            if self.insecure:
                raise TlsError("--tls and --insecure contradict each other")
            return Security(
                server_credentials(self.tls),
                channel_credentials(self.tls),
                self.access,
                server_context(self.tls),
                client_context(self.tls),
            )
        if self.access != ANYBODY:
            raise TlsError("--allow-source and --allow-operator are names of certificates: give --tls DIRECTORY too")
        if self.metrics is not None and _is_reached_by_others(self.metrics) and not self.insecure:
            raise TlsError(f"{self.metrics} can be reached from other hosts: give --tls DIRECTORY, or say --insecure")
        if _is_reached_by_others(self.listen):
            if not self.insecure:
                raise TlsError(
                    f"{self.listen} can be reached from other hosts, and whoever does can move and stop machines: "
                    "give --tls DIRECTORY (switchover certs makes one), or say --insecure"
                )
            _log.warning("no TLS: whoever reaches the port can move and stop machines", listen=self.listen)
        return Security()


def _is_reached_by_others(listen: str) -> bool:
    """Return whether HOST:PORT is beyond loopback; OSError if there is no such host."""
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise OSError(f"cannot listen on {listen}: {error.strerror}") from error
    return not all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)
