"""A private CA for a trial: certificates for hosts and operators, each set in a directory that `--tls` takes.

The CA stays in `ca/`, so that a later run adds to what is there. Whoever has its key can make anybody's certificate.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import rmtree

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from console.errors import CommandError
from console.exit_codes import ExitCode

__all__ = ["CA", "make_certificates"]

CA = "ca"
CA_VALID = timedelta(days=5 * 365)
VALID = timedelta(days=365)
BACKDATED = timedelta(hours=1)  # hosts' clocks differ

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")  # 64: the most that a common name takes


def make_certificates(directory: Path, hosts: Sequence[str], operators: Sequence[str]) -> list[Path]:
    """Make a directory for each host ("NAME" or "NAME,NAME,…", DNS names and IP addresses) and each operator.

    Return them, hosts first. Nothing is made if anything of it exists already: CommandError.
    """
    wanted = {names[0]: names for names in (host.split(",") for host in hosts)}
    for name in (*operators, *(name for names in wanted.values() for name in names)):
        if not (_is_ip(name) or _NAME.fullmatch(name)):
            raise CommandError(f'"{name}" cannot be the name of a certificate', ExitCode.USAGE)
    made = [*wanted, *operators]
    if len({CA, *made}) != 1 + len(hosts) + len(operators):
        raise CommandError(f'every host and operator needs a name of its own, which is not "{CA}"', ExitCode.USAGE)
    for name in made:
        if (directory / name).exists():
            raise CommandError(f"{directory / name} exists already; nothing was made", ExitCode.USAGE)
    authority = _Authority.load(directory / CA) if (directory / CA).exists() else _Authority.make(directory / CA)
    for name, names in wanted.items():
        server = authority.issue(name, ExtendedKeyUsageOID.SERVER_AUTH, names)
        client = authority.issue(name, ExtendedKeyUsageOID.CLIENT_AUTH, names)
        _write(directory / name, {**authority.public, **_files("server", *server), **_files("client", *client)})
    for name in operators:
        client = authority.issue(name, ExtendedKeyUsageOID.CLIENT_AUTH, ())
        _write(directory / name, {**authority.public, **_files("client", *client)})
    return [directory / name for name in made]


class _Authority:
    """A CA: its certificate and its key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key
        self.public = {"ca-cert.pem": certificate.public_bytes(Encoding.PEM)}

    @classmethod
    def make(cls, directory: Path) -> _Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Switchover trial CA")])
        builder = _builder(name, name, key.public_key(), key.public_key(), CA_VALID, certifies=True)
        certificate = builder.sign(key, hashes.SHA256())
        _write(directory, _files("ca", certificate, key))
        return cls(certificate, key)

    @classmethod
    def load(cls, directory: Path) -> _Authority:
        try:
            certificate = x509.load_pem_x509_certificate((directory / "ca-cert.pem").read_bytes())
            key = load_pem_private_key((directory / "ca-key.pem").read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise CommandError(f"{directory} holds no CA of ours: {error}", ExitCode.USAGE) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise CommandError(f"{directory}: ca-key.pem is not the key of ca-cert.pem", ExitCode.USAGE)
        return cls(certificate, key)

    def issue(
        self, name: str, usage: x509.ObjectIdentifier, names: Sequence[str]
    ) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """Return a new certificate and its key; `names` are its subject alternative names."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer_key = self._key.public_key()
        builder = _builder(subject, self._certificate.subject, key.public_key(), issuer_key, VALID, certifies=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            alternatives = [
                x509.IPAddress(ipaddress.ip_address(other)) if _is_ip(other) else x509.DNSName(other) for other in names
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self._key, hashes.SHA256()), key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    valid: timedelta,
    *,
    certifies: bool,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=not certifies,
        key_cert_sign=certifies,
        crl_sign=certifies,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + valid)
        .add_extension(x509.BasicConstraints(ca=certifies, path_length=0 if certifies else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _files(side: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> dict[str, bytes]:
    return {
        f"{side}-cert.pem": certificate.public_bytes(Encoding.PEM),
        f"{side}-key.pem": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make a directory with these files, all of it or nothing."""
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = directory.with_name(f".{directory.name}.new")
    rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    for name, content in files.items():
        path = unfinished / name
        path.touch(mode=0o600 if name.endswith("-key.pem") else 0o644)
        path.write_bytes(content)
    unfinished.rename(directory)


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
