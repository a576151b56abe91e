"""Devices as a user serves them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 20.0
COMMAND = (sys.executable, "-m", "console", "device")


@contextmanager
def serving(command: Sequence[str], socket: Path) -> Iterator[None]:
    """Serve a device at a socket, whose path ends the command; ours says nothing wrong and leaves nothing behind."""
    process = subprocess.Popen([*command, str(socket)], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + START_SECONDS
        while not socket.is_socket():
            assert process.poll() is None, "it has ended"
            assert time.monotonic() < end, "it does not listen"
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=START_SECONDS)
    if command[: len(COMMAND)] == COMMAND:
        assert (process.returncode, errors) == (0, "")
        assert not socket.exists()
