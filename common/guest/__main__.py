"""python -m common.guest: the vCPU process of one machine, started with the descriptors that it needs."""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import sys

from common.guest.memory import GuestMemory
from common.guest.service import serve_vcpu
from common.guest.vcpu import Vcpu
from common.ipc.channel import Client, ClosedError
from common.memory.ram import GuestRam


def main() -> int:
    """Serve until the machine closes its end."""
    parser = argparse.ArgumentParser(prog="python -m common.guest", description=__doc__)
    parser.add_argument("--ram", type=int, required=True, metavar="FD", help="guest RAM, a sealed memfd")
    parser.add_argument("--control", type=int, required=True, metavar="FD", help="socket for the machine's requests")
    parser.add_argument("--trap", type=int, required=True, metavar="FD", help="socket for the vCPU's requests")
    options = parser.parse_args()
    # Ctrl-C in a terminal reaches the whole process group, but it is meant for a daemon, not for the guest.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ram = GuestRam.attach(options.ram)
        control = socket.socket(fileno=options.control)
        traps = Client(socket.socket(fileno=options.trap))
    except (OSError, ValueError) as error:
        print(f"common.guest: {error}", file=sys.stderr)
        return 1
    # A collection over all that the imports left would take longer than a step may.
    gc.freeze()
    try:
        serve_vcpu(Vcpu(GuestMemory(ram), traps), control)
    except ClosedError:
        # Powered off in the middle of a trap.
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
