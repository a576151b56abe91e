"""What a device of a machine is: its table in the machine file, checked, and its part of the description.

A device is ours, emulated in a process that the machine starts, or somebody else's: any vfio-user server that listens
at a socket. Where that is, and the command that starts it, is each host's own affair (`Attachment`): it is written in
files of that host, and never taken from a peer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from common.machine.fields import (
    Check,
    FieldError,
    Table,
    choice,
    integer,
    integers,
    name,
    on_off,
    path_of,
    rate,
    size,
    sizes,
    strings,
    text,
)
from common.memory.layout import PAGE_SIZE

__all__ = ["DEVICE_KINDS", "FOREIGN", "Attachment", "DeviceSpec", "describe_device", "read_devices", "take_knobs"]

FOREIGN = "vfio-user"
"""The kind of a device of which nothing more is known."""

MAX_SOCKET_PATH = 107  # bytes of a unix socket's name (kernel: UNIX_PATH_MAX)

_FAULT = re.compile(
    r"unlogged|fail_(load|logging_start|logging_report|logging_stop|precopy_info|data_size|read|write|reset|map|unmap)"
    r"|fail:[A-Z0-9_]{1,32}",
    re.ASCII,
)

# Knobs by kind and by program: how a value is checked, and its default (None: left out, the device or program decides).
_COMMON_KNOBS: dict[str, tuple[Check, Any]] = {
    # Sums of 1 (STOP_COPY), 2 (P2P) and 4 (PRE_COPY) that a device may have.
    "migration_flags": (choice(0, 1, 3, 5, 7), None),
    "load_delay_ms": (integer(0, 30_000), None),
    "log_max_bits": (integer(12, 64), None),
    "log_max_ranges": (integer(1, 65_536), None),
    "log_page_sizes": (sizes(PAGE_SIZE, 1 << 30, limit=16), None),
    "faults": (strings(_FAULT, "a fault", 16), None),
}
_DEVICE_KNOBS: dict[str, dict[str, tuple[Check, Any]]] = {
    "nic": {
        "rate": (rate(1, 100 * 10**9), 20_000_000),
        "packet": (integer(64, 65_536), 1500),
        **_COMMON_KNOBS,
    },
    "nvme": {
        "blocks": (integer(1, 1 << 22), 1 << 18),
        "latency_us": (integer(0, 10_000_000), 100),
        **_COMMON_KNOBS,
    },
    "sample": dict(_COMMON_KNOBS),
    "accelerator": {
        # A PCI BAR shows this memory, and BARs are powers of two.
        "memory": (size(64 << 10, 16 << 30, power_of_two=True), 16 << 20),
        "churn": (rate(0, 10 * 10**9), 1_000_000),
        **_COMMON_KNOBS,
    },
}
DEVICE_KINDS = tuple(_DEVICE_KNOBS)


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a host reaches somebody else's device: the path of its socket, and the command that starts it.

    In the command `{socket}` stands for that path; without a path one is made up. Both empty: the host has to say.
    """

    socket: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device: `container` is its address space; `knobs` go to the device as they are (bytes, bytes per second).

    `attachment` None: it is emulated here. `iommu_dirty_tracking` False: the dirty bits of the IOMMU in front of it are
    not used. `pre_copy` "auto": PRE_COPY is used if the device says how much there is to read in it. `compare_bars`
    None: verification reads every BAR that can be read.
    """

    name: str
    kind: str
    container: str = "default"
    migration: str = "auto"  # "auto", "on" or "off"
    pre_copy: str = "auto"  # "auto", "on" or "off"
    device_dirty_tracking: bool = True
    iommu_dirty_tracking: bool = True
    pre_copy_dirty_tracking: bool = True
    compare_bars: tuple[int, ...] | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    attachment: Attachment | None = None


def read_devices(tables: Sequence[Table], base: FilePath | None) -> tuple[DeviceSpec, ...]:
    """Check the tables of devices; `base` is the directory of their file, None for a description.

    Raise `FieldError`.
    """
    devices: list[DeviceSpec] = []
    for table in tables:
        attachment = take_attachment(table, base)
        if attachment is None:
            kind = table.take("kind", choice(*DEVICE_KINDS))
        else:
            kind = table.take("kind", choice(*DEVICE_KINDS, FOREIGN), FOREIGN)
        default = f"{kind}{sum(device.kind == kind for device in devices)}"
        device_name = table.take("name", name, default)
        if any(device.name == device_name for device in devices):
            raise FieldError((*table.path, "name"), f'two devices have the name "{device_name}"')
        device = DeviceSpec(
            device_name,
            kind,
            table.take("container", name, "default"),
            table.take("migration", choice("auto", "on", "off"), "auto"),
            table.take("pre_copy", choice("auto", "on", "off"), "auto"),
            table.take("device_dirty_tracking", on_off, default=True),
            table.take("iommu_dirty_tracking", on_off, default=True),
            table.take("pre_copy_dirty_tracking", on_off, default=True),
            table.take("compare_bars", integers(0, 5, limit=6), None),
            # Somebody else's device has knobs of its own, where it is started.
            {} if attachment is not None else take_knobs(table, _DEVICE_KNOBS[kind]),
            attachment,
        )
        table.finish(elsewhere={knob: other for other, knobs in _DEVICE_KNOBS.items() for knob in knobs})
        devices.append(device)
    return tuple(devices)


def take_attachment(table: Table, base: FilePath | None) -> Attachment | None:
    """Take `socket` and `command` of a table; None if it has neither. A relative socket is relative to `base`."""
    socket = table.take("socket", text, None)
    command = table.take("command", text, None)
    if socket is None and command is None:
        return None
    if base is not None:
        for key, value in (("socket", socket), ("command", command)):
            if value is not None and not value.strip():
                raise FieldError((*table.path, key), f'"{key}" {table.where} is empty')
        try:
            socket = str(path_of(socket, base)) if socket else None
        except ValueError as error:
            raise FieldError((*table.path, "socket"), f'"socket" {table.where} {error}') from error
    if socket and len(socket.encode()) > MAX_SOCKET_PATH:
        raise FieldError(
            (*table.path, "socket"), f"a socket's path has at most {MAX_SOCKET_PATH} bytes, not {len(socket.encode())}"
        )
    return Attachment(socket or "", command or "")


def describe_device(device: DeviceSpec) -> dict[str, Any]:
    """Return a device's part of the description, which `read_devices` reads."""
    return {
        "name": device.name,
        "kind": device.kind,
        "container": device.container,
        "migration": device.migration,
        "pre_copy": device.pre_copy,
        "device_dirty_tracking": "on" if device.device_dirty_tracking else "off",
        "iommu_dirty_tracking": "on" if device.iommu_dirty_tracking else "off",
        "pre_copy_dirty_tracking": "on" if device.pre_copy_dirty_tracking else "off",
        **({} if device.compare_bars is None else {"compare_bars": list(device.compare_bars)}),
        **device.knobs,
        **(
            {}
            if device.attachment is None
            else {"socket": device.attachment.socket, "command": device.attachment.command}
        ),
    }


def take_knobs(table: Table, known: Mapping[str, tuple[Check, Any]]) -> dict[str, Any]:
    """Take the members of a table that are knobs; those without value and default are left out."""
    taken = {knob: table.take(knob, check, default) for knob, (check, default) in known.items()}
    return {knob: value for knob, value in taken.items() if value is not None}
