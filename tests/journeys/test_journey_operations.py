"""What an operator's tools get to see: logs, metrics, exit codes."""

from __future__ import annotations

import json
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from rig import Daemon, Rig, assert_completed, machine_toml, wait_for
from switchover.v1 import host_pb2
from test_journey_localhost import goes_on

from common.rpc.errors import peer_error

JSON = ("--log-format", "json")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def machine_log(daemon: Daemon) -> list[dict[str, Any]]:
    (path,) = (daemon.state_dir / "run").glob("*/machine.log")
    return lines(path)


def test_every_line_of_a_migration_names_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHOVER_TRACE", "1")  # many lines, of machines too, in many threads
    source = rig.start("source", machine_toml(devices=("nic",)), options=JSON)
    destination = rig.start("destination", options=JSON)
    left = machine_log(source)
    with rig.held("source.stopped") as arrived:
        session = source.begin(destination.address)
        arrived()
        left = machine_log(source)[len(left) :]
    result = source.follow(session)
    assert_completed(result)
    here, there, came = lines(source.log), lines(destination.log), machine_log(destination)
    assert [line["phase"] for line in here if line["event"] == "phase"] == [
        "setup",
        "precopy",
        "switchover",
        "handover",
        "done",
    ]
    assert here[-1]["event"] == "migration ended" and here[-1]["result"] == "completed"
    assert {"arrival", "arrival committed"} <= {line["event"] for line in there}
    for log in (here, there):
        assert {line.get("session") for line in log} == {session}
    # What a machine does before and after has no migration.
    assert {line["session"] for line in left if line["event"] != "vfio_migration_set_state"} == {session}
    assert {line.get("session") for line in came if line["event"].startswith("vfio_load")} == {session}


def scrape(daemon: Daemon) -> dict[str, float]:
    """Return what the daemon tells Prometheus; its third line says where."""
    with urllib.request.urlopen(f"http://{daemon.metrics}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


@pytest.mark.matrix
def test_prometheus_sees_a_migration_on_both_sides(rig: Rig) -> None:
    metrics = ("--metrics", "127.0.0.1:0")
    source = rig.start("source", machine_toml(devices=("nic",)), options=metrics)
    destination = rig.start("destination", options=metrics)
    before = scrape(source)
    assert before['switchover_machine_state{machine="m",state="running"}'] == 1
    assert before['switchover_machine_ram_bytes{machine="m"}'] == 64 << 20
    assert (before["switchover_owner"], scrape(destination)["switchover_owner"]) == (1, 0)
    with rig.held("source.round1") as arrived:
        session = source.begin(destination.address, max_downtime_ms=0.001)
        arrived()
        assert (scrape(source)["switchover_migrating"], scrape(destination)["switchover_migrating"]) == (1, 1)
        source.stub.Cancel(host_pb2.CancelRequest(), timeout=20)
    assert source.follow(session).result == "cancelled"
    wait_for(lambda: not destination.look().migrating, "the destination has not let go")
    result = source.migrate(destination.address)
    assert_completed(result)
    here, there = scrape(source), scrape(destination)
    for outcome, count in (("completed", 1), ("cancelled", 1), ("failed", 0)):
        assert here[f'switchover_migrations_total{{outcome="{outcome}"}}'] == count
    for outcome in ("committed", "revoked"):
        assert there[f'switchover_arrivals_total{{outcome="{outcome}"}}'] == 1
    assert here["switchover_downtime_seconds_count"] == 1
    assert here["switchover_downtime_seconds_sum"] == pytest.approx(result.downtime_ms / 1000)
    assert here['switchover_pages_total{direction="sent"}'] >= result.ram.pages
    assert there['switchover_pages_total{direction="received"}'] >= result.ram.pages
    assert here['switchover_page_bytes_total{direction="sent"}'] >= result.ram.transferred_bytes
    assert here['switchover_dirty_pages_total{source="default"}'] >= result.dirty_tracking[0].dirty_pages
    assert here['switchover_dirty_pages_total{source="vCPU"}'] > 0
    assert (here["switchover_owner"], there["switchover_owner"]) == (0, 1)
    assert there['switchover_machine_state{machine="m",state="running"}'] == 1
    assert 'switchover_machine_state{machine="m",state="running"}' not in here


def ends(daemon: Daemon) -> int:
    return daemon.process.wait(60)


@pytest.mark.parametrize(
    ("role", "policy"),
    [
        ("source", "finish"),
        pytest.param("destination", "finish", marks=pytest.mark.matrix),
        pytest.param("source", "abort", marks=pytest.mark.matrix),
        pytest.param("destination", "abort", marks=pytest.mark.matrix),
    ],
)
@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_a_daemon_that_is_told_to_end_in_a_migration(rig: Rig, role: str, policy: str, again: bool) -> None:
    options = ("--on-sigterm", policy)
    source = rig.start("source", machine_toml(devices=("nic",)), state="s", options=options)
    destination = rig.start("destination", state="d", options=options)
    before = goes_on(source)
    told = source if role == "source" else destination
    finishes = policy == "finish" and not again
    with ThreadPoolExecutor() as pool, rig.held("source.round1") as arrived:
        session = source.begin(destination.address, max_downtime_ms=0.001, max_rounds=1, on_timeout=2)
        following = pool.submit(source.follow, session)
        arrived()
        told.process.send_signal(signal.SIGTERM)
        if policy == "finish":
            told.await_line("ends after the migration")
            if role == "source":
                with pytest.raises(grpc.RpcError) as refused:
                    source.stub.StopMachine(host_pb2.StopMachineRequest(), timeout=20)
                assert peer_error(refused.value).reason == "ENDING"
            if again:
                told.process.send_signal(signal.SIGTERM)
        if not finishes and role == "destination":
            assert ends(told) == 0
        arrived.release()
        result = following.result(60)
    assert ends(told) == 0
    if finishes:
        assert_completed(result)
        # Whichever daemon has ended: its machine goes on, and the next daemon finds it.
        owner = rig.start("destination", state="d") if role == "destination" else destination
        if role == "destination":
            assert owner.said.endswith("found running")
    else:
        assert result.result == ("cancelled" if role == "source" else "failed")
        owner = rig.start("source", state="s") if role == "source" else source
        if role == "source":
            assert owner.said.endswith("found running")
    goes_on(owner, before)
