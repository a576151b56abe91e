"""python -m benchmarks [NAME…]: run the benchmarks (all without a name) and print what they measured."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import cost, downtime, peers, tracking, vfio_user
from common.machine.quantities import parse_size
from common.memory.allocator import tune_allocator

BENCHMARKS: dict[str, Callable[[int], None]] = {
    "idle": cost.idle,
    "growth": cost.growth,
    "sparse": cost.sparse,
    "memory": cost.memory,
    "downtime": downtime.downtime,
    "large": tracking.large,
    "mappings": tracking.mappings,
    "strategies": tracking.strategies,
    "device-state": vfio_user.device_state,
    "round-trips": vfio_user.round_trips,
    "report": vfio_user.report,
}

parser = argparse.ArgumentParser(prog="python -m benchmarks")
parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*BENCHMARKS, *peers.SCENES]))
parser.add_argument("--runs", type=int, default=5, help="of each configuration; medians are printed")
parser.add_argument("--plot", type=Path, metavar="FILE", help="where to put the chart of the one that has one, as SVG")
peer = parser.add_argument_group("beside peers", ", ".join(peers.SCENES))
peer.add_argument("--ram", type=parse_size, metavar="SIZE", help="instead of the scene's own")
peer.add_argument("--only", action="append", default=[], metavar="REGEX", help="only rows whose names have this")
peer.add_argument("--samples", type=Path, metavar="FILE", help="count what it has from earlier runs, and add to it")
arguments = parser.parse_args()
BENCHMARKS["strategies"] = partial(tracking.strategies, plot=arguments.plot)
for name in peers.SCENES:
    BENCHMARKS[name] = partial(
        peers.compare,
        name=name,
        ram=arguments.ram,
        only=arguments.only,
        kept=arguments.samples,
        plot=arguments.plot,
    )
unknown = set(arguments.names) - set(BENCHMARKS)
if unknown:
    parser.error(f"unknown: {', '.join(sorted(unknown))}")
tune_allocator()  # as daemons and machine processes do
# Whoever ends it wants nothing left behind.
signal.signal(signal.SIGTERM, signal.default_int_handler)
for name in arguments.names or BENCHMARKS:
    BENCHMARKS[name](arguments.runs)
