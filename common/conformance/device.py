"""A probe that has negotiated: what checks ask a device for, and what they insist on in every answer."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

import numpy as np

from common.conformance.check import Failure, Unknown
from common.conformance.memory import AREA, FIRST, PAGE, SECOND, DmaMemory
from common.conformance.probe import Probe, name_of_error
from common.vfio import feature as vfio
from common.vfio.feature import Buffer, DeviceFeature, LoggingReport, LoggingStart, Range
from common.vfio.migration import PRECOPY_STATES, DeviceState, MigrationFlags, path, supported
from common.vfio_user.capabilities import MAX_TRANSFER, Capabilities
from common.vfio_user.codec import (
    DMA_READABLE,
    DMA_WRITABLE,
    FEATURE_SIZE,
    REGION_ACCESS_SIZE,
    Command,
    DmaMap,
    DmaUnmap,
    Feature,
    MigData,
    RegionAccess,
    Version,
)
from common.vfio_user.description import DeviceInfo, IrqInfo, RegionFlags, RegionInfo, RegionQuery
from common.vfio_user.transport import Message

__all__ = ["BOTH_AREAS", "CONFIG_REGION", "SAFE_CHUNK", "Device", "listed", "pages_of", "parsed"]

_T = TypeVar("_T")

CONFIG_REGION: Final = 7
SAFE_CHUNK: Final = 32 << 10
"""Bytes of state in one message, where the size of messages is not what is checked."""

_MAX_STATE = 1 << 30
_MAX_PRECOPY_READS = 256
_SHOWN_BYTES = 1 << 20  # of a region that are compared
_MAX_DESCRIBED = 64
BOTH_AREAS: Final = (Range(FIRST, AREA), Range(SECOND, AREA))


class Device(Probe):
    """A device that answers VERSION. `regions` and `irqs` are those that it describes properly."""

    migration_flags = MigrationFlags(0)
    logging = False
    max_transfer = MAX_TRANSFER
    state = DeviceState.RUNNING
    """The state that the last client left."""

    def negotiate(self, minor: int = 2, max_transfer: int = MAX_TRANSFER) -> Version:
        """Exchange VERSION; `Failure` if the answer is none."""
        version = Version(0, minor, Capabilities(16, max_transfer, PAGE))
        reply = self.accepted(Command.VERSION, version.pack())
        answer = parsed(Version.unpack, reply.body)
        if answer.major != 0:
            raise Failure(f"VERSION 0 is answered with major version {answer.major}")
        self.max_transfer = min(answer.capabilities.max_data_xfer_size, MAX_TRANSFER)
        return answer

    def look(self) -> None:
        """Find out what the device can do, and what it consists of; bring it to RUNNING."""
        self.regions: dict[int, RegionInfo] = {}
        self.irqs: dict[int, IrqInfo] = {}
        reply = self._get(DeviceFeature.MIGRATION, 8)
        if not reply.error:
            self.migration_flags = parsed(vfio.unpack_migration_flags, reply.body[FEATURE_SIZE:])
        if not self.migration_flags & MigrationFlags.STOP_COPY:
            self.migration_flags = MigrationFlags(0)
        if self.migration_flags:
            probe = vfio.FEATURE_PROBE | vfio.FEATURE_SET | DeviceFeature.DMA_LOGGING_START
            self.logging = not self.ask(Command.DEVICE_FEATURE, Feature(FEATURE_SIZE, probe).pack()).error
            self.state = self.get_state()
            if self.state is not DeviceState.RUNNING and self.try_state(DeviceState.RUNNING):
                self.ask(Command.DEVICE_RESET)
        self._describe()

    def _describe(self) -> None:
        # What makes no sense is left out here: there are checks for it.
        reply = self.ask(Command.DEVICE_GET_INFO, DeviceInfo().pack())
        if reply.error:
            return
        try:
            info = parsed(DeviceInfo.unpack, reply.body)
        except Failure:
            return
        for index in range(min(info.num_regions, _MAX_DESCRIBED)):
            reply = self.ask(Command.DEVICE_GET_REGION_INFO, RegionQuery(index, 4096).pack_info())
            if not reply.error:
                with suppress(Failure):
                    self.regions[index] = parsed(RegionInfo.unpack, reply.body)[0]
        for index in range(min(info.num_irqs, _MAX_DESCRIBED)):
            reply = self.ask(Command.DEVICE_GET_IRQ_INFO, IrqInfo(index).pack())
            if not reply.error:
                with suppress(Failure):
                    self.irqs[index] = parsed(IrqInfo.unpack, reply.body)

    # What a check needs to be possible

    def need_migration(self, *states: DeviceState) -> MigrationFlags:
        """Return what its migration can do; `Unknown` if it cannot be migrated, or has not these states."""
        if not self.migration_flags:
            raise Unknown("the device says that it cannot be migrated (no feature MIGRATION)")
        for state in states:
            if not supported(state, self.migration_flags):
                raise Unknown(f"the device has no state {state.name} (migration flags {int(self.migration_flags)})")
        return self.migration_flags

    def need_logging(self) -> None:
        """`Unknown` if it does not log its DMA."""
        self.need_migration()
        if not self.logging:
            raise Unknown("the device says that it does not log its DMA (no feature DMA_LOGGING_START)")

    # Regions

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Return bytes of a region."""
        reply = self.accepted(Command.REGION_READ, RegionAccess(offset, region, count).pack())
        return self._read_data(reply, count)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write to a region."""
        self.accepted(Command.REGION_WRITE, RegionAccess(offset, region, len(data)).pack(), data)

    def config(self, offset: int, count: int) -> bytes:
        """Return bytes of PCI configuration space."""
        return self.read(CONFIG_REGION, offset, count)

    def identity(self) -> tuple[int, int]:
        """Return PCI vendor and device id."""
        data = self.config(0, 4)
        return int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little")

    def contents(self) -> dict[int, bytes]:
        """Return what can be read of the BARs, as far as the device lets it be read, by region."""
        found = {}
        for index, region in self.regions.items():
            if index < CONFIG_REGION and region.size and region.flags & RegionFlags.READ:
                size = min(region.size, _SHOWN_BYTES)
                data = self._read_whole(index, size, min(self.max_transfer, size))
                for width in (8, 4):
                    data = data or self._read_whole(index, min(size, PAGE), width)
                if data:
                    found[index] = data
        return found

    def _read_whole(self, index: int, size: int, step: int) -> bytes:
        parts = []
        for offset in range(0, size, step):
            count = min(step, size - offset)
            reply = self.ask(Command.REGION_READ, RegionAccess(offset, index, count).pack())
            if reply.error:
                return b""
            parts.append(self._read_data(reply, count))
        return b"".join(parts)

    def _read_data(self, reply: Message, count: int) -> bytes:
        if len(reply.body) != REGION_ACCESS_SIZE + count:
            raise Failure(f"a read of {count} bytes is answered with {len(reply.body) - REGION_ACCESS_SIZE} bytes")
        return bytes(reply.body[REGION_ACCESS_SIZE:])

    # DMA

    def map_area(self, memory: DmaMemory, iova: int) -> None:
        """Map an area of memory, with its file or without."""
        self.on_command = memory.serve
        body = DmaMap(DMA_READABLE | DMA_WRITABLE, iova - FIRST if memory.shared else 0, iova, AREA).pack()
        self.accepted(Command.DMA_MAP, body, fds=[memory.fd] if memory.shared else [])
        memory.mapped.add(iova)

    def map_both(self, memory: DmaMemory) -> None:
        """Map both areas."""
        self.map_area(memory, FIRST)
        self.map_area(memory, SECOND)

    def unmap_area(self, iova: int) -> None:
        """Unmap an area."""
        self.accepted(Command.DMA_UNMAP, DmaUnmap(0, iova, AREA).pack())

    # Migration

    def get_state(self) -> DeviceState:
        """Return the migration state."""
        reply = self._get(DeviceFeature.MIG_DEVICE_STATE, 8)
        if reply.error:
            raise Failure(f"the state cannot be got: {name_of_error(reply.error)}")
        return parsed(vfio.unpack_device_state, reply.body[FEATURE_SIZE:])

    def try_state(self, state: int) -> int:
        """Ask for a state; return 0 or the errno of the refusal."""
        return self.set_feature(DeviceFeature.MIG_DEVICE_STATE, vfio.pack_device_state(state)).error

    def set_state(self, state: DeviceState) -> None:
        """Go to a state, and insist on being there."""
        if error := self.try_state(state):
            raise Failure(f"the state {state.name} is refused: {name_of_error(error)}")
        if (now := self.get_state()) is not state:
            raise Failure(f"the state {state.name} was accepted, and the device is in {now.name}")

    def read_data(self, size: int = SAFE_CHUNK) -> bytes:
        """Return the next bytes of the device's state; nothing: none now, or the end."""
        reply = self.ask(Command.MIG_DATA_READ, MigData(size).pack())
        if reply.error:
            if reply.error == errno.ENOMSG and self.get_state() in PRECOPY_STATES:
                return b""
            raise Failure(f"MIG_DATA_READ is refused: {name_of_error(reply.error)}")
        answer = parsed(MigData.unpack, reply.body)
        if answer.size > size:
            raise Failure(f"MIG_DATA_READ of {size} bytes is answered with {answer.size}")
        return bytes(parsed(answer.data, reply.body))

    def drain(self) -> bytes:
        """Read the state to its end, in PRE_COPY to where there is nothing now, or long enough."""
        saving = self.get_state()
        parts: list[bytes] = []
        total = 0
        while data := self.read_data():
            parts.append(data)
            total += len(data)
            if saving in PRECOPY_STATES and len(parts) >= _MAX_PRECOPY_READS:
                break
            if total > _MAX_STATE:
                raise Failure(f"the state does not end within {_MAX_STATE >> 20} MiB")
        return b"".join(parts)

    def save(self) -> bytes:
        """Go from RUNNING or PRE_COPY by STOP_COPY to STOP, and return what STOP_COPY gives."""
        self.set_state(DeviceState.STOP_COPY)
        data = self.drain()
        self.set_state(DeviceState.STOP)
        return data

    def write_data(self, data: bytes, chunk: int = SAFE_CHUNK) -> None:
        """Give the device a state, in messages of `chunk` bytes."""
        for offset in range(0, len(data), chunk):
            part = data[offset : offset + chunk]
            self.accepted(Command.MIG_DATA_WRITE, MigData(len(part)).pack(), part)

    def load(self, data: bytes, chunk: int = SAFE_CHUNK) -> None:
        """Go to RESUMING, take a state, and go to STOP, which is where the device checks it."""
        self.set_state(DeviceState.RESUMING)
        self.write_data(data, chunk)
        self.set_state(DeviceState.STOP)

    def go(self, state: DeviceState) -> None:
        """Go from RUNNING to any state that the device has, step by step, with a whole state for RESUMING."""
        if state is DeviceState.RESUMING:
            data = self.save()
            self.set_state(DeviceState.RESUMING)
            self.write_data(data)
            return
        for step in path(DeviceState.RUNNING, state, self.migration_flags):
            self.set_state(step)

    # DMA logging

    def start_logging(self, page_size: int = PAGE, ranges: Iterable[Range] = BOTH_AREAS) -> None:
        """Start the log."""
        if error := self.try_start(page_size, ranges):
            raise Failure(f"DMA_LOGGING_START is refused: {name_of_error(error)}")

    def try_start(self, page_size: int, ranges: Iterable[Range]) -> int:
        """Start the log; return 0 or the errno of the refusal."""
        payload = LoggingStart(page_size, tuple(ranges)).pack()
        return self.set_feature(DeviceFeature.DMA_LOGGING_START, payload).error

    def stop_logging(self) -> int:
        """Stop the log; return 0 or the errno of the refusal."""
        return self.set_feature(DeviceFeature.DMA_LOGGING_STOP, LoggingStart(PAGE, ()).pack()).error

    def report(self, iova: int, length: int, page_size: int = PAGE) -> set[int]:
        """Return the IOVAs of the pages of a range that are reported as written."""
        pages, error = self.try_report(iova, length, page_size)
        if error:
            raise Failure(f"DMA_LOGGING_REPORT is refused: {name_of_error(error)}")
        return pages

    def try_report(self, iova: int, length: int, page_size: int = PAGE) -> tuple[set[int], int]:
        """Ask for a report; return the pages, and 0 or the errno of the refusal."""
        size = vfio.bitmap_bytes(length, page_size)
        report = LoggingReport(iova, length, page_size)
        reply = self._get(DeviceFeature.DMA_LOGGING_REPORT, LoggingReport.SIZE + size, report.pack())
        if reply.error:
            return set(), reply.error
        payload = reply.body[FEATURE_SIZE:]
        if len(payload) < LoggingReport.SIZE + size:
            raise Failure(
                f"DMA_LOGGING_REPORT of 0x{length:x} bytes at 0x{iova:x} succeeds with {len(payload)} bytes, "
                f"a bitmap of {size} bytes belongs to it: what was logged there is lost without a word"
            )
        if LoggingReport.unpack(payload) != report:
            raise Failure("DMA_LOGGING_REPORT is answered for another range")
        return pages_of(payload[LoggingReport.SIZE : LoggingReport.SIZE + size], iova, length, page_size), 0

    # Features

    def set_feature(self, number: int, payload: bytes) -> Message:
        """Set a feature, and return the reply."""
        request = Feature(FEATURE_SIZE + len(payload), number | vfio.FEATURE_SET)
        return self.ask(Command.DEVICE_FEATURE, request.pack(), payload)

    def _get(self, number: int, answer: int, payload: bytes = b"") -> Message:
        request = Feature(FEATURE_SIZE + answer, number | vfio.FEATURE_GET)
        return self.ask(Command.DEVICE_FEATURE, request.pack(), payload)


def parsed(read: Callable[[Buffer], _T], body: Buffer) -> _T:
    """Read a body; `Failure` if it cannot be one."""
    try:
        return read(body)
    except ValueError as error:
        raise Failure(f"the answer makes no sense: {error}") from None


def pages_of(bitmap: Buffer, iova: int, length: int, page_size: int) -> set[int]:
    """Return the IOVAs that the bits of a bitmap stand for; `Failure` if a bit stands for no page of the range."""
    bits = np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little"))
    pages = {iova + int(bit) * page_size for bit in bits}
    if beyond := sorted(page for page in pages if page >= iova + length):
        raise Failure(f"a bitmap of 0x{length:x} bytes at 0x{iova:x} has bits beyond them: {listed(beyond)}")
    return pages


def listed(pages: Sequence[int]) -> str:
    """Return a few IOVAs in words."""
    few = ", ".join(f"0x{page:x}" for page in pages[:8])
    return f"{few} and {len(pages) - 8} more" if len(pages) > 8 else few
