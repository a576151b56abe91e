"""python -m benchmarks [NAME…]: run the benchmarks (all without a name) and print what they measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import cost, tracking, vfio_user

BENCHMARKS: dict[str, Callable[[int], None]] = {
    "idle": cost.idle,
    "growth": cost.growth,
    "memory": cost.memory,
    "large": tracking.large,
    "mappings": tracking.mappings,
    "strategies": tracking.strategies,
    "device-state": vfio_user.device_state,
    "round-trips": vfio_user.round_trips,
    "report": vfio_user.report,
}

parser = argparse.ArgumentParser(prog="python -m benchmarks")
parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
parser.add_argument("--runs", type=int, default=5, help="of each configuration; medians are printed")
parser.add_argument("--plot", type=Path, metavar="FILE", help="where to put the chart of strategies, as SVG")
arguments = parser.parse_args()
BENCHMARKS["strategies"] = partial(tracking.strategies, plot=arguments.plot)
unknown = set(arguments.names) - set(BENCHMARKS)
if unknown:
    parser.error(f"unknown: {', '.join(sorted(unknown))}")
for name in arguments.names or BENCHMARKS:
    BENCHMARKS[name](arguments.runs)
