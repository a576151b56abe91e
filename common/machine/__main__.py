"""The machine process: python -m common.machine, started by a daemon (common.machine.launch)."""

from __future__ import annotations

import argparse
import resource
import signal
import socket
import sys
from pathlib import Path

from common.logs import configure_logs
from common.machine.config import from_json
from common.machine.fields import ConfigError
from common.machine.machine import Machine
from common.machine.service import MachineService
from common.memory.allocator import tune_allocator

DESCRIPTORS = 8192  # enough for as many devices as there may be, with their sockets, interrupts and doorbells


def main() -> int:
    """Build the machine that `machine.json` in the directory describes, and serve it until it ends."""
    parser = argparse.ArgumentParser(prog="python -m common.machine")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--connection", type=int, required=True, help="descriptor: whoever has started it asks there")
    parser.add_argument("--incoming", action="store_true")
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, DESCRIPTORS), most))
    configure_logs()
    tune_allocator()
    try:
        spec = from_json((arguments.directory / "machine.json").read_bytes())
        machine = Machine(spec, arguments.directory, incoming=arguments.incoming)
    except (ConfigError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    service = MachineService(machine, arguments.directory, arguments.record, arguments.incarnation)
    configure_logs(session=lambda: service.session_id)
    signal.signal(signal.SIGTERM, lambda *_: service.ended.set())
    service.run(socket.socket(fileno=arguments.connection))
    machine.close()
    return 0


sys.exit(main())
