"""Two hosts: network namespaces on a veth pair, the destination with clocks of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from rig import Rig, assert_completed, machine_toml, wait_for
from switchover.v1 import host_pb2, migration_pb2
from test_journey_localhost import goes_on


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def can_make_hosts() -> str | None:
    """Return why two hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "needs ip and unshare"
    try:
        run("unshare", "-T", "--monotonic", "1000", "true")
        name = f"sw{os.getpid()}"
        run("ip", "netns", "add", name)
        run("ip", "netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"needs network and time namespaces: {error.stderr.decode().strip()}"
    return None


REASON = can_make_hosts()


@pytest.fixture
def hosts() -> Iterator[tuple[str, str, str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2 to each other, 10.77.1.2 and 10.77.2.2 to us.

    And the link between them, by its name in the first.
    """
    tag = uuid.uuid4().hex[:6]
    a, b = f"swa{tag}", f"swb{tag}"
    try:
        for number, name in enumerate((a, b), 1):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            ours, theirs = f"vo{number}{tag}", f"vt{number}{tag}"
            run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
            run("ip", "addr", "add", f"10.77.{number}.1/24", "dev", ours)
            run("ip", "link", "set", ours, "up")
            run("ip", "-n", name, "addr", "add", f"10.77.{number}.2/24", "dev", theirs)
            run("ip", "-n", name, "link", "set", theirs, "up")
        run("ip", "link", "add", f"va{tag}", "netns", a, "type", "veth", "peer", "name", f"vb{tag}", "netns", b)
        for name, link, address in ((a, f"va{tag}", "10.77.0.1/24"), (b, f"vb{tag}", "10.77.0.2/24")):
            run("ip", "-n", name, "addr", "add", address, "dev", link)
            run("ip", "-n", name, "link", "set", link, "up")
        yield a, b, f"va{tag}"
    finally:
        for name in (a, b):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_between_two_hosts_with_different_clocks(rig: Rig, image: Path, hosts: tuple[str, str, str]) -> None:
    a, b, _ = hosts
    source = rig.start(
        "source",
        machine_toml(image=image, devices=("nic", "accelerator")),
        listen="0.0.0.0:0",
        options=("--insecure",),
        prefix=("ip", "netns", "exec", a),
        reach="10.77.1.2",
    )
    destination = rig.start(
        "destination",
        listen="0.0.0.0:0",
        options=("--insecure",),
        prefix=("ip", "netns", "exec", b, "unshare", "-T", "--monotonic", "100000"),
        reach="10.77.2.2",
    )
    before = goes_on(source)
    result = source.migrate(f"10.77.0.2:{destination.port}")
    assert_completed(result)
    # The clocks differ by a day and more; the guest's gap is that of its stop.
    assert 0 < result.guest_gap_ms < 20_000
    assert result.guest_gap_error_ms < 100
    goes_on(destination, before)


@pytest.mark.matrix
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("lane_kind", [migration_pb2.LANE_KIND_GRPC, migration_pb2.LANE_KIND_TCP])
def test_the_link_goes_down_and_comes_back(
    rig: Rig, image: Path, hosts: tuple[str, str, str], lane_kind: migration_pb2.LaneKind.ValueType
) -> None:
    a, b, link = hosts
    machine = machine_toml(image=image, devices=("nic", "accelerator"))
    options: dict[str, Any] = {"listen": "0.0.0.0:0", "options": ("--insecure",)}
    source = rig.start("source", machine, prefix=("ip", "netns", "exec", a), reach="10.77.1.2", **options)
    destination = rig.start("destination", prefix=("ip", "netns", "exec", b), reach="10.77.2.2", **options)
    before = goes_on(source)
    address = f"10.77.0.2:{destination.port}"
    session = source.begin(
        address,
        lane_kind=lane_kind,
        bandwidth_limit=10e6,
        max_rounds=3,
        on_timeout=host_pb2.ON_TIMEOUT_SWITCH_OVER,
        reconnect_s=60,
    )
    assert source.tells(session, lambda event: event.progress.sent_bytes > 4 << 20)
    run("ip", "-n", a, "link", "set", link, "down")
    assert source.tells(session, lambda event: event.progress.disconnected_ms > 0)
    run("ip", "-n", a, "link", "set", link, "up")
    result = source.follow(session)
    assert_completed(result)
    assert result.reconnects >= 1
    goes_on(destination, before)


def test_health_and_reflection(rig: Rig) -> None:
    daemon = rig.start("host")
    health = health_pb2_grpc.HealthStub(daemon.channel)
    for service in ("", "switchover.v1.HostService", "switchover.v1.MigrationService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(daemon.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"switchover.v1.HostService", "switchover.v1.MigrationService"} <= set(database.get_services())
        service = DescriptorPool(database).FindServiceByName("switchover.v1.MigrationService")
        assert "SendPages" in service.methods_by_name
    wait_for(lambda: daemon.look().role == "host", "it does not answer")
