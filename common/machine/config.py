"""What a machine is: its file (machine.toml), its description as JSON, and the one set of checks behind both.

The description is what a destination gets over the network before it has any reason to trust its peer, so nothing in
it is taken as it comes: every size has a limit, every name an alphabet, every key must be known. README.md holds the
reference of the file for people. Knobs are resolved here, defaults included, so that both hosts build the same machine.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from common.machine.board import image_start
from common.machine.device_config import FOREIGN, DeviceSpec, describe_device, read_devices, take_knobs
from common.machine.fields import (
    Check,
    ConfigError,
    FieldError,
    Table,
    boolean,
    choice,
    integer,
    name,
    number,
    path_of,
    rate,
    shown,
    size,
    strings,
    text,
)
from common.machine.toml_file import read_toml
from common.machine.toml_lines import Path
from common.memory.layout import LOW_END

__all__ = ["MachineSpec", "ProgramSpec", "ViommuSpec", "from_json", "parse", "to_json"]

MIB = 1 << 20
GIB = 1 << 30
RAM_STEP = 2 * MIB
MIN_RAM = 64 * MIB
MAX_RAM = 4096 * GIB  # its dirty bitmaps have 128 MiB, half of what a message to a machine process may carry
MAX_ITEMS = 64  # devices, programs
MAX_IMAGES = 1024
MAX_JSON = 1 * MIB
DEFAULT_REGION = 256 * MIB

_PROGRAM_KNOBS: dict[str, dict[str, tuple[Check, Any]]] = {
    "idle": {},
    "writer": {
        "pattern": (choice("sequential", "random", "hotspot"), "sequential"),
        "rate": (rate(0, 100 * 10**9), 50_000_000),
        "region": (size(2 * MIB, MAX_RAM, multiple=RAM_STEP), None),  # default: see _programs
    },
    "mapper": {
        "device": (name, None),
        "mappings": (integer(1, 16_384), 1000),
        "changes": (integer(0, 10_000), 200),
    },
    "clock": {"period_us": (integer(100, 1_000_000), 1000)},
    "driver": {
        "device": (name, None),
        "remap": (integer(0, 1 << 32), None),  # the driver's own default
        "peer": (name, None),
        "reset_every": (integer(0, 1 << 32), None),  # only a nic's
        "delay_s": (integer(1, 3600), None),  # only a sample's
    },
}


@dataclass(frozen=True, slots=True)
class ViommuSpec:
    """The virtual IOMMU: address width in bits, strategy for planning ranges of DMA logging."""

    enabled: bool = True
    address_width: int = 48
    strategy: str = "auto"


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A guest program; `knobs` go to it as they are."""

    program: str
    name: str
    knobs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine: sizes in bytes; `images` are the files and directories that fill RAM at its first start only."""

    name: str
    uuid: str | None
    ram_size: int
    images: tuple[FilePath, ...]
    zero_fraction: float
    viommu: ViommuSpec
    devices: tuple[DeviceSpec, ...]
    programs: tuple[ProgramSpec, ...]
    trace: bool = False

    @property
    def has_clock(self) -> bool:
        """Whether the guest can tell how long it stood still."""
        return any(program.program == "clock" for program in self.programs)


def parse(path: FilePath) -> MachineSpec:
    """Read a machine file; raise `ConfigError` that names file and line. Relative images are relative to the file."""
    return read_toml(path, lambda document: _machine(document, path.absolute().parent))


def from_json(description: str | bytes) -> MachineSpec:
    """Read a description made by `to_json`, trusting none of it; raise `ConfigError` that names the member."""
    if len(description) > MAX_JSON:
        raise ConfigError(f"machine description: {len(description)} bytes, more than {MAX_JSON}")
    try:
        document = json.loads(description, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"machine description: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError("machine description: not a JSON object")
    try:
        return _machine(document, None)
    except FieldError as error:
        raise ConfigError(f"machine description: {_dotted(error.path)}: {error}") from error


def to_json(spec: MachineSpec) -> str:
    """Return the canonical description: keys as in the machine file, plain numbers, sorted; equal specs, equal text."""
    document = {
        "name": spec.name,
        **({"uuid": spec.uuid} if spec.uuid else {}),
        "trace": spec.trace,
        "ram": {
            "size": spec.ram_size,
            "image": [str(image) for image in spec.images],
            "zero_fraction": spec.zero_fraction,
        },
        "viommu": {
            "enabled": spec.viommu.enabled,
            "address_width": spec.viommu.address_width,
            "strategy": spec.viommu.strategy,
        },
        "device": [describe_device(device) for device in spec.devices],
        "guest": [{"program": program.program, "name": program.name, **program.knobs} for program in spec.programs],
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _machine(document: Mapping[str, Any], base: FilePath | None) -> MachineSpec:
    """Check a document; `base` is the directory of its file, None for one that came over the network."""
    top = Table(document, (), "at the top level")
    machine_name = top.take("name", name)
    machine_uuid = top.take("uuid", _uuid, None)
    trace = top.take("trace", boolean, default=False)
    ram = top.table("ram")
    ram_size = ram.take("size", size(MIN_RAM, MAX_RAM, multiple=RAM_STEP))
    images = _images(ram, base)
    zero_fraction = ram.take("zero_fraction", number(0, 0.95), 0.4)
    ram.finish()
    viommu = _viommu(top.table("viommu"))
    devices = read_devices(top.tables("device", MAX_ITEMS), base)
    guest = top.tables("guest", MAX_ITEMS)
    top.finish()
    programs = _programs(guest, devices, ram_size)
    return MachineSpec(machine_name, machine_uuid, ram_size, images, zero_fraction, viommu, devices, programs, trace)


def _images(ram: Table, base: FilePath | None) -> tuple[FilePath, ...]:
    images = []
    for index, entry in enumerate(ram.take("image", strings(None, "a path", MAX_IMAGES), [])):
        image = FilePath(entry)
        if base is not None:
            try:
                image = path_of(entry, base)
            except ValueError as error:
                raise FieldError((*ram.path, "image", index), f"image {error}") from error
            if not os.path.exists(image):  # also one that cannot be, or that nobody may look at
                raise FieldError((*ram.path, "image", index), f'image "{shown(entry)}" does not exist')
        elif not image.is_absolute():
            raise FieldError((*ram.path, "image", index), f'image "{shown(entry)}" is not an absolute path')
        images.append(image)
    return tuple(images)


def _viommu(table: Table) -> ViommuSpec:
    spec = ViommuSpec(
        table.take("enabled", boolean, default=True),
        table.take("address_width", choice(39, 48), 48),
        table.take("strategy", choice("auto", "aperture", "minmax", "mapped"), "auto"),
    )
    table.finish()
    return spec


def _programs(tables: Sequence[Table], devices: Sequence[DeviceSpec], ram_size: int) -> tuple[ProgramSpec, ...]:
    programs: list[ProgramSpec] = []
    driven: set[str] = set()
    used = image_start(len(tables))
    if used > ram_size:
        raise FieldError(("guest",), f"{len(tables)} guest programs need {used // MIB} MiB of RAM, more than there is")
    for table in tables:
        program = table.take("program", choice(*_PROGRAM_KNOBS))
        default = f"{program}{sum(other.program == program for other in programs)}"
        program_name = table.take("name", name, default)
        if any(other.name == program_name for other in programs):
            raise FieldError((*table.path, "name"), f'two guest programs have the name "{program_name}"')
        knobs = take_knobs(table, _PROGRAM_KNOBS[program])
        table.finish(elsewhere={knob: other for other, known in _PROGRAM_KNOBS.items() for knob in known})
        if program == "writer":
            knobs.setdefault("region", min(DEFAULT_REGION, ram_size // 4 // RAM_STEP * RAM_STEP))
            used += knobs["region"]
            if used > min(ram_size, LOW_END):
                raise FieldError(
                    (*table.path, "region"),
                    f"the programs' areas and the writers' regions up to here need {-(-used // MIB)} MiB, "
                    f"but RAM below 3 GiB has {min(ram_size, LOW_END) // MIB} MiB",
                )
        elif program == "mapper":
            _check_driver(table, knobs, devices)
        elif program == "driver":
            _check_driver(table, knobs, devices)
            if any(device.name == knobs["device"] and device.kind == FOREIGN for device in devices):
                raise FieldError(
                    (*table.path, "device"),
                    f'there is no driver for "{knobs["device"]}", of whose kind nothing is known: give it a "kind"',
                )
            if knobs["device"] in driven:
                raise FieldError((*table.path, "device"), f'device "{knobs["device"]}" has a driver already')
            driven.add(knobs["device"])
        programs.append(ProgramSpec(program, program_name, knobs))
    return tuple(programs)


def _check_driver(table: Table, knobs: Mapping[str, Any], devices: Sequence[DeviceSpec]) -> None:
    kinds = {device.name: device.kind for device in devices}
    if "device" not in knobs:
        raise FieldError(table.path, f'"device" is missing {table.where}: which device does it drive?')
    for key in ("device", "peer"):
        if key in knobs and knobs[key] not in kinds:
            known = ", ".join(kinds) or "none"
            raise FieldError((*table.path, key), f'{key} "{knobs[key]}" is not in this machine; it has: {known}')
    if "peer" in knobs and (kinds[knobs["device"]], kinds[knobs["peer"]]) != ("nic", "accelerator"):
        raise FieldError((*table.path, "peer"), "only a nic writes to a peer, and only an accelerator can be one")


def _uuid(value: object) -> str:
    try:
        return str(uuid.UUID(text(value)))
    except ValueError:
        raise ValueError(
            f'must be a UUID like "{uuid.UUID(int=0)}", not {shown(json.dumps(value, default=str))}'
        ) from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member is given twice")
    return members


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _dotted(path: Path) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{shown(key)}" for key in path)
    return text.removeprefix(".") or "top level"
