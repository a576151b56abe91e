"""The commands for authors of vfio-user devices and their clients: they need no daemon."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from common.machine.quantities import parse_duration
from console.options import AsJson, positive

__all__ = ["capture", "check", "device", "replay"]


def device(
    kind: Annotated[str, typer.Argument(help="The kind of device, as in the machine file.")],
    *,
    socket: Annotated[Path, typer.Option(metavar="PATH", dir_okay=False, help="Where to listen.")],
    name: Annotated[str | None, typer.Option(help="What messages call it.")] = None,
    knobs: Annotated[
        list[str] | None, typer.Option("--knob", metavar="KEY=VALUE", help="A knob, as in the machine file.")
    ] = None,
) -> int:
    """Serve an emulated device to any vfio-user client, one after the other, until Ctrl-C."""
    from console.device import run

    return run(kind, socket, name, knobs or ())


def check(
    socket: Annotated[
        Path | None, typer.Argument(metavar="[SOCKET]", help="Where the device's vfio-user server listens.")
    ] = None,
    *,
    command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Or how a server is started, with {socket} where the path belongs."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run these checks: a name, a pattern with *, or a subject. Repeatable."),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(parser=positive(parse_duration), metavar="DURATION", help="Longest time that an answer may take."),
    ] = "5s",  # type: ignore[assignment]  # as above
    as_json: AsJson = False,
    junit: Annotated[
        Path | None, typer.Option("--junit", dir_okay=False, metavar="FILE", help="Write a JUnit report to FILE.")
    ] = None,
) -> int:
    """Check that a vfio-user device does what the specification says of its migration."""
    from console.check import check as run

    return run(socket, command, only=only or [], answer=timeout, as_json=as_json, junit_file=junit)


class Side(StrEnum):
    """Which side of a transcript is played."""

    CLIENT = "client"
    SERVER = "server"


Transcript = Annotated[Path, typer.Argument(metavar="FILE", help="The transcript: a message a line.")]


def capture(
    file: Transcript,
    *,
    listen: Annotated[Path, typer.Option(metavar="PATH", help="The socket to make for a vfio-user client.")],
    connect: Annotated[Path, typer.Option(metavar="PATH", help="The socket of the vfio-user server.")],
    as_json: AsJson = False,
) -> None:
    """Record what a vfio-user client and a server say to each other, until either goes, or Ctrl-C."""
    from console.transcript import capture as run

    run(listen, connect, file, as_json=as_json)


def replay(
    file: Transcript,
    *,
    side: Annotated[Side, typer.Option("--as", help="Which side to play.")],
    connect: Annotated[Path | None, typer.Option(metavar="PATH", help="As client: the server's socket.")] = None,
    listen: Annotated[
        Path | None, typer.Option(metavar="PATH", help="As server: the socket to make for a client.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(parser=positive(parse_duration), metavar="DURATION", help="Longest wait for a reply.")
    ] = "10s",  # type: ignore[assignment]  # as --max-downtime
    data: Annotated[
        bool, typer.Option("--data", help="Count differences in what regions, states and bitmaps contain, too.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Play one side of a recorded vfio-user conversation, and tell where the other departs from it."""
    from console.transcript import replay as run

    match side, connect, listen:
        case (Side.CLIENT, Path() as path, None) | (Side.SERVER, None, Path() as path):
            return run(side.value, file, path, timeout, data=data, as_json=as_json)
        case _:
            raise typer.BadParameter("--as client needs --connect, --as server needs --listen, and not the other")
