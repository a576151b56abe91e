"""The commands that run daemons: arguments in, exit codes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from common.host.operation import OnSigterm, Operation
from common.log_format import LOG_FORMAT, LogFormat
from common.machine.attachments import read_attachments
from common.machine.device_config import DEVICE_KINDS, Attachment
from console.errors import CommandError
from console.exit_codes import ExitCode
from console.options import Tls, parse_address, parse_directory, parse_names, parse_patience

__all__ = ["destination", "host", "source"]

DEFAULT_LISTEN = "127.0.0.1:7700"
DEFAULT_MAX_RECONNECT = "300s"

Listen = Annotated[
    str,
    typer.Option(
        parser=parse_address, metavar="HOST:PORT", help="Where to listen; port 0 takes a free one and prints it."
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        parser=parse_directory,
        metavar="DIRECTORY",
        help="Where machines and records of handovers live; it must outlive the daemon. "
        "Default: switchover/ROLE in $XDG_STATE_HOME or ~/.local/state.",
    ),
]
MachineFile = Annotated[
    Path | None, typer.Option("--machine", dir_okay=False, help="The machine to start (machine.toml).")
]


Insecure = Annotated[
    bool, typer.Option("--insecure", help="Listen beyond loopback without TLS: whoever reaches the port is served.")
]
AllowSource = Annotated[
    frozenset[str] | None,
    typer.Option(parser=parse_names, metavar="NAME,…", help="Names in certificates of hosts that may migrate to here."),
]
AllowOperator = Annotated[
    frozenset[str] | None,
    typer.Option(
        parser=parse_names, metavar="NAME,…", help="Names in certificates that may move, pause or stop machines."
    ),
]
LanePort = Annotated[
    int,
    typer.Option(min=0, max=65_535, help="Port for page lanes of the kind tcp; 0: a free one for each migration."),
]
Devices = Annotated[
    str | None,
    typer.Option(metavar="KIND,…", help="Kinds of devices that machines which come here may have; default: all."),
]


DeviceSockets = Annotated[
    list[str] | None,
    typer.Option("--device-socket", metavar="NAME=PATH", help="Where to find a device that somebody else serves."),
]
DeviceFile = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="The same for several devices, and commands that start them (TOML)."),
]


LogAs = Annotated[
    LogFormat,
    typer.Option("--log-format", envvar=LOG_FORMAT, help="Log for people, or a JSON object per line."),
]


MetricsAt = Annotated[
    str | None,
    typer.Option(
        "--metrics", parser=parse_address, metavar="HOST:PORT", help="Where Prometheus may ask; default: nowhere."
    ),
]


MaxReconnect = Annotated[
    float,
    typer.Option(
        parser=parse_patience,
        metavar="DURATION",
        help="How long at most an arrival is kept whose source cannot be reached.",
    ),
]


AtTheEnd = Annotated[
    OnSigterm,
    typer.Option(help="On SIGTERM or Ctrl-C, end a migration that runs, or finish it first. A second one ends it."),
]


def _kinds(devices: str | None) -> dict[str, list[str]]:
    if devices is None:
        return {}
    kinds = [kind for kind in devices.split(",") if kind]
    if unknown := sorted(set(kinds) - set(DEVICE_KINDS)):
        known = ", ".join(DEVICE_KINDS)
        raise CommandError(f"no such kind of device: {', '.join(unknown)}; there are: {known}", ExitCode.USAGE)
    return {"device_kinds": kinds}


def _attachments(sockets: list[str] | None, file: Path | None) -> dict[str, Attachment]:
    found = read_attachments(file) if file is not None else {}
    for text in sockets or ():
        name, separator, path = text.partition("=")
        if not (separator and name and path):
            raise CommandError(f'--device-socket "{text}" is not NAME=PATH', ExitCode.USAGE)
        found[name] = replace(found.get(name, Attachment()), socket=str(Path(path).expanduser().absolute()))
    return found


def source(
    *,
    listen: Listen = DEFAULT_LISTEN,
    machine: MachineFile = None,
    state_dir: StateDir = None,
    tls: Tls = None,
    insecure: Insecure = False,
    allow_operator: AllowOperator = None,
    log_format: LogAs = LogFormat.CONSOLE,
    metrics: MetricsAt = None,
    on_sigterm: AtTheEnd = OnSigterm.ABORT,
) -> int:
    """Run the daemon that machines leave from."""
    from common.host.network import Network
    from common.rpc.access import Access
    from source.daemon import run

    network = Network(listen, tls, insecure=insecure, access=Access(operators=allow_operator), metrics=metrics)
    return run(network, machine, state_dir, operation=Operation(log_format, on_sigterm))


def destination(
    *,
    listen: Listen = DEFAULT_LISTEN,
    state_dir: StateDir = None,
    lane_port: LanePort = 0,
    devices: Devices = None,
    device_sockets: DeviceSockets = None,
    device_file: DeviceFile = None,
    tls: Tls = None,
    insecure: Insecure = False,
    allow_source: AllowSource = None,
    allow_operator: AllowOperator = None,
    log_format: LogAs = LogFormat.CONSOLE,
    metrics: MetricsAt = None,
    on_sigterm: AtTheEnd = OnSigterm.ABORT,
    max_reconnect: MaxReconnect = DEFAULT_MAX_RECONNECT,  # type: ignore[assignment]  # typer parses a default too
) -> int:
    """Run the daemon that machines arrive at."""
    from common.host.network import Network
    from common.rpc.access import Access
    from destination.daemon import run

    access = Access(allow_source, allow_operator)
    network = Network(listen, tls, insecure=insecure, access=access, metrics=metrics, lane_port=lane_port)
    return run(
        network,
        state_dir,
        **_kinds(devices),
        attachments=_attachments(device_sockets, device_file),
        operation=Operation(log_format, on_sigterm, max_reconnect),
    )


def host(
    *,
    listen: Listen = DEFAULT_LISTEN,
    machine: MachineFile = None,
    state_dir: StateDir = None,
    lane_port: LanePort = 0,
    devices: Devices = None,
    device_sockets: DeviceSockets = None,
    device_file: DeviceFile = None,
    tls: Tls = None,
    insecure: Insecure = False,
    allow_source: AllowSource = None,
    allow_operator: AllowOperator = None,
    log_format: LogAs = LogFormat.CONSOLE,
    metrics: MetricsAt = None,
    on_sigterm: AtTheEnd = OnSigterm.ABORT,
    max_reconnect: MaxReconnect = DEFAULT_MAX_RECONNECT,  # type: ignore[assignment]  # typer parses a default too
) -> int:
    """Run both daemons in one: machines arrive and leave."""
    from common.host.network import Network
    from common.rpc.access import Access
    from console.host import run

    access = Access(allow_source, allow_operator)
    network = Network(listen, tls, insecure=insecure, access=access, metrics=metrics, lane_port=lane_port)
    return run(
        network,
        machine,
        state_dir,
        **_kinds(devices),
        attachments=_attachments(device_sockets, device_file),
        operation=Operation(log_format, on_sigterm, max_reconnect),
    )
