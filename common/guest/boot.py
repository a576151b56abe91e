"""What the machine tells its vCPU at first: the programs to run and the devices there are.

`{"programs": [{"program", "name", "area_gpa", "area_size", …knobs}], "devices": [{"name", "kind", "container",
"viommu", "bars": {"0": gpa}, "doorbell_fd", "vectors"}], "fresh"}`; descriptors are given as indexes into those that
came before it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["Boot", "DeviceInfo", "ProgramInfo", "parse", "read_knobs"]

_Knobs = TypeVar("_Knobs")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """A program: its area is `area_size` bytes of RAM at `area_gpa` that nobody else uses."""

    program: str
    name: str
    area_gpa: int
    area_size: int
    knobs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device; `doorbell` and `vectors` are indexes of descriptors."""

    name: str
    kind: str
    container: str
    viommu: bool
    bars: Mapping[int, int]
    doorbell: int | None
    vectors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Boot:
    """`fresh`: the programs begin; otherwise RAM holds, or will hold, a guest that ran before."""

    programs: tuple[ProgramInfo, ...]
    devices: tuple[DeviceInfo, ...]
    fresh: bool


def parse(boot: object, fds: int) -> Boot:
    """Check a boot message that came after `fds` descriptors; `TypeError` or `ValueError` with a sentence."""
    members = _expect(boot, dict, "boot")
    programs = tuple(_program(item) for item in _take(members, "programs", list, "boot"))
    devices = tuple(_device(item, fds) for item in _take(members, "devices", list, "boot"))
    for what, names in (("programs", [p.name for p in programs]), ("devices", [d.name for d in devices])):
        if len(set(names)) < len(names):
            raise ValueError(f"boot: two {what} have the same name")
    return Boot(programs, devices, _take(members, "fresh", bool, "boot"))


def _program(item: object) -> ProgramInfo:
    members = dict(_expect(item, dict, "a program"))
    name = _take(members, "name", str, "a program")
    info = ProgramInfo(
        _take(members, "program", str, name),
        name,
        _take(members, "area_gpa", int, name),
        _take(members, "area_size", int, name),
        members,
    )
    for member in ("program", "name", "area_gpa", "area_size"):
        del members[member]
    return info


def _device(item: object, fds: int) -> DeviceInfo:
    members = _expect(item, dict, "a device")
    name = _take(members, "name", str, "a device")
    doorbell = members.get("doorbell_fd")
    vectors = tuple(_fd(fd, fds, name) for fd in _take(members, "vectors", list, name))
    bars = {}
    for index, gpa in _take(members, "bars", dict, name).items():
        if index not in {"0", "1", "2", "3", "4", "5"}:
            raise ValueError(f"{name}: there is no BAR {index!r}")
        bars[int(index)] = _expect(gpa, int, f"{name}: BAR {index}")
    return DeviceInfo(
        name,
        _take(members, "kind", str, name),
        _take(members, "container", str, name),
        _take(members, "viommu", bool, name),
        bars,
        None if doorbell is None else _fd(doorbell, fds, name),
        vectors,
    )


def _fd(value: object, fds: int, where: str) -> int:
    index = _expect(value, int, f"{where}: a descriptor")
    if not 0 <= index < fds:
        raise ValueError(f"{where}: descriptor {index} of {fds}")
    return index


def _take(members: Mapping[str, Any], key: str, kind: type[_Value], where: str) -> _Value:
    if key not in members:
        raise ValueError(f"{where}: {key} is missing")
    return _expect(members[key], kind, f"{where}: {key}")


def _expect(value: object, kind: type[_Value], where: str) -> _Value:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{where} is not of type {kind.__name__}: {value!r:.60}")
    return value


def read_knobs(kind: type[_Knobs], values: Mapping[str, Any]) -> _Knobs:
    """Return `kind`, a dataclass of int and str fields, made from `values`.

    `ValueError` for a value that is unknown, missing, of another type, or refused by `kind` itself.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass it is
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"there is no knob {name}; there are: {', '.join(fields) or 'none'}")
        hint = hints[name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if type(value) not in allowed:
            raise ValueError(f"knob {name} must be {hint if len(allowed) > 1 else hint.__name__}, not {value!r:.60}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"knob {name} is missing")
    return kind(**values)
