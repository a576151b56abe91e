"""Ways to spoil a valid input: each takes bytes and a random generator, and returns other bytes.

A mutation that knows the structure keeps most of it right, so that what is wrong is looked at where it matters and not
refused with the first byte.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

__all__ = ["MAX_INPUT", "Mutation", "of_bytes", "of_json", "of_message", "of_records", "of_text"]

MAX_INPUT = 256 << 10
Mutation = Callable[[bytes, random.Random], bytes]

_EDGES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFF, 0x1000, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFF_FFFF, 0xFFFF_FFFF)
_WIDE = (*_EDGES, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 0x1000, (1 << 64) - 1)


def number(rng: random.Random, bits: int) -> int:
    """Return a number of so many bits: one at the edge of something, one near it, or any."""
    value = rng.choice((*_WIDE, rng.getrandbits(bits)))
    return (value + rng.choice((0, 0, 0, 1, -1))) % (1 << bits)


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Spoil bytes of which nothing is known."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(spoilt) + 1)
        match rng.randrange(7):
            case 0 if spoilt:
                spoilt[at - 1] ^= 1 << rng.randrange(8)
            case 1 if spoilt:
                spoilt[at - 1] = rng.randrange(256)
            case 2:
                width = rng.choice((1, 2, 4, 8))
                at -= at % width
                spoilt[at : at + width] = number(rng, 8 * width).to_bytes(width, rng.choice(("little", "big")))
            case 3:
                del spoilt[at : at + rng.choice((1, 2, 4, 8, 64, len(spoilt)))]
            case 4:
                spoilt[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))
            case 5:
                piece = spoilt[at : at + rng.choice((1, 8, 64, 4096))]
                spoilt[at:at] = piece * rng.choice((1, 2, 16))
            case _:
                del spoilt[at:]
    return bytes(spoilt[:MAX_INPUT])


def of_records(
    cut: Callable[[bytes], list[bytes]], spoil: Callable[[bytes, random.Random], bytes], join: bytes = b""
) -> Mutation:
    """Make a mutation of a sequence: `cut` finds its records, `spoil` changes one of them."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        records = cut(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            if not records:
                break
            at = rng.randrange(len(records))
            match rng.randrange(8):
                case 0:
                    del records[at]
                case 1:
                    records.insert(rng.randrange(len(records) + 1), records[at])
                case 2:
                    other = rng.randrange(len(records))
                    records[at], records[other] = records[other], records[at]
                case 3:
                    del records[at + 1 :]
                case _:
                    records[at] = spoil(records[at], rng)
        return join.join(records)[:MAX_INPUT]

    return mutate


_SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, float("inf"), float("nan"), 1 << 63, 1 << 64, 10**30, 10**400),
    *(
        "",
        "a",
        "0",
        "nic0",
        "../../x",
        "\0",
        "\n",
        "\ud800",
        "é" * 40,
        "a" * 5000,
        "1GiB",
        "on",
        "~nobody/x",
        "/" * 300,
    ),
    *([], {}, [[]], [{}], {"": None}),
)


def of_json(data: bytes, rng: random.Random) -> bytes:
    """Spoil a JSON text: a value, a key, a part of it moved elsewhere, or its characters."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return of_bytes(data, rng)
    choice = rng.randrange(20)
    if choice == 0:
        return of_bytes(data, rng)
    if choice == 1:
        depth = rng.choice((10, 500, 3000, 100_000))
        return data.replace(rng.choice((b"0", b'""', b"null", b"true")), b"[" * depth + b"]" * depth, 1)[:MAX_INPUT]
    for _ in range(rng.choice((1, 1, 2, 4))):
        document = _spoil_value(document, rng)
    try:
        return json.dumps(document).encode()[:MAX_INPUT]
    except (RecursionError, ValueError):
        return data


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        found.append((value, key))
        _places(member, found)


def _spoil_value(document: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []
    _places(document, places)
    if not places or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(_SCALARS))
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("", "x", "name", "kind", "size", "\ud800", "a" * 100))] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key]) for _ in range(rng.choice((1, 2, 100)))]
        case 3:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        case 4 if isinstance(holder[key], int | float):
            holder[key] = rng.choice(
                (holder[key] + 1, holder[key] - 1, -holder[key], number(rng, 64), str(holder[key]))
            )
        case 5 if isinstance(holder[key], str):
            holder[key] = of_bytes(holder[key].encode(errors="replace"), rng).decode(errors="surrogateescape")
        case _:
            holder[key] = copy.deepcopy(rng.choice(_SCALARS))
    return document


def of_text(words: Sequence[str]) -> Mutation:
    """Make a mutation of lines of text that puts `words` into them."""

    def spoil(line: bytes, rng: random.Random) -> bytes:
        match rng.randrange(4):
            case 0:
                return of_bytes(line, rng)
            case 1:
                name, _, _ = line.partition(b"=")
                return name + b"= " + rng.choice(words).encode()
            case 2:
                _, _, value = line.partition(b"=")
                return rng.choice(words).encode() + b" =" + value
            case _:
                at = rng.randrange(len(line) + 1)
                return line[:at] + rng.choice(words).encode() + line[at:]

    return of_records(lambda data: data.split(b"\n"), spoil, b"\n")


def of_message(kind: type[Message], nested: dict[str, Mutation]) -> Mutation:
    """Make a mutation of a protobuf message, field by field; `nested` spoil string and bytes fields of that name."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        try:
            message = kind.FromString(data)
        except DecodeError:
            return of_bytes(data, rng)
        if rng.randrange(10) == 0:
            return of_bytes(data, rng)
        for _ in range(rng.choice((1, 1, 2, 4))):
            _spoil_message(message, rng, nested)
        return message.SerializeToString()[:MAX_INPUT]

    return mutate


def _spoil_message(message: Message, rng: random.Random, nested: dict[str, Mutation]) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if field.is_repeated:
        match rng.randrange(5):
            case 0 if value:
                del value[rng.randrange(len(value))]
            case 1 if value:
                value.extend([value[rng.randrange(len(value))]] * rng.choice((1, 2, 300)))
            case 2 if value:
                value.MergeFrom(value[: rng.randrange(len(value) + 1)])
            case _ if field.type == FieldDescriptor.TYPE_MESSAGE:
                _spoil_message(rng.choice(value) if value else value.add(), rng, nested)
            case _:
                spoilt = _scalar(field, value[0] if value else None, rng, nested)
                if value:
                    value[rng.randrange(len(value))] = spoilt
                else:
                    value.append(spoilt)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        _spoil_message(value, rng, nested)
    elif rng.randrange(8) == 0:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, value, rng, nested))


def _scalar(field: FieldDescriptor, value: Any, rng: random.Random, nested: dict[str, Mutation]) -> Any:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            spoil = nested.get(field.name, of_bytes)
            return spoil((value or "").encode(), rng).decode(errors="replace")
        case FieldDescriptor.TYPE_BYTES:
            return nested.get(field.name, of_bytes)(value or b"", rng)
        case FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.TYPE_ENUM | FieldDescriptor.TYPE_INT32 | FieldDescriptor.TYPE_INT64:
            return rng.choice((-1, 0, 1, 2, 3, 4, 5, 6, 7, 0x7FFF_FFFF))
        case FieldDescriptor.TYPE_UINT32 | FieldDescriptor.TYPE_FIXED32:
            return rng.choice((number(rng, 32), ((value or 0) + 1) & 0xFFFF_FFFF))
        case FieldDescriptor.TYPE_DOUBLE:
            return rng.choice((0.0, -1.0, 0.5, 1e9, 1e308, float("inf"), float("-inf"), float("nan")))
        case _:
            return rng.choice((number(rng, 64), ((value or 0) + 1) & (1 << 64) - 1))


def put(layout: struct.Struct, values: Sequence[int], rng: random.Random) -> bytes:
    """Pack a fixed part with one of its numbers changed to one that fits."""
    spoilt = list(values)
    at = rng.randrange(len(spoilt))
    spoilt[at] = number(rng, 64)
    while True:
        try:
            return layout.pack(*spoilt)
        except struct.error:
            spoilt[at] >>= 16
