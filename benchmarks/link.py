"""The link between two ends: loopback, or a veth pair between two network namespaces with a limited rate."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["End", "Link", "open_link"]

# What may queue up: long enough for a sender that is not scheduled at once, short enough not to be a memory of its own.
BURST_S, MIN_BURST = 0.002, 256 << 10
QUEUE_S = 0.05


@dataclass(frozen=True, slots=True)
class End:
    """Where commands of one end run: what is put before them, and the address at which others reach them."""

    prefix: tuple[str, ...]
    address: str


@dataclass(frozen=True, slots=True)
class Link:
    """Two ends. `limit`, in bytes per second, is what movers must keep by themselves, where the link does not."""

    source: End
    destination: End
    limit: float | None = None


LOOPBACK = End((), "127.0.0.1")


@contextmanager
def open_link(rate: float | None) -> Iterator[Link]:
    """Yield a link of `rate` bytes per second each way, or loopback, which without root each mover limits itself."""
    if rate is None or os.geteuid() or not shutil.which("tc"):
        yield Link(LOOPBACK, LOOPBACK, rate)
        return
    names = [f"sw-bench-{os.getpid()}-{end}" for end in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        # Made inside, so that no name of ours is ever outside.
        _ip("-n", names[0], "link", "add", "bench", "type", "veth", "peer", "name", "bench", "netns", names[1])
        ends = []
        for number, name in enumerate(names, 1):
            end = End(("ip", "netns", "exec", name), f"10.213.0.{number}")
            _ip("-n", name, "address", "add", f"{end.address}/24", "dev", "bench")
            for device in ("lo", "bench"):
                _ip("-n", name, "link", "set", device, "up")
            burst = max(int(rate * BURST_S), MIN_BURST)
            limited = ("rate", f"{rate * 8:.0f}bit", "burst", str(burst), "limit", str(burst + int(rate * QUEUE_S)))
            _run((*end.prefix, "tc", "qdisc", "add", "dev", "bench", "root", "tbf", *limited))
            ends.append(end)
        yield Link(ends[0], ends[1])
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    _run(("ip", *arguments))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
