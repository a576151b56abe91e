"""TLS with certificates on both sides, from a directory of PEM files.

======================================== ============================================================
``ca-cert.pem``                          whose certificates are trusted, of either side
``server-cert.pem``, ``server-key.pem``  who this daemon is to those that call it
``client-cert.pem``, ``client-key.pem``  who this process is to the daemons that it calls
======================================== ============================================================

A certificate may be followed by the intermediate ones that lead to the CA. Keys have no passphrase, and are their
owner's alone to read. All of it is checked before a port is opened or a call is made, for what gRPC itself says of a
file that is wrong comes late, and names no file.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509 import Certificate, ExtendedKeyUsage, ExtensionNotFound, load_pem_x509_certificates
from cryptography.x509.oid import ExtendedKeyUsageOID

__all__ = [
    "CA_CERTIFICATE",
    "SERVER_CERTIFICATE",
    "SERVER_KEY",
    "TlsError",
    "channel_credentials",
    "client_context",
    "server_context",
    "server_credentials",
]

CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY = "ca-cert.pem", "server-cert.pem", "server-key.pem"

_USAGES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


class TlsError(Exception):
    """A file of the directory cannot be used; one line that names it."""


def server_credentials(directory: Path) -> grpc.ServerCredentials:
    """Return what a daemon serves with; callers must show a certificate of the CA. TlsError says what is wrong."""
    authorities = _authorities(directory)
    key, chain = _identity(directory, "server", authorities)
    return grpc.ssl_server_credentials([(key, chain)], root_certificates=_pem(authorities), require_client_auth=True)


def channel_credentials(directory: Path) -> grpc.ChannelCredentials:
    """Return what to call daemons with: the CA vouches for them, a certificate for us. TlsError says what is wrong."""
    authorities = _authorities(directory)
    key, chain = _identity(directory, "client", authorities)
    return grpc.ssl_channel_credentials(_pem(authorities), key, chain)


def server_context(directory: Path) -> ssl.SSLContext:
    """Return the same as `server_credentials`, for sockets."""
    context = _context(directory, "server")
    context.num_tickets = 0  # nobody comes back with one
    return context


def client_context(directory: Path) -> ssl.SSLContext:
    """Return the same as `channel_credentials`, for sockets."""
    return _context(directory, "client")


def _context(directory: Path, side: str) -> ssl.SSLContext:
    authorities = _authorities(directory)
    _identity(directory, side, authorities)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=_pem(authorities).decode())
    context.load_cert_chain(directory / f"{side}-cert.pem", directory / f"{side}-key.pem")
    return context


def _authorities(directory: Path) -> list[Certificate]:
    if not directory.is_dir():
        raise TlsError(f"{directory}: not a directory; it should hold ca-cert.pem and others (switchover certs)")
    path = directory / CA_CERTIFICATE
    authorities = _certificates(path)
    for certificate in authorities:
        _check_dates(path, certificate)
    return authorities


def _identity(directory: Path, side: str, authorities: list[Certificate]) -> tuple[bytes, bytes]:
    """Return key and certificates of a side ("server", "client") as PEM."""
    path = directory / f"{side}-cert.pem"
    key_path = directory / f"{side}-key.pem"
    chain = _certificates(path)
    for certificate in chain:
        _check_dates(path, certificate)
    _check_usage(path, chain[0], side)
    for certificate, issuers in zip(chain, [*([issuer] for issuer in chain[1:]), authorities], strict=True):
        if not any(_issued(certificate, issuer) for issuer in issuers):
            raise TlsError(f"{path}: not issued by the CA of {directory / 'ca-cert.pem'}")
    pem = _read(key_path)
    if key_path.stat().st_mode & 0o077:
        raise TlsError(f"{key_path}: others than its owner may use it: chmod 600 {key_path}")
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise TlsError(f"{key_path}: has a passphrase, which a daemon cannot be asked for") from None
    except (ValueError, UnsupportedAlgorithm):
        raise TlsError(f"{key_path}: not a private key in PEM") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != chain[0].public_key().public_bytes(*form):
        raise TlsError(f"{key_path}: not the key of {path}")
    return pem, _pem(chain)


def _certificates(path: Path) -> list[Certificate]:
    try:
        return load_pem_x509_certificates(_read(path))
    except ValueError:
        raise TlsError(f"{path}: not a certificate in PEM") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{path}: {error.strerror}") from error


def _check_dates(path: Path, certificate: Certificate) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise TlsError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if now < certificate.not_valid_before_utc:
        raise TlsError(f"{path}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")


def _check_usage(path: Path, certificate: Certificate, side: str) -> None:
    try:
        usages = certificate.extensions.get_extension_for_class(ExtendedKeyUsage).value
    except ExtensionNotFound:
        return  # for anything
    if _USAGES[side] not in usages:
        raise TlsError(f"{path}: not a certificate for a {side}")


def _issued(certificate: Certificate, issuer: Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):  # another name, another kind of key, another key
        return False
    return True


def _pem(certificates: list[Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
