"""The network breaks in each phase: the migration goes on if it is back in time; if not, the machine goes on."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from fault_proxy import FaultProxy
from rig import Daemon, Rig, assert_completed, machine_toml, wait_for
from switchover.v1 import host_pb2, migration_pb2
from test_journey_localhost import goes_on

HANG = 60.0  # seconds: keepalive finds a dead peer in 9, and a connection that is never made is given up in 20
PAGES = (64 << 20) // 4096

FAULTS: dict[str, Callable[[FaultProxy], None]] = {
    "cut": FaultProxy.cut,
    "stall": FaultProxy.stall,
    "no answers": lambda proxy: proxy.drop("back"),
    "no requests": lambda proxy: proxy.drop("there"),
}
PHASES = {
    "setup": "source.setup",
    "round 0": "source.round0",
    "later round": "source.round1",
    "switchover": "source.stopped",
    "handover": "source.handover",
    "committing": "source.committing",
}

STAYS = "stays"
"""The migration fails, and the machine goes on at the source as if nothing had happened."""
ASKED = "asked"
"""The source asks until the network is there again, and the destination decides."""

EXPECTED = {phase: dict.fromkeys(FAULTS, ASKED if phase in ("handover", "committing") else STAYS) for phase in PHASES}
"""What follows if the network is not back within the time that the operator allows."""

CELLS = [(phase, fault) for phase, faults in EXPECTED.items() for fault in faults]
QUICK = {("switchover", "cut")}
GOES_ON = ("round 0", "later round", "switchover")
"""Phases in which the migration goes on if the network is back in time."""

KINDS = {"grpc": migration_pb2.LANE_KIND_GRPC, "tcp": migration_pb2.LANE_KIND_TCP}


class Network:
    """What is between a source and a destination: forwarders of its port, and of that for page lanes."""

    def __init__(self, destination: Daemon, proxies: list[FaultProxy]) -> None:
        self.destination = destination
        self.address = proxies[0].address
        self._proxies = proxies

    def do(self, fault: Callable[[FaultProxy], None]) -> None:
        """Do something to all of it."""
        for proxy in self._proxies:
            fault(proxy)


@contextmanager
def network(rig: Rig, *options: str) -> Iterator[Network]:
    """Start a destination, and a network to it."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        lane_port = unused.getsockname()[1]
    destination = rig.start("destination", listen="127.0.0.2:0", options=("--lane-port", str(lane_port), *options))
    with FaultProxy(destination.address) as calls, FaultProxy(f"127.0.0.2:{lane_port}", lane_port) as lanes:
        yield Network(destination, [calls, lanes])


def loses_its_connection(event: host_pb2.WatchEventsResponse) -> bool:
    return "the connection is lost" in event.message


@pytest.mark.parametrize("kind", ["grpc", pytest.param("tcp", marks=pytest.mark.matrix)])
def test_round_0_goes_on_where_it_was(rig: Rig, image: Path, kind: str) -> None:
    """So does the pre-copy of devices: without their initial data there were no switchover."""
    source = rig.start("source", machine_toml(image=image, devices=("nic", "accelerator")))
    before = goes_on(source)
    with network(rig) as net:
        session = source.begin(
            net.address, lane_kind=KINDS[kind], lanes=2, bandwidth_limit=30e6, max_downtime_ms=2000, reconnect_s=40
        )
        assert source.tells(session, lambda event: event.progress.round_done_pages > PAGES * 3 // 4)
        net.do(FaultProxy.cut)
        assert source.tells(session, loses_its_connection)
        assert source.tells(session, lambda event: event.progress.disconnected_ms > 0)
        net.do(FaultProxy.heal)
        result = source.follow(session, HANG)
        assert_completed(result)
        goes_on(net.destination, before)
    assert result.reconnects >= 1 and result.disconnected_ms > 0
    # However much was under way: what is acknowledged is not sent again, and more than three quarters were.
    assert PAGES <= result.rounds[0].pages < PAGES * 5 // 4


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("phase", GOES_ON)
def test_the_network_is_back_in_time(rig: Rig, image: Path, phase: str, fault: str, kind: str) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic", "accelerator"), mappings=100))
    before = goes_on(source)
    with network(rig) as net:
        with rig.held(PHASES[phase]) as arrived:
            session = source.begin(
                net.address,
                lane_kind=KINDS[kind],
                lanes=2,
                # In a later round: a downtime that nothing fits into, so that there is one.
                max_downtime_ms=0.001 if phase == "later round" else 60_000,
                max_rounds=4,
                on_timeout=host_pb2.ON_TIMEOUT_SWITCH_OVER,
                reconnect_s=40,
            )
            arrived()
            net.do(FAULTS[fault])
        assert source.tells(session, loses_its_connection, HANG)
        net.do(FaultProxy.heal)
        result = source.follow(session, HANG)
        assert_completed(result)
        goes_on(net.destination, before)
    assert result.reconnects >= 1


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_was_held_back_is_never_applied_behind_a_newer_one(rig: Rig, kind: str) -> None:
    """The destination has it and is about to apply it, when the source comes back on a new connection."""
    source = rig.start("source", machine_toml(rate="50MB/s"))
    before = goes_on(source)
    with network(rig) as net:
        with rig.held("source.round1") as arrived:
            session = source.begin(
                net.address,
                lane_kind=KINDS[kind],
                max_downtime_ms=0.001,
                max_rounds=10,
                on_timeout=host_pb2.ON_TIMEOUT_SWITCH_OVER,
                reconnect_s=40,
            )
            arrived()
            holding = rig.held("destination.apply0")
        with holding as held:
            held()
            net.do(FaultProxy.cut)
            assert source.tells(session, loses_its_connection)
            net.do(FaultProxy.heal)
            # As long as that batch may still be written, the source is not told where to go on.
            with pytest.raises(grpc.RpcError) as nothing:
                source.tells(session, lambda event: event.progress.reconnects > 0, seconds=2)
            assert nothing.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        result = source.follow(session, HANG)
        assert_completed(result)
        goes_on(net.destination, before)
    assert result.reconnects >= 1


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_peer_is_found(rig: Rig, image: Path, kind: str) -> None:
    source = rig.start("source", machine_toml(image=image))
    with network(rig) as net:
        session = source.begin(net.address, lane_kind=KINDS[kind], bandwidth_limit=5e6, reconnect_s=40)
        assert source.tells(session, lambda event: event.progress.sent_bytes > 1 << 20)
        net.do(FaultProxy.stall)
        # Probes find it after 9 s; the rest is for a host that has much else to do.
        assert source.tells(session, loses_its_connection, seconds=12)
        source.stub.Cancel(host_pb2.CancelRequest(), timeout=20)
        assert source.follow(session, HANG).result == "cancelled"


def test_a_destination_waits_no_longer_than_its_operator_lets_it(rig: Rig) -> None:
    source = rig.start("source", machine_toml())
    before = goes_on(source)
    with network(rig, "--max-reconnect", "2s") as net:
        with rig.held("source.round0") as arrived:
            session = source.begin(net.address, reconnect_s=3600)
            arrived()
            net.do(FaultProxy.cut)
        assert source.tells(session, lambda event: "up to 2 s: the destination allows no more" in event.message)
        ended = source.follow(session, HANG)
        assert (ended.result, ended.owner, ended.reason) == ("failed", "source", "UNREACHABLE")
        wait_for(lambda: not net.destination.look().migrating, "the destination has not let go", HANG)
    goes_on(source, before)


@pytest.mark.matrix
@pytest.mark.parametrize(("limit", "result"), [({}, "cancelled"), ({"timeout_s": 6}, "failed")])
def test_who_waits_for_the_network_can_be_told_to_end(rig: Rig, limit: dict[str, float], result: str) -> None:
    source = rig.start("source", machine_toml())
    before = goes_on(source)
    with network(rig) as net:
        with rig.held("source.round0") as arrived:
            session = source.begin(net.address, reconnect_s=3600, **limit)
            arrived()
            net.do(FaultProxy.cut)
        assert source.tells(session, loses_its_connection)
        if not limit:
            source.stub.Cancel(host_pb2.CancelRequest(), timeout=20)
        ended = source.follow(session, HANG)
        assert (ended.result, ended.owner, ended.reconnects) == (result, "source", 0)
        assert ended.reason == ("NOT_CONVERGED" if limit else "CANCELLED")
        before = goes_on(source, before)
        net.do(FaultProxy.heal)
        # The destination still waits, and makes way.
        assert_completed(source.migrate(net.address))
        goes_on(net.destination, before)


@pytest.mark.parametrize(
    ("phase", "fault"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.matrix, id=" ".join(cell)) for cell in CELLS],
)
def test_the_network_is_not_back_in_time(rig: Rig, image: Path, phase: str, fault: str) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination")
    before = goes_on(source)
    with FaultProxy(destination.address) as proxy:
        with rig.held(PHASES[phase]) as arrived:
            # A downtime that nothing fits into, so that there is a second round.
            session = source.begin(
                proxy.address, max_downtime_ms=0.001 if phase == "later round" else 300, reconnect_s=1
            )
            arrived()
            FAULTS[fault](proxy)
        if EXPECTED[phase][fault] == STAYS:
            result = source.follow(session, HANG)
            assert (result.result, result.owner) == ("failed", "source"), result
            assert proxy.address in result.error and result.error.isprintable()
            assert result.reason in {"UNREACHABLE", "NO_ANSWER", "IO"}
        else:
            wait_for(lambda: source.asks(session, HANG), "nobody is asked", HANG)
            proxy.heal()
            result = source.follow(session, HANG)
            assert result.owner in ("source", "destination"), result
        owner, other = (source, destination) if result.owner == "source" else (destination, source)
        assert owner.look().machine.state == "running" and other.look().machine.state != "running"
        before = goes_on(owner, before)
        proxy.heal()
        if fault != "cut":  # which is noticed at once, and who only waits makes way for the next attempt
            wait_for(lambda: not destination.look().migrating, "the destination has not let go", HANG)
        if owner is source:
            assert_completed(source.migrate(proxy.address))
            goes_on(destination, before)


@pytest.mark.matrix
def test_a_slow_network_is_only_slow(rig: Rig) -> None:
    source = rig.start("source", machine_toml(devices=("nic",)))
    destination = rig.start("destination")
    with FaultProxy(destination.address) as proxy:
        proxy.slow(delay=0.02, rate=40e6)
        assert_completed(source.migrate(proxy.address, max_downtime_ms=2000))
        goes_on(destination)


@pytest.mark.matrix
def test_the_proxy_does_what_it_says() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=echo, args=(server,), daemon=True).start()
        with FaultProxy(f"127.0.0.1:{server.getsockname()[1]}") as proxy:
            with connect(proxy) as sock:
                assert exchange(sock) == b"ping"
                proxy.stall()
                sock.sendall(b"kept")
                with pytest.raises(TimeoutError):
                    sock.recv(4)
                proxy.heal()
                assert sock.recv(4) == b"kept"
                proxy.drop("back")
                sock.sendall(b"lost")
                with pytest.raises(TimeoutError):
                    sock.recv(4)
                proxy.heal()
                with pytest.raises(ConnectionResetError):
                    sock.recv(4)
            with connect(proxy) as sock:
                proxy.slow(delay=0.3)
                began = time.monotonic()
                assert exchange(sock) == b"ping" and time.monotonic() - began >= 0.6
                proxy.heal()
                proxy.cut()
                with pytest.raises(ConnectionResetError):
                    sock.recv(4)
            with connect(proxy) as sock, pytest.raises(ConnectionError):
                exchange(sock)


def connect(proxy: FaultProxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def exchange(sock: socket.socket) -> bytes:
    sock.settimeout(10)
    sock.sendall(b"ping")
    answer = sock.recv(4)
    sock.settimeout(0.5)
    if not answer:
        raise ConnectionError
    return answer


def echo(server: socket.socket) -> None:
    while True:
        try:
            sock, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(sock,), daemon=True).start()


def answer(sock: socket.socket) -> None:
    with sock, suppress(ConnectionError):
        while data := sock.recv(1000):
            sock.sendall(data)
