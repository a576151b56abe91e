"""How a message differs from a recorded one, in the names that the protocol has for its fields."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from common.vfio import feature as vfio
from common.vfio.feature import Buffer, DeviceFeature
from common.vfio_user import codec
from common.vfio_user.codec import FLAG_NO_REPLY, Command, Header
from common.vfio_user.transcript import Recorded, name_of

__all__ = ["Difference", "Kind", "compare"]

Kind = Literal["status", "descriptors", "fields", "data", "order"]

# The fixed parts, in little-endian order without padding; what follows is data.
_FIELDS: Final[Mapping[int, tuple[str, str]]] = {
    Command.VERSION: ("HH", "major minor"),
    Command.DMA_MAP: ("IIQQQ", "argsz flags offset iova size"),
    Command.DMA_UNMAP: ("IIQQQQ", "argsz flags iova size page_size bitmap_size"),
    Command.DEVICE_GET_INFO: ("IIII", "argsz flags num_regions num_irqs"),
    Command.DEVICE_GET_REGION_INFO: ("IIIIQQ", "argsz flags index cap_offset size offset"),
    Command.DEVICE_GET_REGION_IO_FDS: ("IIII", "argsz flags index count"),
    Command.DEVICE_GET_IRQ_INFO: ("IIII", "argsz flags index count"),
    Command.DEVICE_SET_IRQS: ("IIIII", "argsz flags index start count"),
    Command.REGION_READ: ("QII", "offset region count"),
    Command.REGION_WRITE: ("QII", "offset region count"),
    Command.DMA_READ: ("QQ", "iova size"),
    Command.DMA_WRITE: ("QQ", "iova size"),
    Command.DEVICE_FEATURE: ("II", "argsz flags"),
    Command.MIG_DATA_READ: ("II", "argsz size"),
    Command.MIG_DATA_WRITE: ("II", "argsz size"),
}
_FEATURE_FIELDS: Final[Mapping[int, tuple[str, str]]] = {
    DeviceFeature.MIGRATION: ("Q", "migration_flags"),
    DeviceFeature.MIG_DEVICE_STATE: ("Ii", "device_state data_fd"),
    DeviceFeature.DMA_LOGGING_START: ("QII", "page_size num_ranges reserved"),
    DeviceFeature.DMA_LOGGING_STOP: ("QII", "page_size num_ranges reserved"),
    DeviceFeature.DMA_LOGGING_REPORT: ("QQQ", "iova length page_size"),
}
# What follows their fixed parts describes the device as these do: capabilities, areas, ioeventfds.
_NO_DATA: Final = frozenset(
    {Command.VERSION, Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_REGION_IO_FDS, Command.DMA_MAP}
)


@dataclass(frozen=True, slots=True)
class Difference:
    """What is not as recorded: `line` of the transcript, the command's name, what it is about, and a sentence.

    `kind`: "status" (refused or not, and how), "descriptors" (their number), "fields" (the fixed part, and how long
    the rest is), "data" (the rest: contents of regions, state, bitmaps), "order" (it did not come, or was not asked).
    """

    line: int
    command: str
    kind: Kind
    text: str


def compare(line: int, recorded: Recorded, header: Header, fds: int, body: Buffer) -> list[Difference]:
    """Return how a message, a command or a reply with that header, differs from the recorded one; ids do not count."""
    command = recorded.header.command
    found: list[tuple[Kind, str]] = []
    was, now = _status(recorded.header), _status(header)
    if was != now:
        found.append(("status", f"{now} instead of {was}"))
    else:
        if recorded.fds != fds:
            found.append(("descriptors", f"{fds} instead of {recorded.fds}"))
        found += _compare_bodies(command, recorded.body, bytes(body))
    return [Difference(line, name_of(command), kind, text) for kind, text in found]


def _status(header: Header) -> str:
    if not header.is_reply:
        return "a command that wants no reply" if header.flags & FLAG_NO_REPLY else "a command"
    if not header.refusal:
        return "success"
    return f"{errno.errorcode.get(header.refusal, header.refusal)} ({os.strerror(header.refusal)})"


def _compare_bodies(command: int, was: bytes, now: bytes) -> list[tuple[Kind, str]]:
    found: list[tuple[Kind, str]] = []
    layout, names = _layout(command, was)
    at = 0
    for code, name in zip(layout, names, strict=True):
        field = struct.Struct(f"<{code}")
        if at + field.size > min(len(was), len(now)):
            break
        (old,), (new,) = field.unpack_from(was, at), field.unpack_from(now, at)
        if old != new:
            found.append(("fields", f"{name} {new:#x} instead of {old:#x}"))
        at += field.size
    if len(was) != len(now):
        found.append(("fields", f"{len(now)} bytes instead of {len(was)}"))
    elif was[at:] != now[at:]:
        first = next(index for index in range(at, len(was)) if was[index] != now[index])
        kind: Kind = "fields" if command in _NO_DATA else "data"
        found.append((kind, f"differs from byte {first} on: {_shown(now[first:])} instead of {_shown(was[first:])}"))
    return found


def _shown(data: bytes) -> str:
    return data[:8].hex() + ("…" if len(data) > 8 else "")


def _layout(command: int, body: bytes) -> tuple[str, list[str]]:
    layout, names = _FIELDS.get(command, ("", ""))
    if command == Command.DEVICE_FEATURE and len(body) >= codec.FEATURE_SIZE:
        number = codec.Feature.unpack(body).flags & vfio.FEATURE_MASK
        more, more_names = _FEATURE_FIELDS.get(number, ("", ""))
        layout, names = layout + more, f"{names} {more_names}"
    return layout, names.split()
