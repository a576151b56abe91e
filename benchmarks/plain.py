"""The ceiling: plain Python sockets from one RAM file into another, and iperf3, which touches no RAM at all.

Run as a program it is one end of the former: `python -m benchmarks.plain receive FILE STREAMS ADDRESS` and `send`;
[plain_zstd.py](plain_zstd.py) is such a program too.
"""

from __future__ import annotations

import json
import mmap
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.link import Link
from benchmarks.ram_file import clear, differing_pages
from benchmarks.samples import Sample

__all__ = ["Work", "has_iperf3", "mapped", "move", "move_by_iperf3", "one_end", "receive_into"]

PIECE = 4 << 20
IPERF3_PORT = 5201
START_S = 10.0

Work = Callable[[socket.socket, memoryview], int]
"""What is done with a stream and its share of RAM; returns how many bytes have gone over it."""


def move(link: Link, source_ram: Path, destination_ram: Path, streams: int, module: str) -> Sample:
    """Send a file over as many streams, each its share of it; OSError if it does not arrive.

    `module` is the program at both ends.
    """
    clear(destination_ram, source_ram.stat().st_size)
    us = [sys.executable, "-m", module]
    receiving = [*link.destination.prefix, *us, "receive", str(destination_ram), str(streams), link.destination.address]
    with subprocess.Popen(receiving, stdout=subprocess.PIPE, text=True) as receiver:
        try:
            assert receiver.stdout is not None
            address = f"{link.destination.address}:{receiver.stdout.readline().strip()}"
            sending = [*link.source.prefix, *us, "send", str(source_ram), str(streams), address]
            sent = subprocess.run(sending, stdout=subprocess.PIPE, text=True, check=False)
            received = receiver.stdout.readline()
        finally:
            receiver.kill()
    if sent.returncode or not received:
        raise OSError(f"{module}: an end has failed")
    if differing := differing_pages(source_ram, destination_ram):
        raise OSError(f"{module}: {differing} pages differ at the destination")
    size = source_ram.stat().st_size
    source, destination = json.loads(sent.stdout), json.loads(received)
    return Sample(size, source["seconds"], source["sent"], source["cpu_s"], destination["cpu_s"])


@contextmanager
def mapped(path: str) -> Iterator[memoryview]:
    """Map a file, all of it touched."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory.madvise(23)  # MADV_POPULATE_WRITE
        with memoryview(memory) as view:
            yield view


def one_end(arguments: Sequence[str], send: Work, receive: Work) -> None:
    """Be one end, as `arguments` (see above) say, and print what it took: each stream has its share of the file."""
    role, path, count, address = arguments
    host, _, port = address.partition(":")
    streams = int(count)

    def work(connection: socket.socket, view: memoryview) -> int:
        with connection:
            if role == "receive":
                done = receive(connection, view)
                connection.sendall(b"!")
            else:
                done = send(connection, view)
                if connection.recv(1) != b"!":
                    raise ConnectionError("the other end has not received all")
        return done

    with mapped(path) as memory:
        share = len(memory) // streams
        views = [memory[index * share : (index + 1) * share] for index in range(streams)]
        if role == "receive":
            with socket.create_server((host, 0), backlog=streams) as server:
                print(server.getsockname()[1], flush=True)
                sockets = [server.accept()[0] for _ in views]
        else:
            sockets = [socket.create_connection((host, int(port))) for _ in views]
        began, cpu = time.monotonic(), time.process_time()
        with ThreadPoolExecutor(streams) as pool:
            sent = sum(pool.map(work, sockets, views))
        told = {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu, "sent": sent}
        for view in views:
            view.release()
    print(json.dumps(told), flush=True)


def _send(connection: socket.socket, view: memoryview) -> int:
    for start in range(0, len(view), PIECE):
        connection.sendall(view[start : start + PIECE])
    return len(view)


def _receive(connection: socket.socket, view: memoryview) -> int:
    receive_into(connection, view)
    return len(view)


def receive_into(connection: socket.socket, view: memoryview) -> None:
    """Fill `view` with what comes next."""
    done = 0
    while done < len(view):
        got = connection.recv_into(view[done : done + PIECE])
        if not got:
            raise ConnectionError("the other end has gone")
        done += got


def has_iperf3() -> bool:
    """Return whether it is installed."""
    return shutil.which("iperf3") is not None


def move_by_iperf3(link: Link, size: int, streams: int) -> Sample:
    """Let iperf3 send as many bytes, the same small buffer again and again."""
    serving = [*link.destination.prefix, "iperf3", "-s", "-1", "-B", link.destination.address, "-p", str(IPERF3_PORT)]
    with subprocess.Popen(serving, stdout=subprocess.DEVNULL) as server:
        try:
            told = _iperf3(link, size, streams)
        finally:
            server.kill()
    seconds, sent = told["sum_received"]["seconds"], told["sum_received"]["bytes"]
    share = told["cpu_utilization_percent"]
    return Sample(sent, seconds, sent, share["host_total"] / 100 * seconds, share["remote_total"] / 100 * seconds)


def _iperf3(link: Link, size: int, streams: int) -> dict[str, Any]:
    calling = [*link.source.prefix, "iperf3", "-c", link.destination.address, "-p", str(IPERF3_PORT), "-J"]
    deadline = time.monotonic() + START_S
    while True:
        done = subprocess.run([*calling, "-P", str(streams), "-n", str(size)], capture_output=True, check=False)
        told: dict[str, Any] = json.loads(done.stdout or b"{}")
        if not done.returncode and "error" not in told:
            return dict(told["end"])
        # It may not listen yet.
        if "refused" not in told.get("error", "") or time.monotonic() > deadline:
            raise OSError(f"iperf3: {told.get('error', 'failed')}")
        time.sleep(0.05)


if __name__ == "__main__":
    one_end(sys.argv[1:], _send, _receive)
