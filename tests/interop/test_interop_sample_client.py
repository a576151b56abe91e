"""libvfio-user's sample client migrates our sample device, theirs, and one to the other.

The client compares the device's memory, and waits for interrupts and DMA at both ends. It forks, and the parent becomes
the destination: the program `server` beside it. Ours starts the server, and ends as the client does, its child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from our_device import COMMAND, serving

pytestmark = pytest.mark.interop

MIGRATION_SECONDS = 60.0


DESTINATION = """#!{python}
import os, subprocess, sys
server = subprocess.Popen([*{command!r}, sys.argv[-1]])
pid, status = os.wait()
if pid == server.pid:
    sys.exit("the destination has ended")
server.terminate()
server.wait()
sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
"""


@pytest.mark.parametrize(("source", "destination"), [("ours", "ours"), ("ours", "theirs"), ("theirs", "ours")])
def test_migrates(tmp_path: Path, sample_client: Path, sample_server: Path, source: str, destination: str) -> None:
    commands = {"ours": (*COMMAND, "sample", "--socket"), "theirs": (str(sample_server),)}
    client, server, socket = (tmp_path / name for name in ("client", "server", "device.sock"))
    client.symlink_to(sample_client)
    server.write_text(DESTINATION.format(python=sys.executable, command=commands[destination]))
    server.chmod(0o755)
    with serving(commands[source], socket), (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([client, socket], stdout=log, stderr=log, process_group=0)
        try:
            status = process.wait(MIGRATION_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        assert status == 0, log.read()
