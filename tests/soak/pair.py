"""Two hosts between which a machine goes to and fro, the networks that lead to them, and what they leave behind."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
from cells import DEVICES
from fault_proxy import FaultProxy
from rig import Daemon, Rig, wait_for
from switchover.v1 import host_pb2
from victims import find

from common.rpc.errors import PeerError, peer_error

__all__ = ["Host", "Pair"]

SETTLE = 60.0  # seconds in which whatever was broken has come to its end, once it is repaired
DIRECT, BY_PROXY = "127.0.0.1", "127.0.0.2"
PROCESSES = {"console": 2, "common.machine": 1, "common.guest": 1, "common.devices": len(DEVICES)}
# How many more descriptors or threads than at first: what a migration leaves behind each time exceeds it soon.
SLACK = 12


class Host:
    """A host: its daemon, which comes and goes, and the network by which the other one reaches it."""

    def __init__(self, rig: Rig, name: str, held: ExitStack) -> None:
        self.name = name
        self._rig = rig
        self._port, self._lane_port = free_port(), free_port()
        self._networks = [
            held.enter_context(FaultProxy(f"{DIRECT}:{port}", port, BY_PROXY)) for port in (self._port, self._lane_port)
        ]
        self.address = self._networks[0].address
        self.daemon: Daemon
        self.usual: dict[bool, int] = {}

    def start(self, machine: str | None = None) -> str:
        """Start the daemon; return what it says of its machine."""
        self.daemon = self._rig.start(
            "host",
            machine,
            state=self.name,
            listen=f"{DIRECT}:{self._port}",
            options=("--lane-port", str(self._lane_port)),
        )
        self.usual = {}
        return self.daemon.said

    def disturb(self, how: str) -> None:
        """Break the network that leads here; "" repairs it."""
        for network in self._networks:
            match how:
                case "cut":
                    network.cut()
                case "stalled":
                    network.stall()
                case "without answers":
                    network.drop("back")
                case "without requests":
                    network.drop("there")
                case "slow":
                    network.slow(delay=0.02, rate=40e6)
                case _:
                    network.heal()

    def state(self) -> str:
        """Return the state of its machine, "ended" if its process has, "" if it has none."""
        try:
            look = self.daemon.look()
        except grpc.RpcError as error:
            if "has ended" not in str(peer_error(error)):
                raise
            return "ended"
        return look.machine.state

    def settled(self) -> bool:
        """Whether no migration runs here, and it is known who owns the machine."""
        try:
            look = self.daemon.look()
        except grpc.RpcError as error:
            return "has ended" in str(peer_error(error))
        return not look.migrating and look.ownership != "COMMITTING"

    def forget(self) -> PeerError | None:
        """Drop what is kept of a machine that does not run here; return why not, if it is refused."""
        try:
            self.daemon.stub.Forget(host_pb2.ForgetRequest(), timeout=20)
        except grpc.RpcError as error:
            return peer_error(error)
        return None

    def logs(self) -> list[Path]:
        return [self.daemon.log, *(self.daemon.state_dir / "run").glob("*/machine.log")]

    def kept(self) -> int:
        """Return how many descriptors and threads the daemon has."""
        directory = Path(f"/proc/{self.daemon.process.pid}")
        return len(list((directory / "fd").iterdir())) + len(list((directory / "task").iterdir()))

    def leaves_nothing(self, *, owner: bool) -> None:
        """Fail if the daemon has more than when it was in this role first, or has said that it has a defect."""
        usual = self.usual.setdefault(owner, self.kept())
        eventually(
            lambda: self.kept() <= usual + SLACK,
            lambda: f"{self.name} has {self.kept()} descriptors and threads, and had {usual} at first",
        )
        runs = list((self.daemon.state_dir / "run").glob("*"))
        assert len(runs) <= 1, runs
        for log in self.logs():
            said = log.read_text()
            assert "Traceback" not in said and "defect" not in said, said[-4000:]

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.daemon.process.pid}/statm").read_text().split()
        return int(status[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


class Pair:
    """Both hosts, and the machine; `here` has it."""

    def __init__(self, held: ExitStack) -> None:
        self.rig = Rig()
        held.callback(self.rig.close)
        self.here, self.there = Host(self.rig, "a", held), Host(self.rig, "b", held)
        self.hosts = (self.here, self.there)
        self.there.start()
        self.memories = 0

    def boot(self, machine: str) -> None:
        """Start a new machine at `here`, whose daemon does not run."""
        said = self.here.start(machine)
        assert said.endswith("machine m started"), said

    def bury(self) -> None:
        """Drop what is left of a machine that has died at `here`, and end the daemon there."""
        for host in self.hosts:
            refusal = host.forget()
            assert refusal is None or refusal.reason == "NOT_FORGOTTEN", refusal
            assert host.state() == "", host.state()
        assert self.here.daemon.stop() == 0
        self.here.daemon.close()

    def settle(self) -> bool:
        """Wait until it is decided whose the machine is, which is `here` then; return whether it runs there.

        At no time both run it: whoever is seen to run at the destination never runs at the source later.
        """

        def settled() -> bool:
            there = self.there.state()
            assert (there, self.here.state()) != ("running", "running"), "both run it"
            return all(host.settled() for host in self.hosts)

        eventually(settled, lambda: f"it is not decided: {[host.state() for host in self.hosts]}")
        states = [host.state() for host in (self.here, self.there)]
        if states[1] == "running" or (states[0] in ("", "moved") and states[1]):
            self.here, self.there = self.there, self.here
            states.reverse()
        runs = states[0] == "running"
        if runs and states[1] in ("moved", "ended"):
            # Nobody was left to let its copy go when it had moved.
            assert self.there.forget() is None
            states[1] = self.there.state()
        assert (runs and not states[1]) or (states[0] in ("failed", "ended") and states[1] in ("", "moved")), states
        return runs

    def leaves_nothing(self) -> None:
        """Fail if there is more of anything than two daemons and one machine need, or something has a defect."""
        eventually(lambda: self.processes() == PROCESSES, lambda: f"processes: {self.rig.processes()}")
        self.memories = self.memories or self._memories()
        eventually(
            lambda: self._memories() == self.memories, lambda: f"{self._memories()} memories, not {self.memories}"
        )
        for host in self.hosts:
            host.leaves_nothing(owner=host is self.here)

    def processes(self) -> dict[str, int]:
        """Return how many processes of each kind belong to it."""
        found: dict[str, int] = {}
        for line in self.rig.processes():
            words = line.split()
            kind = words[words.index("-m") + 1] if "-m" in words else line
            found[kind] = found.get(kind, 0) + 1
        return found

    def _memories(self) -> int:
        """Return how many memories without a file are held by anybody."""
        found = set()
        for line in self.rig.processes():
            with suppress(OSError):
                for entry in Path(f"/proc/{line.split()[0]}/fd").iterdir():
                    with suppress(OSError):
                        if os.readlink(entry).startswith("/memfd:"):
                            found.add(entry.stat().st_ino)
        return len(found)

    def victim(self, role: str, what: str) -> int:
        """Return the process that is struck at the "source" or "destination", 0 if there is none now."""
        host = self.here if role == "source" else self.there
        return host.daemon.process.pid if what == "daemon" else find(host.daemon, what)


def eventually(condition: Callable[[], bool], tell: Callable[[], str]) -> None:
    """Wait until a condition holds; fail with what `tell` says then if it never does."""
    try:
        wait_for(condition, "never", SETTLE)
    except AssertionError as failure:
        raise AssertionError(f"{failure}: {tell()}") from None


def free_port() -> int:
    """Return a port that nobody has at either address, and that nobody is given by chance later."""
    while True:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.create_server((DIRECT, port)), socket.create_server((BY_PROXY, port)):
            return port
