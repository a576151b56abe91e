"""What a device says of itself: regions, their files, interrupts."""

from __future__ import annotations

import fcntl
import os
from functools import partial

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import Device, parsed
from common.conformance.lab import Lab
from common.conformance.probe import name_of_error
from common.vfio_user.codec import Command, RegionAccess
from common.vfio_user.description import (
    Area,
    DeviceInfo,
    IrqInfo,
    RegionFlags,
    RegionInfo,
    RegionQuery,
    unpack_io_fds,
)

_PCI = 2
_PCI_REGIONS = 9
_PCI_IRQS = 5
_SHORT = 32  # bytes of a region's description without capabilities
_MAX_ARGSZ = 1 << 16
_COMPARED = 4096


@check("DEVICE_GET_INFO tells flags and numbers; a PCI device has at least its nine regions and five interrupts.")
def device_info(lab: Lab) -> str:
    """Ask for it."""
    info = _info(lab.device())
    if info.flags & _PCI and (info.num_regions < _PCI_REGIONS or info.num_irqs < _PCI_IRQS):
        raise Failure(f"a PCI device with {info.num_regions} regions and {info.num_irqs} interrupts")
    return f"flags 0x{info.flags:x}, {info.num_regions} regions, {info.num_irqs} interrupts"


@check("A request's argsz says how much room the client has: less than the reply needs is refused.")
def argsz(lab: Lab) -> None:
    """Ask with room for 4 bytes."""
    device = lab.device()
    for command, size in (
        (Command.DEVICE_GET_INFO, 16),
        (Command.DEVICE_GET_REGION_INFO, 32),
        (Command.DEVICE_GET_IRQ_INFO, 16),
    ):
        device.refused(f"{command.name} with argsz 4", command, (4).to_bytes(4, "little") + bytes(size - 4))


@check(
    "DEVICE_GET_REGION_INFO describes every region. If argsz of the reply is larger than the room that the client had, "
    "asking again with that much brings the capabilities, whose areas lie inside the region."
)
def region_info(lab: Lab) -> str:
    """Ask for each, with little room first."""
    device = lab.device()
    words = []
    for index in range(_info(device).num_regions):
        region, needed = _region(device, index, _SHORT)
        if needed > _MAX_ARGSZ:
            raise Failure(f"the description of region {index} needs {needed} bytes")
        if needed > _SHORT:
            region, again = _region(device, index, needed)
            if again != needed:
                raise Failure(f"region {index} needs {needed} bytes, and then {again}")
        if region.size:
            mapped = f", {len(region.areas)} areas" if region.areas else ""
            words.append(f"{index}: 0x{region.size:x} bytes{mapped}")
    return "; ".join(words)


def _region(device: Device, index: int, room: int) -> tuple[RegionInfo, int]:
    reply = device.accepted(Command.DEVICE_GET_REGION_INFO, RegionQuery(index, room).pack_info())
    region, needed = parsed(RegionInfo.unpack, reply.body)
    if region.index != index:
        raise Failure(f"region {index} is asked for, and {region.index} described")
    if len(reply.body) > room:
        raise Failure(f"region {index} is described in {len(reply.body)} bytes, with room for {room}")
    if needed < _SHORT:
        raise Failure(f"region {index} is described with argsz {needed}")
    return region, needed


@check(
    "A region that can be mapped comes with a file that is as large as what can be mapped of it, and holds the same "
    "bytes as REGION_READ gives."
)
def region_files(lab: Lab) -> str:
    """Compare size and contents, by reading: whoever maps a file that is cut off later dies of it."""
    device = lab.device()
    words = []
    for index, region in device.regions.items():
        if not region.flags & RegionFlags.MMAP:
            continue
        query = RegionQuery(index, max(region.argsz, _SHORT)).pack_info()
        reply = device.accepted(Command.DEVICE_GET_REGION_INFO, query, keep_fds=True)
        try:
            if not reply.fds:
                raise Failure(f"region {index} says that it can be mapped, and no descriptor comes with it")
            words.append(f"region {index} {_compare(device, region, reply.fds[0])}")
        finally:
            reply.close_fds()
    if not words:
        raise Unknown("no region can be mapped")
    return "; ".join(words)


def _compare(device: Device, region: RegionInfo, fd: int) -> str:
    size = os.fstat(fd).st_size
    for area in region.areas or (Area(0, region.size),):
        end = region.offset + area.offset + area.size
        if size < end:
            raise Failure(f"the file of region {region.index} has {size} bytes, and {end} could be mapped")
        count = min(area.size, _COMPARED)
        if device.ask(Command.REGION_READ, RegionAccess(area.offset, region.index, count).pack()).error:
            continue  # registers that want another width
        # The file before and after: what changes in between may differ.
        before = os.pread(fd, count, region.offset + area.offset)
        read = device.read(region.index, area.offset, count)
        after = os.pread(fd, count, region.offset + area.offset)
        if before == after and read != before:
            raise Failure(f"REGION_READ of region {region.index} at 0x{area.offset:x} differs from its file")
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        sealed = 0
    return "is sealed" if sealed else "is not sealed against shrinking, so a careful client does not map it"


@check("DEVICE_GET_IRQ_INFO describes every interrupt.")
def irq_info(lab: Lab) -> str:
    """Ask for each."""
    device = lab.device()
    words = []
    for index in range(_info(device).num_irqs):
        irq = parsed(IrqInfo.unpack, device.accepted(Command.DEVICE_GET_IRQ_INFO, IrqInfo(index).pack()).body)
        if irq.index != index:
            raise Failure(f"interrupt {index} is asked for, and {irq.index} described")
        if irq.count:
            words.append(f"{index}: {irq.count} vectors")
    return "; ".join(words)


@check("A region or an interrupt that is not there is refused.")
def indices(lab: Lab) -> None:
    """Ask for what lies one, and far, beyond the last."""
    device = lab.device()
    info = _info(device)
    for index in (info.num_regions, 0xFFFF_FFFF):
        query = RegionQuery(index, _SHORT).pack_info()
        device.refused(f"region {index} of {info.num_regions}", Command.DEVICE_GET_REGION_INFO, query)
    for index in (info.num_irqs, 0xFFFF_FFFF):
        query = IrqInfo(index).pack()
        device.refused(f"interrupt {index} of {info.num_irqs}", Command.DEVICE_GET_IRQ_INFO, query)


@check("DEVICE_GET_REGION_IO_FDS gives the descriptors that stand for writes to a region, each inside the region.")
def io_fds(lab: Lab) -> str:
    """Ask for those of each region."""
    device = lab.device()
    found = 0
    for index, region in device.regions.items():
        if not region.size:
            continue
        reply = device.ask(Command.DEVICE_GET_REGION_IO_FDS, RegionQuery(index, 4096).pack_io_fds(), keep_fds=True)
        try:
            if reply.error:
                raise Unknown(f"region {index}: refused with {name_of_error(reply.error)}")
            items, _ = parsed(partial(unpack_io_fds, fds=reply.fds), reply.body)
            for item in items:
                if item.offset + item.size > region.size:
                    raise Failure(f"region {index}: a descriptor for 0x{item.offset:x} + {item.size}, outside of it")
            found += len(items)
        finally:
            reply.close_fds()
    return f"{found} descriptors"


def _info(device: Device) -> DeviceInfo:
    return parsed(DeviceInfo.unpack, device.accepted(Command.DEVICE_GET_INFO, DeviceInfo().pack()).body)
