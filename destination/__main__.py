"""python -m destination: the same as `switchover destination`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.host.network import Network
from destination.daemon import run

parser = argparse.ArgumentParser(prog="python -m destination")
parser.add_argument("--listen", default="127.0.0.1:7700", metavar="HOST:PORT", help="port 0 takes a free one")
parser.add_argument(
    "--lane-port", type=int, choices=range(1 << 16), default=0, metavar="PORT", help="for page lanes of the kind tcp"
)
parser.add_argument("--state-dir", type=Path, help="where records and machines live")
parser.add_argument("--tls", type=Path, metavar="DIRECTORY", help="certificates and keys (switchover certs)")
parser.add_argument("--insecure", action="store_true", help="listen beyond loopback without TLS")
arguments = parser.parse_args()
network = Network(arguments.listen, arguments.tls, insecure=arguments.insecure, lane_port=arguments.lane_port)
sys.exit(run(network, arguments.state_dir))
