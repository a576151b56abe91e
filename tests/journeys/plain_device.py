"""A device of ours behind a server that speaks only what is published, as other implementations do.

usage: python plain_device.py KIND SOCKET [OPTION …]

It has none of our extensions; answers MIG_DATA_READ with what there is and no padding, 60 000 bytes at the most; REPORT
takes exactly a mapping, at the page size of START. Options: `messages` (memory that is mapped is not used: DMA comes as
messages), `no-unmap-bitmap` (DMA_UNMAP with a bitmap is refused), `shrinking-bars` (its BARs can be mapped, and their
files are cut off as soon as somebody may have done so), `FLAGS` (a number: the migration flags), `KNOB=NUMBER`.
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

from common.devices.__main__ import build
from common.vfio_user.codec import DmaMap, DmaUnmap, MigData, Version
from common.vfio_user.description import RegionFlags, RegionInfo
from common.vfio_user.server import VfioUserServer, listen
from common.vfio_user.transport import Message

SHORT = 60_000
BARS = 6


class PlainServer(VfioUserServer):
    options: frozenset[str] = frozenset()

    def _version(self, command: Message):  # type: ignore[no-untyped-def]
        (answer,), fds = super()._version(command)
        version = Version.unpack(answer)
        return [replace(version, capabilities=replace(version.capabilities, extension=None)).pack()], fds

    def _mig_data_read(self, command: Message):  # type: ignore[no-untyped-def]
        asked = MigData.unpack(command.body)
        parts, fds = super()._mig_data_read(replace(command, body=MigData(min(asked.size, SHORT)).pack()))
        return parts[:2], fds

    def _dma_map(self, command: Message):  # type: ignore[no-untyped-def]
        request = DmaMap.unpack(command.body)
        mapped[request.iova] = request.size
        for fd in files:
            os.ftruncate(fd, 0)
        if "messages" in self.options:
            command.close_fds()
        return super()._dma_map(command)

    def _dma_unmap(self, command: Message):  # type: ignore[no-untyped-def]
        request = DmaUnmap.unpack(command.body)
        if request.flags and "no-unmap-bitmap" in self.options:
            raise OSError(errno.EINVAL, "flags")
        mapped.pop(request.iova, None)
        return super()._dma_unmap(command)


mapped: dict[int, int] = {}
files: list[int] = []


def mappable(region: RegionInfo) -> RegionInfo:
    if region.index >= BARS or not region.size:
        return region
    files.append(os.memfd_create("bar"))
    os.ftruncate(files[-1], region.size)
    return replace(region, flags=region.flags | RegionFlags.MMAP, fd=files[-1])


def main(kind: str, path: Path, options: frozenset[str]) -> None:
    flags = next((int(option) for option in options if option.isdecimal()), 5)
    knobs = {knob: int(value) for knob, _, value in (option.partition("=") for option in options) if value}
    device = build(kind, "plain", {"migration_flags": flags, **knobs})
    take, started = device.logging_report, [0]

    def start(page_size: int, ranges: object) -> int:
        started[0] = page_size
        return type(device).logging_start(device, page_size, ranges)  # type: ignore[arg-type]

    def report(iova: int, length: int, page_size: int) -> bytes:
        if mapped.get(iova) != length or page_size != started[0]:
            raise OSError(errno.ENOTSUP, "neither a mapping nor START's page size")
        return take(iova, length, page_size)

    device.logging_start = start  # type: ignore[method-assign]
    device.logging_report = report  # type: ignore[method-assign]
    if "shrinking-bars" in options:
        device.regions = [mappable(region) for region in device.regions]
    PlainServer.options = options
    with listen(path) as listener:
        sock, _ = listener.accept()
        PlainServer(device, sock).serve()
    path.unlink()


main(sys.argv[1], Path(sys.argv[2]), frozenset(sys.argv[3:]))
