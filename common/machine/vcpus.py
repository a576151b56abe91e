"""The machine's end of the vCPU process: its commands, and the traps that it raises."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from common.ipc.channel import MAX_FDS, Client, Handler, serve
from common.machine.device_process import REQUEST_SECONDS
from common.memory.packed import PackedBitmap
from common.memory.ram import GuestRam
from common.memory.write_journal import JOURNAL_ROW, Rows

__all__ = ["Vcpus"]

# It answers between two steps, and a step waits for its traps: for devices, one request after the other, and for the
# machine's turn, in which others wait for theirs. A device that is slow must not end the machine.
COMMAND_SECONDS = 10 * REQUEST_SECONDS

_log = structlog.get_logger()


class Vcpus:
    """The vCPU process. It is created paused; one socket carries our commands, another its traps."""

    def __init__(self, ram: GuestRam, directory: Path, traps: Mapping[str, Handler]) -> None:
        self._pages = ram.layout.pages
        control, their_control = socket.socketpair()
        trap, their_trap = socket.socketpair()
        control.settimeout(COMMAND_SECONDS)
        fds = (ram.fd, their_control.fileno(), their_trap.fileno())
        with their_control, their_trap, (directory / "vcpu.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "common.guest"),
                    *("--ram", str(fds[0]), "--control", str(fds[1]), "--trap", str(fds[2])),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=fds,
            )
        self._control = Client(control)
        self._trap_socket = trap
        threading.Thread(target=_serve_traps, args=(trap, traps), name="traps", daemon=True).start()

    def attach(self, boot: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Tell the vCPU what machine it is in: programs, devices, doorbells, interrupts."""
        for first in range(0, len(fds), MAX_FDS):
            self._control.call("descriptors", fds=fds[first : first + MAX_FDS])
        self._control.call("attach", boot=boot)

    def run(self) -> None:
        """Let it run."""
        self._control.call("run")

    def pause(self) -> None:
        """Stop it at the end of its step; every trap that it raised is answered by then."""
        self._control.call("pause")

    def state_out(self) -> dict[str, Any]:
        """Return the vCPU's own state, which is small: everything else it keeps in guest RAM."""
        state: dict[str, Any] = self._control.call("state_out")["vcpu"]
        return state

    def state_in(self, state: Mapping[str, Any]) -> None:
        """Give a paused vCPU its state."""
        self._control.call("state_in", vcpu=state)

    def start_dirty_log(self) -> None:
        """Log the pages that it writes from now on."""
        self._control.call("dirty_log_start")

    def stop_dirty_log(self) -> None:
        """Stop logging, and forget."""
        self._control.call("dirty_log_stop")

    def dirty_log(self) -> PackedBitmap:
        """Take the log: read and clear, answered by the loop that marks (as KVM_GET_DIRTY_LOG)."""
        return PackedBitmap.from_bytes(self._control.call("dirty_log").payload, self._pages)

    def start_journal(self) -> None:
        """Keep a journal of what it writes, from now on."""
        self._control.call("journal_start")

    def journal(self, first: int, pages: int) -> Rows:
        """Return its newest writes to RAM pages, oldest first; none if it keeps no journal."""
        return np.frombuffer(self._control.call("journal", first=first, pages=pages).payload, JOURNAL_ROW)

    def throttle(self, percent: int) -> None:
        """Let it run only (100 - percent) % of the time."""
        self._control.call("throttle", percent=percent)

    def report(self) -> dict[str, Any]:
        """Return what the guest's programs say of themselves."""
        return self._control.call("report").header

    def close(self) -> None:
        """End the process."""
        self._control.close()
        self._trap_socket.close()
        self.process.terminate()
        self.process.wait()


def _serve_traps(sock: socket.socket, traps: Mapping[str, Handler]) -> None:
    """Answer traps until the vCPU process closes, or says what is no trap: then it is hung up, and ends."""
    try:
        serve(sock, traps)
    except (ValueError, OSError) as error:
        _log.error("traps ended", cause=str(error))
    finally:
        sock.close()
