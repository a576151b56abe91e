"""Two hosts that know each other by certificates, and those that they do not let in."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from rig import Daemon, Rig, assert_completed, machine_toml, switchover, switchover_json
from switchover.v1 import migration_pb2
from test_journey_localhost import ALL, goes_on

from common.rpc.tls import channel_credentials


@pytest.fixture
def certs(rig: Rig) -> Path:
    """Certificates of two hosts, of an operator and a visitor; and another CA's, of hosts with the same names."""
    directory = rig.directory / "certs"
    hosts = ("--host", "host1,127.0.0.1", "--host", "host2,127.0.0.1,localhost")
    for made in (directory, directory / "other"):
        done = switchover("certs", str(made), *hosts, "--operator", "ops", "--operator", "visitor")
        assert done.returncode == 0, done.stderr
    return directory


def tls_options(certs: Path, name: str, **options: str) -> tuple[str, ...]:
    allowed = (word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value))
    return ("--tls", str(certs / name), *allowed)


@pytest.fixture
def hosts(rig: Rig, image: Path, certs: Path) -> tuple[Daemon, Daemon]:
    """Each takes machines of the other one only, and orders of the operator only."""
    ops = channel_credentials(certs / "ops")
    a = rig.start(
        "host",
        machine_toml(image=image, devices=ALL),
        options=tls_options(certs, "host1", allow_source="host2", allow_operator="ops"),
        credentials=ops,
    )
    b = rig.start(
        "host", options=tls_options(certs, "host2", allow_source="host1", allow_operator="ops"), credentials=ops
    )
    return a, b


def test_there_and_back_and_who_is_not_let_in(rig: Rig, certs: Path, hosts: tuple[Daemon, Daemon]) -> None:
    a, b = hosts
    counters = goes_on(a)
    assert_completed(a.migrate(b.address))
    counters = goes_on(b, counters)

    # Back by the command, to another name of the same host that its certificate does not have, and to one that it has.
    back = ("migrate", "--source", b.address, "--tls", str(certs / "ops"), "--json", "--destination")
    refused = switchover(*back, f"localhost:{a.port}")
    assert refused.returncode == 1
    assert "TLS: the daemon's certificate is for other names" in refused.stdout
    document = switchover_json(*back[:-2], "--destination", a.address)
    assert (document["result"], document["verified"]) == ("completed", True)
    counters = goes_on(a, counters)

    # Operators: none, another CA's, one of ours who is not allowed; each is told in a line.
    for options, code, told in (
        ((), 6, "if it speaks TLS, it wants --tls"),
        (("--tls", str(certs / "other/ops")), 6, "TLS: the daemon's certificate is not trusted"),
        (("--tls", str(certs / "visitor")), 1, "visitor may not call Pause here [NOT_ALLOWED]"),
    ):
        done = switchover("pause", a.address, *options)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
        assert told in done.stderr
    # Who may not change may look.
    status = switchover_json("status", a.address, "--tls", str(certs / "visitor"))
    assert status["machine"]["state"] == "running"

    # Hosts: one without TLS, one of another CA, one that is not allowed to send machines to b.
    for name, options, reason, told in (
        ("plain", (), "UNREACHABLE", "if it speaks TLS, it wants --tls"),
        ("other", tls_options(certs / "other", "host1"), "UNREACHABLE", "certificate is not trusted"),
        ("host2", tls_options(certs, "host2"), "NOT_ALLOWED", "may not call Prepare here"),
    ):
        credentials = channel_credentials(Path(options[1])) if options else None
        stranger = rig.start("source", machine_toml(name), options=options, credentials=credentials)
        result = stranger.migrate(b.address)
        assert (name, result.result, result.reason) == (name, "failed", reason), result.error
        assert told in result.error
    assert not b.look().HasField("machine")

    # The record and all that is beside it are this user's alone.
    for path in (a.state_dir, *a.state_dir.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path in (a.state_dir, a.state_dir / "decisions") or path.parent.name == "run":
            assert mode == 0o700, path
        elif path.is_socket() or (path.is_file() and path.parent in (a.state_dir, a.state_dir / "decisions")):
            assert mode == 0o600, path


@pytest.mark.matrix
def test_a_source_may_pause_what_it_has_brought(rig: Rig, image: Path, certs: Path) -> None:
    """Memory that differs is found while the machine runs already: the source pauses it there, and is no operator."""
    ops = channel_credentials(certs / "ops")
    machine = machine_toml(image=image, devices=("nic",), extra={"nic": 'faults = ["unlogged"]'})
    source = rig.start("source", machine, options=tls_options(certs, "host1"), credentials=ops)
    allowed = tls_options(certs, "host2", allow_source="host1", allow_operator="ops")
    destination = rig.start("destination", options=allowed, credentials=ops)
    goes_on(source)
    with rig.held("source.switchover") as arrived:
        session = source.begin(destination.address, verify=migration_pb2.VERIFY_MODE_DEFERRED)
        arrived()
        goes_on(source)
    assert source.follow(session).reason == "DATA_LOSS"
    assert destination.look().machine.state == "paused"


@pytest.mark.parametrize("role", ["source", "destination", "host"])
def test_nobody_listens_beyond_loopback_by_mistake(rig: Rig, role: str) -> None:
    state = rig.directory / "state"
    done = switchover(role, "--listen", "0.0.0.0:0", "--state-dir", str(state))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("switchover: 0.0.0.0:0 can be reached from other hosts")
    assert not state.exists()
    daemon = rig.start(role, listen="0.0.0.0:0", options=("--insecure",), reach="127.0.0.1")
    assert daemon.look().role == role
    warnings = [line for line in daemon.log.read_text().splitlines() if "no TLS" in line]
    assert len(warnings) == 1
