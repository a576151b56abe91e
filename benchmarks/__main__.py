"""python -m benchmarks [NAME…]: run the benchmarks (all without a name) and print what they measured."""

from __future__ import annotations

import argparse

from benchmarks import cost

BENCHMARKS = {"idle": cost.idle, "growth": cost.growth, "memory": cost.memory}

parser = argparse.ArgumentParser(prog="python -m benchmarks")
parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
parser.add_argument("--runs", type=int, default=5, help="of each configuration; medians are printed")
arguments = parser.parse_args()
unknown = set(arguments.names) - set(BENCHMARKS)
if unknown:
    parser.error(f"unknown: {', '.join(sorted(unknown))}")
for name in arguments.names or BENCHMARKS:
    BENCHMARKS[name](arguments.runs)
