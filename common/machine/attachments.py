"""Where this host finds the devices of a machine that somebody else serves.

Both hosts need to know it, each for itself: a machine's description travels without sockets and commands, so no peer
can make a host connect to something, or start something, that its own operator has not named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.machine.config import MachineSpec
from common.machine.device_config import Attachment, take_attachment
from common.machine.fields import FieldError, Table, name
from common.machine.toml_file import read_toml

__all__ = ["attachments_of", "read_attachments", "with_attachments", "without_attachments"]

MAX_DEVICES = 1024


def read_attachments(path: Path) -> dict[str, Attachment]:
    """Read a file of [[device]] tables with `name`, and `socket` or `command` or both; ConfigError names the line."""

    def read(document: Mapping[str, Any]) -> dict[str, Attachment]:
        top = Table(document, (), "at the top level")
        found: dict[str, Attachment] = {}
        for table in top.tables("device", MAX_DEVICES):
            device = table.take("name", name)
            attachment = take_attachment(table, path.absolute().parent)
            table.finish()
            if attachment is None:
                raise FieldError(table.path, f'device "{device}" has neither socket nor command')
            if device in found:
                raise FieldError((*table.path, "name"), f'two devices have the name "{device}"')
            found[device] = attachment
        top.finish()
        return found

    return read_toml(path, read)


def attachments_of(spec: MachineSpec) -> dict[str, Attachment]:
    """Return what a machine's own file says of its devices."""
    return {device.name: device.attachment for device in spec.devices if device.attachment is not None}


def without_attachments(spec: MachineSpec) -> MachineSpec:
    """Return the description for a peer, which has to say itself where it finds the devices."""
    return replace(
        spec,
        devices=tuple(
            device if device.attachment is None else replace(device, attachment=Attachment()) for device in spec.devices
        ),
    )


def with_attachments(spec: MachineSpec, known: Mapping[str, Attachment]) -> MachineSpec:
    """Return the description of a machine of this host; LookupError names a device of which nothing is known here.

    ValueError if it brings a socket or a command, which are not a peer's to say.
    """
    devices = []
    for device in spec.devices:
        if device.attachment is None:
            devices.append(device)
            continue
        if device.attachment != Attachment():
            raise ValueError(f"{device.name}: a peer does not say where a host finds its devices")
        if device.name not in known:
            raise LookupError(
                f"device {device.name} is served by somebody else, and this host was not told where: "
                f"--device-socket {device.name}=PATH"
            )
        devices.append(replace(device, attachment=known[device.name]))
    return replace(spec, devices=tuple(devices))
