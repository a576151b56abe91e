"""A vfio-user conversation as a file: one message a line, in the order in which they passed.

A line is a JSON object: who sent the message (`from`: "client" or "server"), the header's `id`, `command`, `flags` and
`error`, how many descriptors came with it (`fds`), and the `body` in hexadecimal. What the descriptors are is not said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Literal

from common.vfio_user.codec import FLAG_REPLY, FLAG_TYPE_MASK, HEADER_SIZE, MAX_REPLY_SIZE, Command, Header

__all__ = ["MAX_FDS", "Recorded", "Sender", "TranscriptError", "name_of", "pair", "read", "write"]

Sender = Literal["client", "server"]

MAX_FDS: Final = 253
"""Descriptors that one message can have (kernel: SCM_MAX_FD)."""

_LIMITS: Final = {"id": 0xFFFF, "command": 0xFFFF, "flags": 0xFFFF_FFFF, "error": 0xFFFF_FFFF, "fds": MAX_FDS}
_KEYS: Final = ("from", *_LIMITS, "body")


class TranscriptError(ValueError):
    """A line that is no message, by its number."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A message of a conversation; `fds` descriptors came with it."""

    sender: Sender
    header: Header
    fds: int
    body: bytes

    @property
    def opens_twin_socket(self) -> bool:
        """Whether from here on the server asks on a socket of its own, which passed as a descriptor."""
        return self.header.command == Command.VERSION and self.header.is_reply and self.fds > 0


def name_of(command: int) -> str:
    """Return the name of a command, or its number."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def write(file: BinaryIO, message: Recorded) -> None:
    """Append a message; the whole line is in the file when this returns."""
    header = message.header
    values = (message.sender, header.message_id, header.command, header.flags, header.error, message.fds)
    line = json.dumps(dict(zip(_KEYS, (*values, message.body.hex()), strict=True)))
    file.write(line.encode() + b"\n")
    file.flush()


def read(lines: Iterable[bytes]) -> list[Recorded]:
    """Read a transcript; TranscriptError for a line that is no message, or a reply to nothing."""
    messages = []
    for number, line in enumerate(lines, start=1):
        try:
            messages.append(_message(line))
        except ValueError as error:
            raise TranscriptError(number, str(error)) from None
    pair(messages)
    return messages


def pair(messages: Sequence[Recorded]) -> dict[int, int]:
    """Return the index of the reply for that of each command that has one.

    Ids belong to the sender and may repeat: a reply is to the oldest open command that it fits.
    """
    replies: dict[int, int] = {}
    waiting: list[int] = []
    for index, message in enumerate(messages):
        if not message.header.is_reply:
            waiting.append(index)
            continue
        for command in waiting:
            asked = messages[command]
            if asked.sender != message.sender and asked.header[:2] == message.header[:2]:
                break
        else:
            raise TranscriptError(index + 1, f"a reply to no {name_of(message.header.command)} with this id")
        waiting.remove(command)
        replies[command] = index
    return replies


def _message(line: bytes) -> Recorded:
    if not line.endswith(b"\n"):
        raise ValueError("the file ends within it")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict) or set(row) != set(_KEYS):
        raise ValueError(f"not an object of {', '.join(_KEYS)}")
    sender = row["from"]
    if sender not in ("client", "server"):
        raise ValueError('"from" is neither "client" nor "server"')
    numbers = {key: _number(row, key, limit) for key, limit in _LIMITS.items()}
    if numbers["flags"] & FLAG_TYPE_MASK > FLAG_REPLY:
        raise ValueError(f'"flags" is neither that of a command nor of a reply: {numbers["flags"]}')
    try:
        body = bytes.fromhex(row["body"])
    except (TypeError, ValueError):
        raise ValueError('"body" is not hexadecimal') from None
    if len(body) > MAX_REPLY_SIZE - HEADER_SIZE:
        raise ValueError(f'"body" has {len(body)} bytes, at most {MAX_REPLY_SIZE - HEADER_SIZE} are possible')
    size = HEADER_SIZE + len(body)
    header = Header(numbers["id"], numbers["command"], size, numbers["flags"], numbers["error"])
    return Recorded(sender, header, numbers["fds"], body)


def _number(row: dict[str, Any], key: str, limit: int) -> int:
    value = row[key]
    if type(value) is int and 0 <= value <= limit:
        return value
    raise ValueError(f'"{key}" is not a number from 0 to {limit}')
