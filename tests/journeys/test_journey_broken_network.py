"""The network breaks in each phase: what becomes of the machine, and that the next attempt moves it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from rig import Rig, assert_completed, machine_toml, wait_for
from test_journey_localhost import goes_on

HANG = 45.0  # seconds: keepalive finds a dead peer in 9, and a connection that is never made is given up in 20

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

EXPECTED = {phase: dict.fromkeys(FAULTS, STAYS) for phase in PHASES} | {"committing": dict.fromkeys(FAULTS, ASKED)}

CELLS = [(phase, fault) for phase, faults in EXPECTED.items() for fault in faults]
QUICK = {("switchover", "cut")}


@pytest.mark.parametrize(
    ("phase", "fault"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.matrix, id=" ".join(cell)) for cell in CELLS],
)
def test_the_network_breaks(rig: Rig, image: Path, phase: str, fault: str) -> None:
    source = rig.start("source", machine_toml(image=image, devices=("nic",)))
    destination = rig.start("destination")
    before = goes_on(source)
    with FaultProxy(destination.address) as proxy:
        with rig.held(PHASES[phase]) as arrived:
            # A downtime that nothing fits into, so that there is a second round.
            session = source.begin(proxy.address, max_downtime_ms=0.001 if phase == "later round" else 300)
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
