"""python -m destination: the same as `switchover destination`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from destination.daemon import run

parser = argparse.ArgumentParser(prog="python -m destination")
parser.add_argument("--listen", default="127.0.0.1:7700", metavar="HOST:PORT", help="port 0 takes a free one")
parser.add_argument("--state-dir", type=Path, help="where records and machines live")
arguments = parser.parse_args()
sys.exit(run(arguments.listen, arguments.state_dir))
