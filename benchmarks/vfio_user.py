"""The device protocol alone: device state, small round trips, reports of dirty pages, beside bare sockets.

Both ends are exec'd processes. `python -m benchmarks.vfio_user device SOCKET` is a device that costs nothing: what is
measured is the protocol. `… peer FD` is the other end of a bare socket: it answers sizes with bytes.
"""

from __future__ import annotations

import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.cost import table
from benchmarks.log_device import LogDevice
from benchmarks.tracking import CountedDevice, container, milliseconds
from common.memory.allocator import tune_allocator
from common.memory.bitmap import DirtyBitmap, Words, pages_of
from common.memory.layout import PAGE_SIZE
from common.memory.ram import GuestRam
from common.vfio.feature import Buffer
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.capabilities import MAX_TRANSFER
from common.vfio_user.client import VfioUserClient
from common.vfio_user.description import RegionFlags, RegionInfo
from common.vfio_user.server import VfioUserServer, listen

__all__ = ["device_state", "report", "round_trips"]

GIB = 1 << 30
SIZES = (32 << 10, 64 << 10, 256 << 10, MAX_TRANSFER)
BYTES = 128 << 20  # of device state, in each measurement
TRIPS = 5000
REGION = 64 * GIB
_ASK = struct.Struct("<QQ")  # bytes that come after it, bytes of the answer


class StateDevice(LogDevice):
    """A device whose state is always there, and always taken."""

    migration_flags = MigrationFlags.STOP_COPY

    def __init__(self) -> None:
        super().__init__()
        self.regions = [RegionInfo(0, RegionFlags.READ | RegionFlags.WRITE, MAX_TRANSFER)]
        self._state = DeviceState.RUNNING
        self._data = memoryview(np.random.default_rng(1).bytes(MAX_TRANSFER))

    def get_state(self) -> DeviceState:
        return self._state

    def set_state(self, state: DeviceState) -> None:
        self._state = state

    def mig_data_read(self, size: int) -> Buffer:
        return self._data[:size]


@contextmanager
def device() -> Iterator[VfioUserClient]:
    """Run a `StateDevice` in a process of its own, and connect to it."""
    with tempfile.TemporaryDirectory(prefix="sw-bench-") as workspace:
        path = Path(workspace) / "device.sock"
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.vfio_user", "device", str(path)])
        while not path.exists():
            time.sleep(0.01)
        with VfioUserClient.connect(path, "state0", timeout=20) as client:
            yield client
        process.wait()


class Peer:
    """The other end of a bare socket, in a process of its own."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair()
        command = [sys.executable, "-m", "benchmarks.vfio_user", "peer", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self._data = bytes(MAX_TRANSFER)
        self._room = bytearray(MAX_TRANSFER)
        self.ask(1, 1)  # until it has started

    def ask(self, there: int, back: int) -> None:
        """Send bytes and get bytes."""
        self._sock.sendmsg([_ASK.pack(there, back)])
        self._sock.sendall(self._data[:there] if there < len(self._data) else self._data)
        receive(self._sock, memoryview(self._room)[:back])

    def close(self) -> None:
        self._sock.close()
        self._process.wait()


def receive(sock: socket.socket, room: memoryview) -> bool:
    """Fill `room`; False at the end of the connection."""
    at = 0
    while at < len(room):
        count = sock.recv_into(room[at:])
        if not count:
            return False
        at += count
    return True


def serve_peer(fd: int) -> None:
    """Answer as `Peer.ask` asks."""
    data, room = bytes(MAX_TRANSFER), bytearray(MAX_TRANSFER)
    with socket.socket(fileno=fd) as sock, memoryview(room) as view:
        while receive(sock, view[: _ASK.size]):
            there, back = _ASK.unpack_from(room)
            receive(sock, view[:there])
            sock.sendall(data[:back] if back < len(data) else data)


def seconds(call: Callable[[], object], times: int) -> float:
    """Return what `times` calls take."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - began


def spread(values: Sequence[float], form: str) -> str:
    """Return median, minimum and maximum."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def device_state(runs: int) -> None:
    """Measure how fast device state moves, in messages of several sizes (at least 1 GB/s)."""
    made = table(
        f"Device state, GB/s: median (min-max) of {runs}, each of {BYTES >> 20} MiB",
        *("bytes in a message", "MIG_DATA_READ", "bare socket", "MIG_DATA_WRITE", "bare socket"),
    )
    with device() as client:
        peer = Peer()
        for size in SIZES:
            data = bytes(size)
            ways: list[tuple[DeviceState | None, Callable[[], object]]] = [
                (DeviceState.STOP_COPY, partial(client.mig_data_read, size)),
                (None, partial(peer.ask, 0, size)),
                (DeviceState.RESUMING, partial(client.mig_data_write, data)),
                (None, partial(peer.ask, size, 16)),
            ]
            found: list[list[float]] = [[] for _ in ways]
            for _ in range(runs):
                for (state, call), speeds in zip(ways, found, strict=True):
                    if state is not None:
                        client.set_state(state)
                    speeds.append(BYTES / seconds(call, BYTES // size) / 1e9)
            made.add_row(f"{size >> 10} KiB", *(spread(speeds, ".2f") for speeds in found))
        peer.close()
    Console(width=120).print(made)


def round_trips(runs: int) -> None:
    """Count small requests, one after the other (at least 15 000 a second)."""
    made = table(f"Round trips a second: median (min-max) of {runs}, each of {TRIPS}", "request", "a second")
    with device() as client:
        peer = Peer()
        ways: dict[str, Callable[[], object]] = {
            "REGION_READ of 4 bytes": lambda: client.region_read(0, 0, 4),
            "DEVICE_FEATURE GET of the state": client.get_state,
            "bare socket, 32 bytes there, 36 back": lambda: peer.ask(16, 36),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, call in ways.items():
                found[name].append(TRIPS / seconds(call, TRIPS))
        peer.close()
    for name, rates in found.items():
        made.add_row(name, spread(rates, ".0f"))
    Console(width=120).print(made)


class TimedDevice(CountedDevice):
    """A device, and the seconds that its reports took."""

    def __init__(self, client: VfioUserClient) -> None:
        super().__init__(client)
        self.spent = 0.0

    def logging_report(self, iova: int, length: int, page_size: int) -> Words:
        began = time.perf_counter()
        try:
            return super().logging_report(iova, length, page_size)
        finally:
            self.spent += time.perf_counter() - began


def report(runs: int) -> None:
    """Time a sync of a container with 64 GiB mapped (limit: 20 ms), and what its parts take."""
    made = table(
        f"64 GiB mapped in one device: median (min-max) of {runs}, ms",
        *("pages written", "REPORT of all", "2 MiB on a bare socket", "sync", "of it REPORTs", "REPORTs"),
    )
    with GuestRam.create(REGION) as ram, device() as client:
        peer = Peer()
        card = TimedDevice(client)
        space = container(card, ram, "auto")
        for segment in ram.layout.segments:
            space.map(segment.gpa, segment.size, segment.gpa)
        dirty = DirtyBitmap(ram.layout.pages)
        space.start_tracking(dirty)
        chance = np.random.default_rng(1)
        for written in (0, 1000, 100_000):
            alone, bare, syncs, reports = [], [], [], []
            for _ in range(runs):
                pages = chance.choice(ram.layout.segments[-1].size // PAGE_SIZE, written, replace=False)
                iovas = ram.layout.segments[-1].gpa + pages * PAGE_SIZE
                for at in range(0, written, 100_000):
                    card.write(iovas[at : at + 100_000].tolist())
                card.spent = 0.0
                began = card.requests
                syncs.append(seconds(space.sync, 1))
                reports.append(card.spent)
                number = card.requests - began
                if len(pages_of(dirty.take())) != written:
                    raise RuntimeError("what was written is not dirty")
                bare.append(seconds(lambda: [peer.ask(32, MAX_TRANSFER) for _ in range(2)], 1))
                alone.append(seconds(lambda: client.logging_report(0, REGION, PAGE_SIZE), 1))
            times = (alone, bare, syncs, reports)
            made.add_row(str(written), *map(milliseconds, times), str(number))
        space.stop_tracking()
        peer.close()
    Console(width=120).print(made)


if __name__ == "__main__":
    if sys.argv[1] == "peer":
        serve_peer(int(sys.argv[2]))
    else:
        with listen(Path(sys.argv[2])) as listener:
            connection, _ = listener.accept()
            tune_allocator()  # as device processes do
            VfioUserServer(StateDevice(), connection).serve()
