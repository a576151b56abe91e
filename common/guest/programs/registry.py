"""From a boot message to programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.guest.boot import Boot, ProgramInfo, read_knobs
from common.guest.device import GuestDevice
from common.guest.memory import GuestMemory
from common.guest.programs.clock import Clock, ClockKnobs
from common.guest.programs.driver_accelerator import AcceleratorDriver, AcceleratorKnobs
from common.guest.programs.driver_nic import NicDriver, NicKnobs
from common.guest.programs.driver_nvme import NvmeDriver, NvmeKnobs
from common.guest.programs.driver_sample import SampleDriver, SampleKnobs
from common.guest.programs.idle import Idle
from common.guest.programs.iova import TOP, WINDOW
from common.guest.programs.mapper import Mapper, MapperKnobs
from common.guest.programs.program import Area, Program
from common.guest.programs.writer import Writer, WriterKnobs

__all__ = ["create_programs"]


def create_programs(boot: Boot, memory: GuestMemory, devices: Mapping[str, GuestDevice]) -> list[Program[Any]]:
    """Return the programs of a boot message, not yet started; `ValueError` if there is something wrong with one."""
    programs = []
    drivers_in: dict[str, int] = {}
    for info in boot.programs:
        top = TOP
        if info.program in ("driver", "mapper"):
            device = _device(devices, info, "device")
            # Programs that share an address space must not give out the same addresses.
            index = drivers_in.get(device.container, 0)
            drivers_in[device.container] = index + 1
            top = TOP - index * WINDOW
        try:
            programs.append(_create(boot, info, memory, devices, top))
        except ValueError as error:
            raise ValueError(f"{info.name}: {error}") from error
    return programs


def _create(
    boot: Boot, info: ProgramInfo, memory: GuestMemory, devices: Mapping[str, GuestDevice], iova_top: int
) -> Program[Any]:
    area = Area(memory, info.area_gpa, info.area_size)
    match info.program:
        case "idle":
            if info.knobs:
                raise ValueError(f"there is no knob {min(info.knobs)}: an idle guest has none")
            return Idle(info.name, area)
        case "writer":
            return Writer(info.name, area, read_knobs(WriterKnobs, info.knobs))
        case "clock":
            return Clock(info.name, area, read_knobs(ClockKnobs, info.knobs))
        case "mapper":
            return Mapper(
                info.name, area, read_knobs(MapperKnobs, info.knobs), _device(devices, info, "device"), iova_top
            )
        case "driver":
            return _create_driver(boot, info, area, devices, iova_top)
    raise ValueError(f"there is no program {info.program!r:.40}")


def _create_driver(
    boot: Boot, info: ProgramInfo, area: Area, devices: Mapping[str, GuestDevice], iova_top: int
) -> Program[Any]:
    device = _device(devices, info, "device")
    match device.kind:
        case "nic":
            peer = _device(devices, info, "peer") if "peer" in info.knobs else None
            return NicDriver(info.name, area, read_knobs(NicKnobs, info.knobs), device, peer, iova_top)
        case "nvme":
            return NvmeDriver(info.name, area, read_knobs(NvmeKnobs, info.knobs), device, iova_top)
        case "sample":
            return SampleDriver(info.name, area, read_knobs(SampleKnobs, info.knobs), device, iova_top)
        case "accelerator":
            writer = next((other for other in boot.programs if other.knobs.get("peer") == device.name), None)
            nic = None if writer is None else _device(devices, writer, "device")
            knobs = read_knobs(AcceleratorKnobs, info.knobs)
            return AcceleratorDriver(info.name, area, knobs, device, nic, iova_top)
    raise ValueError(f"there is no driver for {device.kind!r:.40}")


def _device(devices: Mapping[str, GuestDevice], info: ProgramInfo, knob: str) -> GuestDevice:
    name = info.knobs.get(knob)
    if not isinstance(name, str) or name not in devices:
        raise ValueError(f"{info.name}: {knob} {name!r:.60} is not in this machine")
    return devices[name]
