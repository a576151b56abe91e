"""A device process: python -m common.devices KIND --name NAME --socket PATH [--knobs JSON].

It listens at PATH, serves one client, and ends when that client goes, or on SIGTERM or Ctrl-C. A device has nothing to
save: when its process ends, that is its power failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from common.devices.base import EmulatedDevice
from common.devices.knobs import parse
from common.memory.allocator import tune_allocator
from common.vfio_user.server import VfioUserServer, listen

__all__ = ["KINDS", "build", "main"]

KINDS = ("accelerator", "nic", "nvme", "sample")
_SWITCH_INTERVAL = 0.0005  # seconds: a command must not wait for the engine's turn of the interpreter (default: 0.005)


def build(kind: str, name: str, knobs: dict[str, Any]) -> EmulatedDevice:
    """Return a device that is ready to be served; raise ValueError with a sentence if a knob is wrong."""
    # A process is one kind of device: what it imports is most of the time that it takes to start.
    if kind == "accelerator":
        from common.devices.accelerator import Accelerator, AcceleratorKnobs

        return Accelerator(name, parse(AcceleratorKnobs, knobs))
    if kind == "nic":
        from common.devices.nic import Nic, NicKnobs

        return Nic(name, parse(NicKnobs, knobs))
    if kind == "nvme":
        from common.devices.nvme import Nvme, NvmeKnobs

        return Nvme(name, parse(NvmeKnobs, knobs))
    if kind == "sample":
        from common.devices.sample import Sample, SampleKnobs

        return Sample(name, parse(SampleKnobs, knobs))
    raise ValueError(f'no such kind of device: "{kind}" (there are {", ".join(KINDS)})')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a device; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.devices", description="Run an emulated VFIO device.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--name", required=True, help="what messages call the device")
    parser.add_argument("--socket", required=True, type=Path, help="where to listen (vfio-user)")
    parser.add_argument("--knobs", default="{}", help="a JSON object")
    parser.add_argument(
        "--once",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end when the first client goes; without it, go on as a new device for the next",
    )
    options = parser.parse_args(arguments)
    try:
        knobs = json.loads(options.knobs)
        if not isinstance(knobs, dict):
            raise ValueError("knobs are not a JSON object")  # noqa: TRY004 - of what is given, not of the program
        device = build(options.kind, options.name, knobs)
        _prepare(options.socket)  # before: whoever sees the socket may send a signal
        listener = listen(options.socket)
    except ValueError as error:
        print(f"{options.name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{options.name}: cannot listen at {options.socket}: {error.strerror or error}", file=sys.stderr)
        return 1
    if not options.once:
        print(f"{options.name}: listening at {options.socket}", flush=True)
    try:
        with listener:
            while True:
                client, _ = listener.accept()
                VfioUserServer(device, client).serve()
                if options.once:
                    return 0
                device = build(options.kind, options.name, knobs)
    finally:
        options.socket.unlink(missing_ok=True)


def _prepare(path: Path) -> None:
    """Set up what concerns the whole process."""

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        path.unlink(missing_ok=True)
        os._exit(0)

    def engine_failed(arguments: threading.ExceptHookArgs) -> None:
        # A device whose engine is gone would look alive for ever.
        threading.__excepthook__(arguments)
        os._exit(70)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, terminate)
    threading.excepthook = engine_failed
    tune_allocator()
    sys.setswitchinterval(_SWITCH_INTERVAL)


if __name__ == "__main__":
    sys.exit(main())
