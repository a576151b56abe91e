"""Talking to a daemon: a stub to call, and one line for whatever goes wrong.

What a daemon says may come from another host, so nothing of it reaches a terminal as it is: `printable` for text,
`plain_data` for messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from switchover.v1.host_pb2_grpc import HostServiceStub

from common.rpc.channel import open_channel
from common.rpc.errors import describe
from common.rpc.tls import TlsError, channel_credentials
from console.errors import CommandError
from console.exit_codes import ExitCode

__all__ = ["QUICK_CALL_S", "SLOW_CALL_S", "daemon", "plain_data", "printable"]

QUICK_CALL_S = 10.0  # for calls that only look or note something
SLOW_CALL_S = 120.0  # for calls that start or stop processes

_UNREACHABLE = frozenset({"UNREACHABLE", "NO_ANSWER", "NOT_SWITCHOVER"})


@contextmanager
def daemon(address: str, tls: Path | None = None) -> Iterator[HostServiceStub]:
    """Connect to the daemon at HOST:PORT; calls that fail in the block become `CommandError`.

    `tls` is a directory as `common.rpc.tls` reads.
    """
    try:
        credentials = channel_credentials(tls) if tls is not None else None
    except TlsError as error:
        raise CommandError(str(error), ExitCode.USAGE) from error
    with open_channel(address, credentials) as channel:
        try:
            yield HostServiceStub(channel)
        except grpc.RpcError as error:
            reason, message = describe(error)
            code = ExitCode.UNREACHABLE if reason in _UNREACHABLE else ExitCode.FAILED
            suffix = "" if reason in _UNREACHABLE else f" [{reason}]"
            raise CommandError(f"{address}: {printable(message + suffix)}", code, reason) from error


def printable(text: str) -> str:
    """Return text without anything that a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def plain_data(message: Message) -> dict[str, Any]:
    """Return a message as plain data, field by field in the names of the .proto; null: a message that is not set.

    Unlike protobuf's own JSON, 64-bit integers stay numbers, and members of a oneof that are not set are left out.
    """
    return {
        field.name: _field(message, field)
        for field in message.DESCRIPTOR.fields
        if field.containing_oneof is None or message.HasField(field.name)
    }


# `field` is a FieldDescriptor, of which protobuf has a class for each of its implementations.
def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(sorted(value.items()))
    if field.is_repeated:
        return [_plain(element, field) for element in value]
    if field.message_type is not None and not message.HasField(field.name):
        return None
    return _plain(value, field)


def _plain(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return plain_data(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    # Three decimals of a millisecond or of a byte per second are more than anyone can measure.
    return round(value, 3) if isinstance(value, float) else value
