"""The command `switchover device`: one of our devices, for any vfio-user client."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.devices.__main__ import main as serve
from common.machine.device_config import read_devices
from common.machine.fields import FieldError, Table
from console.errors import CommandError
from console.exit_codes import ExitCode

__all__ = ["run"]


def run(kind: str, socket: Path, name: str | None, knobs: Sequence[str]) -> int:
    """Serve one client after the other until a signal; return the exit code.

    `knobs`: KEY=VALUE with keys and values of the machine file, where strings may go without quotes.
    """
    given: dict[str, Any] = dict(map(_knob, knobs))
    table = {"kind": kind, **({} if name is None else {"name": name}), **given}
    try:
        (device,) = read_devices([Table(table, (), "of a device")], None)
    except FieldError as error:
        raise CommandError(str(error), ExitCode.USAGE) from error
    for key in given:
        if key not in device.knobs:
            raise CommandError(f'"{key}" says what a machine does with a device; it is no knob', ExitCode.USAGE)
    return serve(
        [kind, "--name", device.name, "--socket", str(socket), "--knobs", json.dumps(device.knobs), "--no-once"]
    )


def _knob(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not (separator and key and value):
        raise CommandError(f'--knob "{text}" is not KEY=VALUE', ExitCode.USAGE)
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
