"""Reading and writing regions."""

from __future__ import annotations

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import CONFIG_REGION
from common.conformance.lab import Lab
from common.vfio_user.codec import REGION_ACCESS_SIZE, Command, RegionAccess


@check(
    "A read or write of a region stays inside it, and is not larger than a message may be; anything else is refused."
)
def bounds(lab: Lab) -> None:
    """Read and write around the ends."""
    device = lab.device()
    size = device.regions[CONFIG_REGION].size if CONFIG_REGION in device.regions else 256
    if size < 4:
        raise Unknown(f"configuration space has {size} bytes, in which no 4 can be read")
    for what, region, offset, count in (
        ("beyond the end", CONFIG_REGION, size, 4),
        ("across the end", CONFIG_REGION, size - 2, 4),
        ("around 2^64", CONFIG_REGION, (1 << 64) - 2, 4),
        ("in no region", 0xDEAD, 0, 4),
    ):
        access = RegionAccess(offset, region, count).pack()
        device.refused(f"a read {what}", Command.REGION_READ, access)
        device.refused(f"a write {what}", Command.REGION_WRITE, access, bytes(count))
    access = RegionAccess(0, CONFIG_REGION, 0x7FFF_FFFF).pack()
    device.refused("a read of 2 GiB", Command.REGION_READ, access)


@check("A write carries as much data as it says.")
def write_length(lab: Lab) -> None:
    """Write to what is read-only anyway, with less data than is said."""
    device = lab.device()
    device.refused("a write of 4 bytes with 2", Command.REGION_WRITE, RegionAccess(0, CONFIG_REGION, 4).pack(), b"ab")


@check("Configuration space can be read in any width, and its parts are those of the whole.")
def configuration(lab: Lab) -> str:
    """Compare parts of it with the whole, and follow the capabilities."""
    device = lab.device()
    whole = device.config(0, 64)
    for offset, width in ((0, 1), (1, 1), (2, 2), (8, 4), (32, 16)):
        if (part := device.config(offset, width)) != whole[offset : offset + width]:
            raise Failure(f"{width} bytes at 0x{offset:x} are {part.hex()}, and in the whole they are another")
    vendor, number = device.identity()
    if vendor in {0, 0xFFFF}:
        raise Failure(f"vendor id {vendor:04x} is nobody's")
    config = device.config(0, 256)
    offset, seen = config[0x34] & 0xFC if config[6] & 0x10 else 0, set[int]()
    while offset:
        if offset in seen or offset < 0x40:
            raise Failure(f"the capabilities lead to 0x{offset:x}")
        seen.add(offset)
        offset = config[offset + 1] & 0xFC
    return f"device {vendor:04x}:{number:04x}, {len(seen)} capabilities"


@check("A read of part of a region gives the bytes that a read of the whole has there.")
def parts_of_regions(lab: Lab) -> str:
    """Compare the second half of each BAR with the whole, after the device was given something to show."""
    device = lab.device()
    lab.scribble(device)
    compared = []
    for index, before in device.contents().items():
        half = len(before) // 2
        reply = device.ask(Command.REGION_READ, RegionAccess(half, index, len(before) - half).pack())
        if reply.error:
            continue
        part = bytes(reply.body[REGION_ACCESS_SIZE:])
        if device.contents().get(index) != before:
            continue  # it changes on its own
        if part != before[half:]:
            raise Failure(f"region {index}: its second half, read alone, is another")
        compared.append(str(index))
    if not compared:
        raise Unknown("no region can be read in parts")
    return f"regions {', '.join(compared)}"
