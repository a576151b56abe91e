"""Whoever takes what is sent only slowly, or not at all for a while, costs nobody memory: senders wait."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from rig import Daemon, Rig, assert_completed, machine_toml
from switchover.v1 import migration_pb2
from test_journey_localhost import goes_on
from victims import victim

pytestmark = pytest.mark.matrix

MIB = 1 << 20
STATE = 256 * MIB
BOUND = 80 * MIB  # that each process may take meanwhile; what is to be sent is several times that
SECONDS = 3.0
GRPC, TCP = migration_pb2.LANE_KIND_GRPC, migration_pb2.LANE_KIND_TCP


def stopped(pid: int, held: ExitStack) -> None:
    os.kill(pid, signal.SIGSTOP)
    held.callback(os.kill, pid, signal.SIGCONT)


def device(there: Daemon, proxy: FaultProxy, held: ExitStack) -> None:
    stopped(victim(there, "accelerator"), held)


def daemon(there: Daemon, proxy: FaultProxy, held: ExitStack) -> None:
    stopped(there.process.pid, held)


def network(there: Daemon, proxy: FaultProxy, held: ExitStack) -> None:
    proxy.slow(rate=10e6)
    held.callback(proxy.heal)


def own_memory(pid: int) -> int:
    """Return the bytes that a process has for itself, which guest RAM is not."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel does not tell")


@pytest.mark.parametrize(("slow", "kind"), [(device, GRPC), (daemon, GRPC), (daemon, TCP), (network, GRPC)])
def test_memory_is_bounded(
    rig: Rig, slow: Callable[[Daemon, FaultProxy, ExitStack], None], kind: migration_pb2.LaneKind.ValueType
) -> None:
    machine = machine_toml(
        ram="512MiB",
        image=Path(sys.prefix) / "lib",
        devices=("accelerator",),
        extra={"accelerator": f"memory = {STATE}\nchurn = 0"},
    )
    source, destination = rig.start("source", machine), rig.start("destination")
    before = goes_on(source)
    with FaultProxy(destination.address) as proxy, ExitStack() as held:
        with rig.held("source.round0") as arrived:
            session = source.begin(proxy.address, lane_kind=kind, max_downtime_ms=2000)
            arrived()
            watched = [
                source.process.pid,
                destination.process.pid,
                *(victim(d, "machine") for d in (source, destination)),
            ]
            had = [own_memory(pid) for pid in watched]
            slow(destination, proxy, held)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            grown = [own_memory(pid) - at_first for pid, at_first in zip(watched, had, strict=True)]
            assert max(grown) < BOUND, [bytes_ >> 20 for bytes_ in grown]
            time.sleep(0.05)
        held.close()
        result = source.follow(session)
    assert_completed(result)
    assert min(result.ram.transferred_bytes, sum(moved.precopy_bytes for moved in result.devices)) > 2 * BOUND, result
    goes_on(destination, before)
