"""The machine's side of a vfio-user connection: a device as its owner sees it.

Works with servers of others (libvfio-user and what is built on it) as with ours: what only ours can do is asked only
where it was offered, and what others are known to get wrong is avoided or checked.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Self, TypeVar

import numpy as np
import numpy.typing as npt

from common.memory.write_journal import JOURNAL_ROW, Rows
from common.vfio import feature as vfio
from common.vfio.feature import Buffer, DeviceFeature, LoggingReport, LoggingStart, PrecopyInfo, Range
from common.vfio.migration import PRECOPY_STATES, DeviceState, MigrationFlags
from common.vfio_user import codec
from common.vfio_user.capabilities import MAX_TRANSFER, PAGE_SIZE, Capabilities, Extension, TwinSocket
from common.vfio_user.codec import Command, DmaMap, DmaUnmap, Feature, MigData, RegionAccess, Version
from common.vfio_user.description import (
    DeviceInfo,
    IoEventFd,
    IrqFlags,
    IrqInfo,
    IrqSet,
    RegionInfo,
    RegionQuery,
    unpack_io_fds,
)
from common.vfio_user.message_dma import serve_dma
from common.vfio_user.transport import Connection, ConnectionLostError, Message

__all__ = ["DeviceError", "VfioUserClient"]

_MAX_MSG_FDS: Final = 16
_MINOR: Final = 2
_MAX_DESCRIBED: Final = 256  # regions, interrupts
_JOURNAL_ROOM: Final = 1 << 20  # bytes of the answer

# libvfio-user reads a body with one recv, and takes what did not fit into one socket buffer for the next header. Bodies
# up to this size, in bytes, have never been split.
_SAFE_BODY: Final = 32 << 10

# What a server that does not know a feature, or a flag, answers.
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS})


_T = TypeVar("_T")


class DeviceError(OSError):
    """A device has refused something (its errno), is gone (ENOTCONN) or answers nonsense (EPROTO)."""

    def __str__(self) -> str:
        """Return device, request and reason."""
        return str(self.strerror)


class VfioUserClient:
    """A device at the other end of a socket, which the client takes over. Any thread may call anything.

    Connecting brings a device that some earlier client has left stopped back to RUNNING. `on_dma_read` and
    `on_dma_write` carry out the device's DMA by message, in a thread of the client; an OSError of theirs is the answer
    that the device gets. `on_close` is called once, in such a thread, when the other side goes. `timeout` is for each
    request, in seconds.

    Everything raises `DeviceError`; requests that are answered but refused leave the connection as it was.
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        *,
        timeout: float | None = None,
        on_dma_read: Callable[[int, int], Buffer] | None = None,
        on_dma_write: Callable[[int, memoryview], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.on_dma_read = on_dma_read
        self.on_dma_write = on_dma_write
        self.on_close = on_close
        self._closing = threading.Lock()  # taken by whoever ends it first, the other side or we
        self._timeout = timeout
        self._connection = Connection(sock, limit=codec.MAX_REPLY_SIZE, timeout=timeout, commands_bring_fds=False)
        self._connections = [self._connection]
        self.closed = self._connection.closed
        self.regions: list[RegionInfo] = []
        self.irqs: list[IrqInfo] = []
        self._threads = [serve_dma(self._connection, self, self._lost)]
        try:
            self._capabilities = self._negotiate()
            self.extension: Extension | None = self._capabilities.extension
            self.migration_flags = self._get_migration_flags()
            self.dma_logging = self._probe(DeviceFeature.DMA_LOGGING_START, vfio.FEATURE_SET)
            if self.migration_flags:
                self._return_to_running()
            self._describe()
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, path: str | os.PathLike[str], name: str, timeout: float | None = None) -> VfioUserClient:
        """Connect to the device that listens at `path`; `timeout` in seconds, for each request too."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(os.fspath(path))
        except OSError as error:
            sock.close()
            raise DeviceError(error.errno, f"{name}: connect {os.fspath(path)}: {error.strerror or error}") from None
        return cls(sock, name, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; whoever waits for the device gets a `DeviceError`."""
        self._closing.acquire(blocking=False)
        for connection in self._connections:
            connection.shutdown()
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()
            for connection in self._connections:
                connection.close()
        for region in self.regions:
            if region.fd is not None:
                os.close(region.fd)
        self.regions = []

    def _lost(self) -> None:
        if self._closing.acquire(blocking=False):
            for connection in self._connections:
                connection.shutdown()
            if self.on_close is not None:
                self.on_close()

    # Access

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Return `count` bytes at `offset` of a region; in several requests if they are more than one may carry."""
        limit = min(self._capabilities.max_data_xfer_size, MAX_TRANSFER)
        if count <= limit:
            return bytes(self._region_read(index, offset, count))
        parts = (self._region_read(index, offset + at, min(limit, count - at)) for at in range(0, count, limit))
        return b"".join(parts)

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """Write `data` at `offset` of a region; in several requests if they are more than one may carry."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), self._write_limit):
            part = view[at : at + self._write_limit]
            access = RegionAccess(offset + at, index, len(part))
            what = f"REGION_WRITE region {index} offset 0x{offset + at:x} size 0x{len(part):x}"
            self._request(Command.REGION_WRITE, what, access.pack(), part)

    def dma_map(self, iova: int, size: int, flags: int, fd: int | None = None, offset: int = 0) -> None:
        """Make `size` bytes at `offset` of a file accessible to the device at `iova`; without file by message.

        `flags`: codec.DMA_READABLE, codec.DMA_WRITABLE, as the device sees it.
        """
        what = f"DMA_MAP iova 0x{iova:x} size 0x{size:x}"
        body = DmaMap(flags, offset, iova, size).pack()
        self._request(Command.DMA_MAP, what, body, fds=[] if fd is None else [fd])

    def dma_unmap(self, iova: int, size: int, *, bitmap: bool = False) -> npt.NDArray[np.uint64] | None:
        """Take a mapping away, exactly as it was made.

        With `bitmap` return the pages (4096 bytes) that the device has logged there and not reported, as 64-bit words;
        None if it cannot tell: it has unmapped without.
        """
        length = vfio.bitmap_bytes(size, PAGE_SIZE)
        what = f"DMA_UNMAP iova 0x{iova:x} size 0x{size:x}"
        if bitmap and length <= MAX_TRANSFER - 64:  # servers take an argsz up to 1 MiB
            request = DmaUnmap(codec.UNMAP_GET_DIRTY_BITMAP, iova, size, PAGE_SIZE, length)
            try:
                reply = self._request(Command.DMA_UNMAP, what, request.pack())
            except DeviceError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            else:
                return _bits(self._checked(what, request.unpack_bitmap, reply.body), size, PAGE_SIZE)
        self._request(Command.DMA_UNMAP, what, DmaUnmap(0, iova, size).pack())
        return None

    def set_irqs(
        self, index: int, flags: int, start: int, count: int, data: Buffer = b"", fds: Sequence[int] = ()
    ) -> None:
        """Configure, mask or trigger `count` vectors from `start` (kernel: VFIO_DEVICE_SET_IRQS)."""
        step = max(self._capabilities.max_msg_fds, 1) if fds else max(count, 1)
        for at in range(0, max(count, 1), step):
            part = IrqSet(index, IrqFlags(flags), start + at, min(step, count - at))
            what = f"DEVICE_SET_IRQS index {index} flags 0x{flags:x} start {part.start} count {part.count}"
            self._request(Command.DEVICE_SET_IRQS, what, part.pack(data), fds=fds[at : at + step])

    def get_irq_info(self, index: int) -> IrqInfo:
        """Return what the device says about an interrupt."""
        what = f"DEVICE_GET_IRQ_INFO index {index}"
        reply = self._request(Command.DEVICE_GET_IRQ_INFO, what, IrqInfo(index).pack())
        return self._checked(what, IrqInfo.unpack, reply.body)

    def get_region_io_fds(self, index: int) -> list[IoEventFd]:
        """Return the eventfds that stand for writes to a region; the caller owns their descriptors.

        Several of them may have the same descriptor.
        """
        what = f"DEVICE_GET_REGION_IO_FDS region {index}"
        argsz = 0
        for _ in range(2):
            request = RegionQuery(index, argsz).pack_io_fds()
            reply = self._request(Command.DEVICE_GET_REGION_IO_FDS, what, request, keep_fds=True)
            try:
                items, argsz = self._checked(what, partial(unpack_io_fds, fds=reply.fds), reply.body)
                if argsz <= len(reply.body):
                    kept = {item.fd for item in items}
                    reply.fds = [fd for fd in reply.fds if fd not in kept]
                    return items
            finally:
                reply.close_fds()
            if argsz > MAX_TRANSFER:
                break
        raise self._nonsense(what, f"argsz {argsz} for a body of {len(reply.body)} bytes")

    def reset(self) -> None:
        """Reset the device: it is RUNNING afterwards, whatever its state was.

        libvfio-user refuses a reset of a stopped device, and keeps RESUMING over a reset.
        """
        try:
            self._request(Command.DEVICE_RESET, "DEVICE_RESET")
        except DeviceError as error:
            if error.errno != errno.EINVAL or not self.migration_flags:
                raise
            self.set_state(DeviceState.RUNNING)
            self._request(Command.DEVICE_RESET, "DEVICE_RESET")
        if self.migration_flags and self.get_state() != DeviceState.RUNNING:
            self.set_state(DeviceState.RUNNING)

    # Migration

    def get_state(self) -> DeviceState:
        """Return the device's migration state."""
        return self._get("state", DeviceFeature.MIG_DEVICE_STATE, 8, vfio.unpack_device_state)

    def set_state(self, state: DeviceState) -> None:
        """Tell the device to go to a migration state; after a refusal it may be in any (`get_state` tells)."""
        self._set(f"state {state.name}", DeviceFeature.MIG_DEVICE_STATE, vfio.pack_device_state(state))

    def precopy_info(self) -> PrecopyInfo | None:
        """Return how much can be read in PRE_COPY now; None if the device cannot tell. EINVAL in other states."""
        if self.extension is None or not self.extension.precopy_info:
            return None
        return self._get("pre-copy info", codec.PRECOPY_INFO, 16, PrecopyInfo.unpack)

    def stop_copy_length(self) -> int | None:
        """Return how many bytes STOP_COPY would bring now; None if the device cannot tell."""
        if self.extension is None or not self.extension.data_size:
            return None
        return self._get("size of the state", DeviceFeature.MIG_DATA_SIZE, 8, vfio.unpack_data_size)

    def mig_data_read(self, size: int) -> memoryview:
        """Return up to `size` bytes (1 MiB at most) of the device's state.

        Nothing means nothing now in PRE_COPY, and the end in STOP_COPY; less than `size` means neither.
        """
        size = min(size, MAX_TRANSFER)
        what = f"MIG_DATA_READ size 0x{size:x}"
        try:
            reply = self._request(Command.MIG_DATA_READ, what, MigData(size).pack())
        except DeviceError as error:
            # In STOP_COPY the kernel forbids ENOMSG, and taking it for the end would cut the state off.
            if error.errno == errno.ENOMSG and self.get_state() in PRECOPY_STATES:
                return memoryview(b"")
            raise
        data = self._checked(what, lambda body: MigData.unpack(body).data(body), reply.body)
        if len(data) > size:
            raise self._nonsense(what, f"{len(data)} bytes came")
        return data

    def mig_data_write(self, data: Buffer) -> None:
        """Give the device the next part of its state, in as many requests as it takes."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), self._write_limit):
            part = view[at : at + self._write_limit]
            what = f"MIG_DATA_WRITE size 0x{len(part):x}"
            self._request(Command.MIG_DATA_WRITE, what, MigData(len(part)).pack(), part)

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        """Start the device's log of its DMA writes to `ranges`; return the page size that it uses, in bytes."""
        payload = LoggingStart(page_size, tuple(ranges)).pack()
        what = f"logging of {len(ranges)} ranges"
        answer = self._set(what, DeviceFeature.DMA_LOGGING_START, payload)
        return self._checked(what, LoggingStart.unpack, answer).page_size

    def logging_stop(self) -> None:
        """Stop the log; what it held is lost."""
        self._set("logging stop", DeviceFeature.DMA_LOGGING_STOP, LoggingStart(PAGE_SIZE, ()).pack())

    def logging_report(self, iova: int, length: int, page_size: int) -> npt.NDArray[np.uint64]:
        """Return, and clear, what was logged of `length` bytes at `iova`: a bit for each `page_size` bytes.

        EPROTO if the device reports success without a bitmap, as some do for a range of several mappings: what it had
        logged there is lost or not, so it has to be taken for dirty.
        """
        return self._report("logging report", DeviceFeature.DMA_LOGGING_REPORT, LoggingReport(iova, length, page_size))

    def write_journal(self, iova: int, length: int) -> Rows:
        """Return what the device wrote to a range, by IOVA, oldest first; nothing if it keeps no journal."""
        if self.extension is None or not self.extension.trace:
            return np.empty(0, JOURNAL_ROW)
        query = struct.pack("<QQ", iova, length)
        return self._get(
            "write journal", codec.WRITE_JOURNAL, _JOURNAL_ROOM, lambda rows: np.frombuffer(rows, JOURNAL_ROW), query
        )

    def iommu_dirty_start(self, page_size: int) -> int:
        """Start the dirty bits of the IOMMU that the server plays; return the page size in bytes that they have."""
        payload = LoggingStart(page_size, ()).pack()
        answer = self._set("start of IOMMU dirty bits", codec.IOMMU_DIRTY_START, payload)
        return self._checked("start of IOMMU dirty bits", LoggingStart.unpack, answer).page_size

    def iommu_dirty_stop(self) -> None:
        """Stop them; what they held is lost."""
        self._set("stop of IOMMU dirty bits", codec.IOMMU_DIRTY_STOP, LoggingStart(PAGE_SIZE, ()).pack())

    def iommu_dirty_report(self, iova: int, length: int, page_size: int) -> npt.NDArray[np.uint64]:
        """Return, and clear, the IOMMU's bits of `length` bytes at `iova`; otherwise as `logging_report`."""
        return self._report("IOMMU dirty bits", codec.IOMMU_DIRTY_REPORT, LoggingReport(iova, length, page_size))

    def _report(self, name: str, number: int, report: LoggingReport) -> npt.NDArray[np.uint64]:
        size = vfio.bitmap_bytes(report.length, report.page_size)
        if size > codec.MAX_BITMAP:
            raise DeviceError(errno.E2BIG, f"{self.name}: {name}: a bitmap of {size} bytes")

        def bitmap(payload: memoryview) -> memoryview:
            if len(payload) < LoggingReport.SIZE + size or LoggingReport.unpack(payload) != report:
                raise ValueError("success without the bitmap")
            return payload[LoggingReport.SIZE : LoggingReport.SIZE + size]

        what = f"{name} iova 0x{report.iova:x} size 0x{report.length:x}"
        found = self._get(what, number, LoggingReport.SIZE + size, bitmap, report.pack())
        return _bits(found, report.length, report.page_size)

    # Connecting

    def _negotiate(self) -> Capabilities:
        ours = Capabilities(_MAX_MSG_FDS, MAX_TRANSFER, PAGE_SIZE, Extension(), TwinSocket())
        reply = self._request(Command.VERSION, "VERSION", Version(0, _MINOR, ours).pack(), keep_fds=True)
        try:
            version = self._checked("VERSION", Version.unpack, reply.body)
            if version.major != 0:
                raise self._nonsense("VERSION", f"major version {version.major}")
            self._take_twin(version.capabilities.twin_socket, reply.fds)
        finally:
            reply.close_fds()
        return version.capabilities

    def _take_twin(self, twin: TwinSocket | None, fds: list[int]) -> None:
        """Begin to answer the device's commands on the socket that it sent for them, if it has sent one."""
        if twin is None or twin.fd_index is None:
            return
        if twin.fd_index >= len(fds) or not stat.S_ISSOCK(os.fstat(fds[twin.fd_index]).st_mode):
            raise self._nonsense("VERSION", "the twin socket is not among the descriptors")
        sock = socket.socket(fileno=fds.pop(twin.fd_index))
        connection = Connection(sock, limit=codec.MAX_REPLY_SIZE, timeout=self._timeout, commands_bring_fds=False)
        self._connections.append(connection)
        self._threads.append(serve_dma(connection, self, self._lost))

    def _get_migration_flags(self) -> MigrationFlags:
        try:
            flags = self._get("migration", DeviceFeature.MIGRATION, 8, vfio.unpack_migration_flags)
        except DeviceError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return MigrationFlags(0)
        # Without STOP_COPY nothing can be moved, whatever else the device says.
        return flags if flags & MigrationFlags.STOP_COPY else MigrationFlags(0)

    def _return_to_running(self) -> None:
        """Undo what an earlier client left: with some servers the state outlives a connection.

        A stopped device refuses to be set up.
        """
        try:
            self.set_state(DeviceState.RUNNING)
        except DeviceError as error:
            if error.errno == errno.ENOTCONN:
                raise
            self.reset()

    def _describe(self) -> None:
        reply = self._request(Command.DEVICE_GET_INFO, "DEVICE_GET_INFO", DeviceInfo().pack())
        info = self._checked("DEVICE_GET_INFO", DeviceInfo.unpack, reply.body)
        if info.num_regions > _MAX_DESCRIBED or info.num_irqs > _MAX_DESCRIBED:
            raise self._nonsense("DEVICE_GET_INFO", f"{info.num_regions} regions and {info.num_irqs} interrupts")
        for index in range(info.num_regions):
            self.regions.append(self._get_region_info(index))
        self.irqs = [self.get_irq_info(index) for index in range(info.num_irqs)]

    def _get_region_info(self, index: int) -> RegionInfo:
        what = f"DEVICE_GET_REGION_INFO region {index}"
        argsz = 0
        for _ in range(2):
            request = RegionQuery(index, argsz).pack_info()
            reply = self._request(Command.DEVICE_GET_REGION_INFO, what, request, keep_fds=True)
            try:
                region, argsz = self._checked(what, RegionInfo.unpack, reply.body)
                if argsz <= len(reply.body):
                    return replace(region, fd=reply.fds.pop(0) if reply.fds else None)
            finally:
                reply.close_fds()
            if argsz > MAX_TRANSFER:
                break
        raise self._nonsense(what, f"argsz {argsz} for a body of {len(reply.body)} bytes")

    # Requests

    @property
    def _write_limit(self) -> int:
        """Bytes of data that a request may carry to the device."""
        limit = min(self._capabilities.max_data_xfer_size, MAX_TRANSFER)
        return limit if self.extension is not None else min(limit, _SAFE_BODY)

    def _region_read(self, index: int, offset: int, count: int) -> Buffer:
        what = f"REGION_READ region {index} offset 0x{offset:x} size 0x{count:x}"
        reply = self._request(Command.REGION_READ, what, RegionAccess(offset, index, count).pack())
        if len(reply.body) != codec.REGION_ACCESS_SIZE + count:
            raise self._nonsense(what, f"{len(reply.body)} bytes came")
        return reply.body[codec.REGION_ACCESS_SIZE :]

    def _probe(self, number: int, operation: int) -> bool:
        request = Feature(codec.FEATURE_SIZE, number | operation | vfio.FEATURE_PROBE)
        try:
            self._request(Command.DEVICE_FEATURE, f"probe of feature {number}", request.pack())
        except DeviceError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return False
        return True

    def _get(self, what: str, number: int, answer: int, read: Callable[[memoryview], _T], payload: bytes = b"") -> _T:
        """Get a feature whose answer has `answer` bytes, and read it."""
        request = Feature(codec.FEATURE_SIZE + answer, number | vfio.FEATURE_GET)
        reply = self._request(Command.DEVICE_FEATURE, f"get {what}", request.pack(), payload)
        return self._checked(f"get {what}", read, memoryview(reply.body)[codec.FEATURE_SIZE :])

    def _set(self, what: str, number: int, payload: bytes) -> memoryview:
        request = Feature(codec.FEATURE_SIZE + len(payload), number | vfio.FEATURE_SET)
        reply = self._request(Command.DEVICE_FEATURE, f"set {what}", request.pack(), payload)
        return memoryview(reply.body)[codec.FEATURE_SIZE :]

    def _request(
        self, command: Command, what: str, *parts: Buffer, fds: Sequence[int] = (), keep_fds: bool = False
    ) -> Message:
        try:
            reply = self._connection.request(command, parts, fds, keep_fds=keep_fds)
        except ConnectionLostError as error:
            raise DeviceError(errno.ENOTCONN, f"{self.name}: {what}: {error.strerror}") from None
        if reply.error:
            reply.close_fds()
            raise DeviceError(reply.error, f"{self.name}: {what}: {os.strerror(reply.error)}")
        return reply

    def _checked(self, what: str, read: Callable[[memoryview], _T], body: Buffer) -> _T:
        try:
            return read(memoryview(body))
        except (ValueError, OSError) as error:
            raise self._nonsense(what, str(error)) from None

    def _nonsense(self, what: str, text: str) -> DeviceError:
        return DeviceError(errno.EPROTO, f"{self.name}: {what}: {text}")


def _bits(data: memoryview, length: int, page_size: int) -> npt.NDArray[np.uint64]:
    """Return a bitmap for `length` bytes as words, perhaps read-only, without the bits that stand for no page."""
    words = np.frombuffer(data, dtype="<u8")
    surplus = words.size * 64 - -(-length // page_size)
    if surplus:
        words = words.copy()
        words[-1] &= np.uint64((1 << 64 - surplus) - 1)
    return words
