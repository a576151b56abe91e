"""python -m source: the same as `switchover source`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from source.daemon import run

parser = argparse.ArgumentParser(prog="python -m source")
parser.add_argument("--listen", default="127.0.0.1:7700", metavar="HOST:PORT", help="port 0 takes a free one")
parser.add_argument("--machine", type=Path, help="machine.toml of the machine to start")
parser.add_argument("--state-dir", type=Path, help="where records and machines live")
arguments = parser.parse_args()
sys.exit(run(arguments.listen, arguments.machine, arguments.state_dir))
