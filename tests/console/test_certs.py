from __future__ import annotations

import ipaddress
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.rpc.tls import channel_credentials, server_credentials
from console import cli
from console.certs import make_certificates
from console.errors import CommandError

ALL = {"ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"}


def certs(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["switchover", "certs", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_command_makes_what_tls_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = tmp_path / "certs"
    assert certs(monkeypatch, str(made), "--host", "host1,10.0.0.1", "--host", "::1", "--operator", "anna") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "::1" not in line] == [
        str(made / n) for n in ("host1", "anna", "ca")
    ]
    assert {path.name for path in made.iterdir()} == {"host1", "::1", "anna", "ca"}
    assert {path.name for path in (made / "host1").iterdir()} == ALL
    assert {path.name for path in (made / "anna").iterdir()} == {name for name in ALL if "server" not in name}
    for host in ("host1", "::1"):
        server_credentials(made / host)
        channel_credentials(made / host)
    channel_credentials(made / "anna")


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certs", ["host1"], ["anna"])
    paths = [tmp_path / "certs", *(tmp_path / "certs").rglob("*")]
    assert len([path for path in paths if path.name.endswith("-key.pem")]) == 4
    for path in paths:
        expected = 0o700 if path.is_dir() else 0o600 if path.name.endswith("-key.pem") else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_what_certificates_say(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["host1.example.org,host1,10.0.0.1"], ["anna"])
    directory = tmp_path / "host1.example.org"
    authority = certificate(tmp_path / "ca/ca-cert.pem")
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    for side, usage in (("server", ExtendedKeyUsageOID.SERVER_AUTH), ("client", ExtendedKeyUsageOID.CLIENT_AUTH)):
        made = certificate(directory / f"{side}-cert.pem")
        made.verify_directly_issued_by(authority)
        assert [name.value for name in made.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [
            "host1.example.org"
        ]
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["host1.example.org", "host1"]
        assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.1")]
        assert list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        now = datetime.now(UTC)
        assert made.not_valid_before_utc < now - timedelta(minutes=50)
        assert timedelta(days=360) < made.not_valid_after_utc - now < timedelta(days=366)
    assert len({certificate(path).serial_number for path in tmp_path.rglob("*-cert.pem") if "ca" not in path.name}) == 3


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize(("side", "purpose"), [("server", "sslserver"), ("client", "sslclient")])
def test_openssl_accepts_them(tmp_path: Path, side: str, purpose: str) -> None:
    make_certificates(tmp_path, ["host1,10.0.0.1"], [])
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca/ca-cert.pem"]
    names = ["-verify_hostname", "host1", "-verify_ip", "10.0.0.1"]
    done = subprocess.run(
        [*command, *names, f"host1/{side}-cert.pem"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    other = [*command, "-verify_hostname", "host2", f"host1/{side}-cert.pem"]
    assert subprocess.run(other, cwd=tmp_path, capture_output=True, check=False).returncode != 0


def test_a_later_run_adds_to_the_same_ca_and_overwrites_nothing(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["host1"], [])
    before = tree(tmp_path)
    for hosts, operators in ((["host1"], []), (["host2", "host1"], []), (["host2"], ["host1"])):
        with pytest.raises(CommandError, match="host1 exists already; nothing was made"):
            make_certificates(tmp_path, hosts, operators)
        assert tree(tmp_path) == before
    make_certificates(tmp_path, ["host2"], ["anna"])
    after = tree(tmp_path)
    assert before.items() < after.items()
    assert after["host2/ca-cert.pem"] == before["ca/ca-cert.pem"]
    server_credentials(tmp_path / "host2")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "name a --host or an --operator"),
        (("--host", "a/b"), '"a/b" cannot be the name of a certificate'),
        (("--host", "a,"), '"" cannot be the name of a certificate'),
        (("--host", ".."), '".." cannot be'),
        (("--operator", "x" * 65), "cannot be the name"),
        (("--operator", "ca"), 'a name of its own, which is not "ca"'),
        (("--host", "a", "--operator", "a"), "a name of its own"),
        (("--host", "a", "--host", "a,b"), "a name of its own"),
    ],
)
def test_wrong_names_make_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    problem: str,
) -> None:
    assert certs(monkeypatch, str(tmp_path / "certs"), *arguments) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert not (tmp_path / "certs").exists()


def test_a_ca_that_is_spoilt_is_not_used(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["host1"], [])
    shutil.copy(tmp_path / "host1/server-key.pem", tmp_path / "ca/ca-key.pem")
    with pytest.raises(CommandError, match=r"ca-key.pem is not the key of ca-cert.pem"):
        make_certificates(tmp_path, ["host2"], [])
    (tmp_path / "ca/ca-key.pem").write_text("x")
    with pytest.raises(CommandError, match="holds no CA of ours"):
        make_certificates(tmp_path, ["host2"], [])
    assert not (tmp_path / "host2").exists()
