"""Two hosts that know each other by certificates, and those that they do not let in."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import grpc
import pytest
from rig import Daemon, Rig, assert_completed, machine_toml, switchover, switchover_json
from switchover.v1 import migration_pb2, migration_pb2_grpc
from test_journey_localhost import goes_on

from common.rpc.tls import channel_credentials
from console.certs import make_certificates


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of hosts, of an operator and of a visitor; and another CA's, for the same names."""
    directory = tmp_path_factory.mktemp("certs")
    hosts = ["host1,127.0.0.1", "host2,127.0.0.1", "visiting,127.0.0.1"]
    named = [word for host in hosts for word in ("--host", host)]
    done = switchover("certs", str(directory), *named, "--operator", "ops", "--operator", "visitor")
    assert done.returncode == 0, done.stderr
    make_certificates(directory / "other", hosts, ["ops"])
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
        machine_toml(image=image, devices=("nic",)),
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

    # Not by a name that the certificate does not have; then by the command.
    result = b.migrate(f"localhost:{a.port}")
    assert (result.result, result.reason) == ("failed", "UNREACHABLE")
    assert "TLS: the daemon's certificate is for other names" in result.error
    options = ("--source", b.address, "--destination", a.address, "--tls", str(certs / "ops"), "--lane-kind", "tcp")
    document = switchover_json("migrate", *options)
    assert (document["result"], document["verified"], document["lane_kind"]) == ("completed", True, "tcp")
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

    # The record and all that is beside it are this user's alone.
    for path in (a.state_dir, *a.state_dir.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path in (a.state_dir, a.state_dir / "decisions") or path.parent.name == "run":
            assert mode == 0o700, path
        elif path.is_socket() or (path.is_file() and path.parent in (a.state_dir, a.state_dir / "decisions")):
            assert mode == 0o600, path


@pytest.mark.matrix
def test_a_source_that_is_no_operator_halts_what_it_has_brought(rig: Rig, image: Path, certs: Path) -> None:
    ops = channel_credentials(certs / "ops")
    unlogged = machine_toml(image=image, devices=("nic",), extra={"nic": 'faults = ["unlogged"]'})
    source = rig.start("source", unlogged, options=tls_options(certs, "host1"), credentials=ops)
    options = tls_options(certs, "host2", allow_operator="ops")
    destination = rig.start("destination", options=options, credentials=ops)
    goes_on(source)
    with rig.held("source.switchover") as arrived:
        session = source.begin(destination.address, verify=migration_pb2.VERIFY_MODE_DEFERRED)
        arrived()
        goes_on(source)
    result = source.follow(session)
    assert (result.result, result.reason) == ("failed", "DATA_LOSS")
    assert destination.look().machine.state == "paused"


def test_a_migration_is_ended_only_by_whoever_has_begun_it(rig: Rig, certs: Path) -> None:
    """Others who may migrate to a host may do it no harm there, though they can see the session's name."""
    ops = channel_credentials(certs / "ops")
    source = rig.start("source", machine_toml(), options=tls_options(certs, "host1"), credentials=ops)
    destination = rig.start("destination", options=tls_options(certs, "host2"), credentials=ops)
    before = goes_on(source)
    with rig.held("source.round0") as arrived:
        session = source.begin(destination.address)
        arrived()
        visiting = channel_credentials(certs / "visiting")
        with grpc.secure_channel(destination.address, visiting) as channel:
            stub = migration_pb2_grpc.MigrationServiceStub(channel)
            seen = destination.look().session_id
            for call, request in (
                (stub.Abort, migration_pb2.AbortRequest(session_id=seen)),
                (stub.Resolve, migration_pb2.ResolveRequest(session_id=seen)),
                (stub.Reconnect, migration_pb2.ReconnectRequest(session_id=seen, generation=1)),
            ):
                with pytest.raises(grpc.RpcError, match="visiting has not begun this session"):
                    call(request, timeout=20)
    assert_completed(source.follow(session))
    goes_on(destination, before)


STRANGERS = {
    "without TLS": (None, "UNREACHABLE", "if it speaks TLS, it wants --tls"),
    "of another CA": ("other/host1", "UNREACHABLE", "certificate is not trusted"),
    "not allowed": ("visiting", "NOT_ALLOWED", "127.0.0.1, visiting may not call Prepare here"),
}


@pytest.mark.matrix
@pytest.mark.parametrize("stranger", STRANGERS)
def test_no_machine_comes_from_a_stranger(rig: Rig, certs: Path, stranger: str) -> None:
    name, reason, told = STRANGERS[stranger]
    directory = certs / name if name is not None else None
    destination = rig.start(
        "destination",
        options=tls_options(certs, "host2", allow_source="host1"),
        credentials=channel_credentials(certs / "ops"),
    )
    source = rig.start(
        "source",
        machine_toml(),
        options=("--tls", str(directory)) if directory else (),
        credentials=channel_credentials(directory) if directory else None,
    )
    before = goes_on(source)
    result = source.migrate(destination.address)
    assert (result.result, result.reason) == ("failed", reason), result.error
    assert told in result.error
    assert not destination.look().HasField("machine")
    goes_on(source, before)


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


@pytest.mark.parametrize(
    "role", ["host", *(pytest.param(role, marks=pytest.mark.matrix) for role in ("source", "destination"))]
)
def test_nobody_listens_beyond_loopback_by_mistake(tmp_path: Path, role: str) -> None:
    done = switchover(role, "--listen", "0.0.0.0:0", "--state-dir", str(tmp_path / "state"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("switchover: 0.0.0.0:0 can be reached from other hosts")
    assert not (tmp_path / "state").exists()


@pytest.mark.matrix
@pytest.mark.parametrize("role", ["source", "destination", "host"])
def test_insecure_is_said_and_warned_of(rig: Rig, role: str) -> None:
    daemon = rig.start(role, listen="0.0.0.0:0", options=("--insecure",), reach="127.0.0.1")
    assert daemon.look().role == role
    assert len([line for line in daemon.log.read_text().splitlines() if "no TLS" in line]) == 1


@pytest.mark.matrix
@pytest.mark.parametrize("role", ["source", "destination"])
def test_the_modules_speak_tls_too(rig: Rig, certs: Path, role: str) -> None:
    daemon = rig.start(
        role,
        command=(sys.executable, "-m", role),
        listen="0.0.0.0:0",
        reach="127.0.0.1",
        options=tls_options(certs, "host1"),
        credentials=channel_credentials(certs / "ops"),
    )
    assert daemon.look().role == role
