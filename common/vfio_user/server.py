"""The device's side of a vfio-user connection.

Commands are carried out strictly in order, in the thread that calls `serve`; what is refused is answered with an errno,
and whatever a client sends, it gets an answer or loses the connection. The device's own threads may ask for DMA by
message (`dma_read`, `dma_write`) at any time, also while a command waits for them.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from common.memory.write_journal import JOURNAL_ROW
from common.vfio import feature as vfio
from common.vfio.feature import Buffer, DeviceFeature, LoggingReport, LoggingStart
from common.vfio.migration import PRECOPY_STATES, SAVING_STATES, DeviceState
from common.vfio_user import codec
from common.vfio_user.capabilities import MAX_TRANSFER, PAGE_SIZE, Capabilities
from common.vfio_user.codec import Command, DmaAccess, DmaMap, DmaUnmap, Feature, MigData, RegionAccess, Version
from common.vfio_user.description import (
    DeviceInfo,
    IrqFlags,
    IrqInfo,
    IrqSet,
    RegionFlags,
    RegionInfo,
    RegionQuery,
    pack_io_fds,
)
from common.vfio_user.device import Device, MessageDma
from common.vfio_user.transport import Connection, ConnectionLostError, Message

__all__ = ["Device", "MessageDma", "VfioUserServer", "listen"]

_MAX_MSG_FDS: Final = 8  # as libvfio-user, whose sample client takes both servers of a migration to say the same
_JOURNAL_QUERY: Final = struct.Struct("<QQ")  # IOVA, bytes
_MINOR: Final = 2
_DEVICE_FLAGS: Final = 0x3  # can be reset, is a PCI device

# What a stopped device refuses, as libvfio-user's do: guests' mappings and interrupts are set up before a device stops,
# while it resumes, or after it runs. STOP_COPY is for reading the device's state, nothing else.
_ALLOWED: Final = {
    DeviceState.STOP: frozenset({Command.REGION_READ, Command.REGION_WRITE, Command.DEVICE_FEATURE}),
    DeviceState.STOP_COPY: frozenset({Command.DEVICE_FEATURE, Command.MIG_DATA_READ}),
}

_Reply = tuple[Sequence[Buffer], Sequence[int]]
_NOTHING: Final[_Reply] = ((), ())


class VfioUserServer:
    """Serves one client; takes the socket over.

    `strict`: refuse in STOP and STOP_COPY what libvfio-user refuses there.
    """

    def __init__(self, device: Device, sock: socket.socket, *, strict: bool = True) -> None:
        self._device = device
        self._connection = Connection(sock, limit=codec.MAX_COMMAND_SIZE)
        self._strict = strict
        self._client: Capabilities | None = None
        self._commands: dict[int, Callable[[Message], _Reply]] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._get_region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._mig_data_read,
            Command.MIG_DATA_WRITE: self._mig_data_write,
        }

    def serve(self) -> None:
        """Carry out commands until the client closes the connection, or `shutdown`."""
        self._device.connected(self)
        try:
            while (command := self._connection.next_command()) is not None:
                self._carry_out(command)
        except ConnectionLostError:
            pass
        finally:
            self._connection.shutdown()
            self._device.disconnected()
            self._connection.close()

    def shutdown(self) -> None:
        """End the connection from another thread; `serve` returns."""
        self._connection.shutdown()

    def dma_read(self, iova: int, count: int) -> bytes:
        """Return `count` bytes at `iova`, which the client reads. Raise OSError as it refuses, or is gone."""
        parts = []
        for offset in range(0, count, self._transfer):
            part = min(self._transfer, count - offset)
            body = self._ask(Command.DMA_READ, DmaAccess(iova + offset, part), b"")
            if len(body) != codec.DMA_ACCESS_SIZE + part or DmaAccess.unpack(body).size != part:
                raise OSError(errno.EIO, f"DMA_READ of {part} bytes was answered with {len(body)}")
            parts.append(memoryview(body)[codec.DMA_ACCESS_SIZE :])
        return b"".join(parts)

    def dma_write(self, iova: int, data: Buffer) -> None:
        """Have `data` written at `iova` by the client. Raise OSError as it refuses, or is gone."""
        view = memoryview(data).cast("B")
        for offset in range(0, len(view), self._transfer):
            part = view[offset : offset + self._transfer]
            self._ask(Command.DMA_WRITE, DmaAccess(iova + offset, len(part)), part)

    @property
    def _transfer(self) -> int:
        if self._client is None:
            raise OSError(errno.ENOTCONN, "no client yet")
        return min(self._client.max_data_xfer_size, MAX_TRANSFER)

    def _ask(self, command: Command, access: DmaAccess, data: Buffer) -> Buffer:
        reply = self._connection.request(command, [access.pack(), data])
        reply.close_fds()
        if reply.error:
            text = f"{command.name} iova 0x{access.iova:x} size 0x{access.size:x}: {os.strerror(reply.error)}"
            raise OSError(reply.error, text)
        return reply.body

    def _carry_out(self, command: Message) -> None:
        try:
            parts, fds = self._handler(command)(command)
        except ConnectionLostError:
            raise
        except OSError as error:
            self._connection.reply(command, error=error.errno or errno.EIO)
        except ValueError:
            self._connection.reply(command, error=errno.EINVAL)
        except BaseException:
            self._connection.reply(command, error=errno.EIO)
            raise
        else:
            self._connection.reply(command, parts, fds)
        finally:
            command.close_fds()

    def _handler(self, command: Message) -> Callable[[Message], _Reply]:
        number = command.header.command
        handler = self._commands.get(number)
        if handler is None or (self._client is None) != (number == Command.VERSION):
            raise OSError(errno.EINVAL, f"command {number} is not possible")
        if self._strict:
            allowed = _ALLOWED.get(self._device.get_state())
            if allowed is not None and number not in allowed and number != Command.VERSION:
                raise OSError(errno.EINVAL, f"command {number} is not possible while the device is stopped")
        return handler

    # Description

    def _version(self, command: Message) -> _Reply:
        version = Version.unpack(command.body)
        if version.major != 0:
            raise OSError(errno.EINVAL, f"version {version.major} of the protocol is not known")
        self._client = version.capabilities
        capabilities = Capabilities(
            max_msg_fds=_MAX_MSG_FDS,
            max_data_xfer_size=MAX_TRANSFER,
            migration_page_size=PAGE_SIZE if self._device.migration_flags else None,
            # Only to who has said that he knows it: QEMU has room for a reply as long as its own message, no more.
            extension=None if self._client.extension is None else self._device.extension,
        )
        return [Version(0, min(version.minor, _MINOR), capabilities).pack()], ()

    def _get_info(self, command: Message) -> _Reply:
        DeviceInfo.unpack(command.body)
        return [DeviceInfo(_DEVICE_FLAGS, len(self._device.regions), len(self._device.irqs)).pack()], ()

    def _get_region_info(self, command: Message) -> _Reply:
        query = RegionQuery.unpack_info(command.body)
        region = self._region(query.index)
        fits = region.fd is not None and query.argsz >= region.argsz
        return [region.pack(query.argsz)], [region.fd] if fits and region.fd is not None else []

    def _get_region_io_fds(self, command: Message) -> _Reply:
        query = RegionQuery.unpack_io_fds(command.body)
        if not self._region(query.index).flags:
            raise OSError(errno.EINVAL, f"region {query.index} is not there")
        body, fds = pack_io_fds(query.index, query.argsz, self._device.io_fds(query.index))
        return [body], fds

    def _get_irq_info(self, command: Message) -> _Reply:
        return [self._irq(IrqInfo.unpack(command.body).index).pack()], ()

    def _region(self, index: int) -> RegionInfo:
        if index >= len(self._device.regions):
            raise OSError(errno.EINVAL, f"region {index} is not there")
        return self._device.regions[index]

    def _irq(self, index: int) -> IrqInfo:
        if index >= len(self._device.irqs):
            raise OSError(errno.EINVAL, f"interrupt {index} is not there")
        return self._device.irqs[index]

    # Operation

    def _set_irqs(self, command: Message) -> _Reply:
        request = IrqSet.unpack(command.body)
        data = memoryview(command.body)[IrqSet.SIZE :]
        if request.start + request.count > self._irq(request.index).count:
            raise OSError(errno.EINVAL, f"interrupt {request.index} has fewer vectors")
        if request.count == 0 and request.flags != IrqFlags.DATA_NONE | IrqFlags.ACTION_TRIGGER:
            raise OSError(errno.EINVAL, "no vector")
        if request.flags & IrqFlags.DATA_BOOL and len(data) != request.count:
            raise OSError(errno.EINVAL, f"{len(data)} bools for {request.count} vectors")
        eventfds = command.fds if request.flags & IrqFlags.DATA_EVENTFD else []
        if eventfds and len(eventfds) != request.count:
            raise OSError(errno.EINVAL, f"{len(eventfds)} eventfds for {request.count} vectors")
        self._device.set_irqs(request.index, request.flags, request.start, request.count, data, eventfds)
        return _NOTHING

    def _region_access(self, access: RegionAccess, needed: RegionFlags) -> None:
        region = self._region(access.region)
        if needed not in region.flags or not 0 < access.size <= MAX_TRANSFER:
            raise OSError(errno.EINVAL, f"region {access.region} cannot be accessed so")
        if access.offset + access.size > region.size:
            raise OSError(errno.EINVAL, f"an access beyond the end of region {access.region}")

    def _region_read(self, command: Message) -> _Reply:
        access = RegionAccess.unpack(command.body)
        self._region_access(access, RegionFlags.READ)
        return [access.pack(), self._device.region_read(access.region, access.offset, access.size)], ()

    def _region_write(self, command: Message) -> _Reply:
        access = RegionAccess.unpack(command.body)
        self._region_access(access, RegionFlags.WRITE)
        data = memoryview(command.body)[codec.REGION_ACCESS_SIZE :]
        if len(data) != access.size:
            raise OSError(errno.EINVAL, f"{len(data)} bytes to write instead of {access.size}")
        self._device.region_write(access.region, access.offset, data)
        return [access.pack()], ()

    def _dma_map(self, command: Message) -> _Reply:
        request = DmaMap.unpack(command.body)
        if request.flags & ~codec.DMA_FLAGS_KNOWN or len(command.fds) > 1:
            raise OSError(errno.EINVAL, f"DMA_MAP with flags 0x{request.flags:x} and {len(command.fds)} descriptors")
        if not request.size or request.iova + request.size > 1 << 64:
            raise OSError(errno.EINVAL, f"DMA_MAP of 0x{request.iova:x} + 0x{request.size:x}")
        flags = request.flags & (codec.DMA_READABLE | codec.DMA_WRITABLE)
        fd = command.fds[0] if command.fds else None
        self._device.dma_map(request.iova, request.size, flags, request.offset, fd)
        return _NOTHING

    def _dma_unmap(self, command: Message) -> _Reply:
        request = DmaUnmap.unpack(command.body)
        if request.flags == codec.UNMAP_ALL:
            self._device.dma_unmap_all()
        elif request.flags == codec.UNMAP_GET_DIRTY_BITMAP:
            return self._dma_unmap_with_bitmap(command, request)
        else:
            self._device.dma_unmap(request.iova, request.size, None)
        return [command.body], ()

    def _dma_unmap_with_bitmap(self, command: Message, request: DmaUnmap) -> _Reply:
        vfio.check_logging_report(LoggingReport(request.iova, request.size, request.page_size))
        size = vfio.bitmap_bytes(request.size, request.page_size)
        if request.bitmap_size != size or size > MAX_TRANSFER:
            raise OSError(errno.EINVAL, f"a bitmap of {request.bitmap_size} bytes for one of {size}")
        bitmap = self._device.dma_unmap(request.iova, request.size, request.page_size)
        if bitmap is None:
            raise OSError(errno.EIO, "the device has no bitmap of what it unmapped")
        return [command.body, bitmap], ()

    def _reset(self, _command: Message) -> _Reply:
        self._device.reset()
        return _NOTHING

    # Migration

    def _mig_data_read(self, command: Message) -> _Reply:
        request = MigData.unpack(command.body)
        if not 0 < request.size <= self._transfer or self._device.get_state() not in SAVING_STATES:
            raise OSError(errno.EINVAL, "the device's state cannot be read so")
        data = self._device.mig_data_read(request.size)
        # Always as long as was asked for: libvfio-user's own client insists on it.
        return [MigData(len(data)).pack(), data, bytes(request.size - len(data))], ()

    def _mig_data_write(self, command: Message) -> _Reply:
        request = MigData.unpack(command.body)
        if self._device.get_state() != DeviceState.RESUMING:
            raise OSError(errno.EINVAL, "the device does not resume")
        self._device.mig_data_write(request.data(command.body))
        return _NOTHING

    def _feature(self, command: Message) -> _Reply:
        request = Feature.unpack(command.body)
        payload = memoryview(command.body)[codec.FEATURE_SIZE :]
        number, operation = request.flags & vfio.FEATURE_MASK, request.flags & ~vfio.FEATURE_MASK
        possible = self._operations(number)
        if not possible or operation & ~(possible | vfio.FEATURE_PROBE):
            raise OSError(errno.EINVAL, f"feature {number} is not there")
        if operation & vfio.FEATURE_PROBE or operation == vfio.FEATURE_SET:
            if request.argsz < len(command.body):
                raise OSError(errno.EINVAL, f"argsz {request.argsz} for {len(command.body)} bytes")
            if operation & vfio.FEATURE_PROBE:
                return [command.body], ()
            return [request.pack(), self._feature_set(number, payload)], ()
        if operation != vfio.FEATURE_GET:
            raise OSError(errno.EINVAL, f"no operation on feature {number}")
        room = request.argsz - codec.FEATURE_SIZE
        answer = self._feature_get(number, payload, room)
        size = sum(len(part) for part in answer)
        if room < size:
            raise OSError(errno.EINVAL, f"argsz {request.argsz} for an answer of {size} bytes")
        return [Feature(codec.FEATURE_SIZE + size, request.flags).pack(), *answer], ()

    def _operations(self, number: int) -> int:
        """Return which operations a feature has: FEATURE_GET, FEATURE_SET; none where it is not there."""
        device = self._device
        if not device.migration_flags:
            return 0
        match number:
            case DeviceFeature.MIGRATION:
                return vfio.FEATURE_GET
            case DeviceFeature.MIG_DEVICE_STATE:
                return vfio.FEATURE_GET | vfio.FEATURE_SET
            case DeviceFeature.DMA_LOGGING_START | DeviceFeature.DMA_LOGGING_STOP if device.dma_logging:
                return vfio.FEATURE_SET
            case DeviceFeature.DMA_LOGGING_REPORT if device.dma_logging:
                return vfio.FEATURE_GET
            case DeviceFeature.MIG_DATA_SIZE if device.extension.data_size:
                return vfio.FEATURE_GET
            case codec.PRECOPY_INFO if device.extension.precopy_info:
                return vfio.FEATURE_GET
            case codec.WRITE_JOURNAL if device.extension.trace:
                return vfio.FEATURE_GET
            case codec.IOMMU_DIRTY_START | codec.IOMMU_DIRTY_STOP if device.extension.iommu_dirty:
                return vfio.FEATURE_SET
            case codec.IOMMU_DIRTY_REPORT if device.extension.iommu_dirty:
                return vfio.FEATURE_GET
        return 0

    def _feature_set(self, number: int, payload: memoryview) -> Buffer:
        match number:
            case DeviceFeature.MIG_DEVICE_STATE:
                self._device.set_state(vfio.unpack_device_state(payload))
            case DeviceFeature.DMA_LOGGING_START:
                start = LoggingStart.unpack(payload)
                return LoggingStart(self._device.logging_start(start.page_size, start.ranges), start.ranges).pack()
            case DeviceFeature.DMA_LOGGING_STOP:
                self._device.logging_stop()
            case codec.IOMMU_DIRTY_START:
                used = self._device.iommu_dirty_start(LoggingStart.unpack(payload).page_size)
                return LoggingStart(used, ()).pack()
            case codec.IOMMU_DIRTY_STOP:
                self._device.iommu_dirty_stop()
        return payload

    def _feature_get(self, number: int, payload: memoryview, room: int) -> Sequence[Buffer]:
        match number:
            case DeviceFeature.MIGRATION:
                return [vfio.pack_migration_flags(self._device.migration_flags)]
            case DeviceFeature.MIG_DEVICE_STATE:
                return [vfio.pack_device_state(self._device.get_state(), 0)]
            case DeviceFeature.MIG_DATA_SIZE:
                return [vfio.pack_data_size(self._device.stop_copy_length())]
            case codec.PRECOPY_INFO:
                if self._device.get_state() not in PRECOPY_STATES:
                    raise OSError(errno.EINVAL, "the device is not in PRE_COPY")
                return [self._device.precopy_info().pack()]
            case codec.WRITE_JOURNAL:
                iova, length = vfio.unpack_fixed(_JOURNAL_QUERY, payload, "WRITE_JOURNAL")
                return [self._device.write_journal(iova, length, max(room, 0) // JOURNAL_ROW.itemsize)]
            case codec.IOMMU_DIRTY_REPORT:
                return self._report(LoggingReport.unpack(payload), room, self._device.iommu_dirty_report)
            case _:
                return self._report(LoggingReport.unpack(payload), room, self._device.logging_report)

    def _report(self, report: LoggingReport, room: int, take: Callable[[int, int, int], Buffer]) -> Sequence[Buffer]:
        vfio.check_logging_report(report)
        size = vfio.bitmap_bytes(report.length, report.page_size)
        # Before the log is read, for reading clears it.
        if size > codec.MAX_BITMAP or room < LoggingReport.SIZE + size:
            raise OSError(errno.EINVAL, f"no room for a bitmap of {size} bytes")
        return [report.pack(), take(report.iova, report.length, report.page_size)]


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at `path`, which is there only when clients can connect.

    A client that sees a socket before it listens is refused, so the socket is made under another name and renamed. What
    a server that has died has left there is replaced; OSError (EADDRINUSE) if one listens, or if it is no socket.
    """
    if path.exists() and (not path.is_socket() or _listens(path)):
        raise OSError(errno.EADDRINUSE, "there is a server already, or something that is no socket")
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        temporary.unlink(missing_ok=True)
        sock.bind(os.fspath(temporary))
        temporary.chmod(0o600)
        sock.listen(1)
        temporary.rename(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _listens(path: Path) -> bool:
    # To ask by connecting would be the client that a server has waited for; one of another type it never sees.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
        return True
