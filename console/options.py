"""What commands take: the checks of arguments, and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from common.machine.quantities import parse_duration
from common.rpc.versions import MAX_RECONNECT_SECONDS

__all__ = ["Address", "AsJson", "Tls", "parse_address", "parse_directory", "parse_names", "parse_patience", "positive"]


def positive(parse: Callable[[str], float]) -> Callable[[str], float]:
    """Make a parser of a quantity that refuses what is not more than 0."""

    # The calls take 0 for "not given", so it must not be given.
    def checked(text: str) -> float:
        value = _parsed(parse, text)
        if value <= 0:
            raise typer.BadParameter(f'"{text}" is not more than 0')
        return value

    return checked


def _parsed(parse: Callable[[str], float], text: str) -> float:
    """Return a quantity; 0 needs no unit."""
    try:
        return 0.0 if text == "0" else parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def parse_patience(text: str) -> float:
    """Return a duration of up to an hour in seconds, 0 too."""
    seconds = _parsed(parse_duration, text)
    if seconds > MAX_RECONNECT_SECONDS:
        raise typer.BadParameter(f'"{text}" is more than an hour')
    return seconds


def parse_address(text: str) -> str:
    """Check HOST:PORT."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})", text, re.ASCII)
    if found is None or int(found[2]) > 65_535:
        raise typer.BadParameter(f'"{text}" is not an address; write it like "host1:7700" or "127.0.0.1:7700"')
    return text


def parse_directory(text: str) -> Path:
    """Return a path at which there is a directory, or nothing yet."""
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise typer.BadParameter(f'"{text}" is not a directory')
    return path


def parse_names(text: str) -> frozenset[str]:
    """Return the names of a list with commas."""
    names = frozenset(text.split(","))
    if "" in names:
        raise typer.BadParameter(f'"{text}" is not NAME,NAME,…')
    return names


Address = Annotated[str, typer.Argument(parser=parse_address, metavar="HOST:PORT", help="The daemon's address.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Tls = Annotated[
    Path | None,
    typer.Option(
        "--tls",
        envvar="SWITCHOVER_TLS",
        parser=parse_directory,
        metavar="DIRECTORY",
        help="Use TLS, with the certificates and keys in this directory (see switchover certs).",
    ),
]
