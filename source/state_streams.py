"""What travels beside the pages: a device's migration data, and the changes of the mappings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from switchover.v1 import host_pb2, migration_pb2, migration_pb2_grpc

from common.machine.client import Changes, DeviceInfo, DeviceSizes, MachineClient, MappingChange
from common.machine.device import Saved
from source.limiter import Limiter
from source.reconnect import Connection, Link
from source.resuming import ResumingStream

__all__ = ["DeviceStream", "EndlessStateError", "MappingStream", "most_stop_copy"]

Kind = migration_pb2.DeviceStateKind
READ_SIZE = 1 << 20
FAILED_LENGTH = 100 << 30  # QEMU: VFIO_MIG_STOP_COPY_SIZE
UNDECLARED_LENGTH = 1 << 30  # that a device may give beyond twice what it has declared
BATCH = 10_000  # mappings in a message
IDLE_SECONDS = 0.05


class EndlessStateError(Exception):
    """A device gives more in STOP_COPY than can be its state."""


def most_stop_copy(declared: int | None) -> int:
    """Return how many bytes are believed to be a device's state that has declared so many; None: it has not.

    What a device declares is an estimate, made while it ran; what STOP_COPY brings has no end but the device's word,
    and the machine stands still until then.
    """
    return FAILED_LENGTH if declared is None else 2 * declared + UNDECLARED_LENGTH


class MappingStream:
    """Carries the changes of DMA mappings."""

    def __init__(self, stub: migration_pb2_grpc.MigrationServiceStub, session_id: str, link: Link) -> None:
        self._stream: ResumingStream[migration_pb2.SendMappingsRequest, migration_pb2.SendMappingsResponse] = (
            ResumingStream(
                link,
                lambda requests, connection: stub.SendMappings(
                    requests, metadata=(("session-id", session_id), connection.metadata)
                ),
                lambda begins: begins.mappings,
            )
        )
        self.mappings = 0

    @property
    def sequence(self) -> int:
        """Number of the last batch."""
        return self._stream.sequence

    def send(self, changes: Changes) -> None:
        """Send what has changed; return when vIOMMU and devices of the destination have it."""
        # All that is gone goes first, in each batch too: what was there may stand in the way of what is there now.
        gone = len(changes.removed)
        for start in range(0, gone + len(changes.added), BATCH):
            end = start + BATCH
            self._send(changes.removed[start:end], changes.added[max(start - gone, 0) : max(end - gone, 0)])
        self.mappings += len(changes.added)
        self._stream.drain()

    def _send(self, removed: Sequence[MappingChange], added: Sequence[MappingChange]) -> None:
        self._stream.send(
            migration_pb2.SendMappingsRequest(
                sequence=self._stream.next_sequence(),
                removed=[_range(change) for change in removed],
                added=[
                    migration_pb2.Mapping(
                        range=_range(change), gpa=change.gpa, readable=change.readable, writable=change.writable
                    )
                    for change in added
                ],
            )
        )

    def interrupt(self, failure: Exception) -> None:
        """Let every call fail with `failure`."""
        self._stream.interrupt(failure)

    def close(self, *, abort: bool) -> None:
        """End the stream."""
        self._stream.close(abort=abort)


def _range(change: MappingChange) -> migration_pb2.MappingRange:
    return migration_pb2.MappingRange(container=change.container, iova=change.iova, size=change.size)


class DeviceStream:
    """Carries one device's migration data, beside everything else, from PRE_COPY to the last byte of STOP_COPY.

    All of it is of one saving session. If that ends early, because the machine was paused or the device was reset, what
    was sent is void: a RESTART says so, and the stream goes on with the next session as if nothing had been sent.
    """

    def __init__(
        self,
        open_channel: Callable[[], grpc.Channel],
        session_id: str,
        link: Link,
        device: DeviceInfo,
        machine: MachineClient,
        limiter: Limiter,
        *,
        loads_ahead: bool,
        marks_last: bool,
    ) -> None:
        """Open the stream. `machine` is a connection of its own.

        `loads_ahead`: both ends have pre-copy; `marks_last`: the destination knows by a mark that data are the last.
        """
        self.device = device
        self._machine = machine
        self._limiter = limiter
        self._open_channel = open_channel
        self._session_id = session_id
        self._channel: grpc.Channel | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._precopy, name=f"{device.name} precopy", daemon=True)
        self.failure: Exception | None = None
        self.precopy_bytes = 0
        self.stop_copy_bytes = 0
        self._pending_bytes = 0
        self._stop_copy_length = -1
        self._loads_ahead = loads_ahead
        self._marks_last = marks_last
        self._ended = False  # so marked
        self._buffer_size = READ_SIZE
        self._session = 0  # of what was read last; 0: there was none
        self._newest_session = 0  # that we have heard of
        self._sent_in_session = False
        self._init_sequence = 0  # of INIT_DATA_SENT in this session, 0: not sent
        self._loaded_sequence = 0
        self._stream: ResumingStream[migration_pb2.SendDeviceStateRequest, migration_pb2.SendDeviceStateResponse] = (
            ResumingStream(link, self._call, lambda begins: begins.devices[device.name], self._take_ack)
        )

    def _call(self, requests: Iterator[migration_pb2.SendDeviceStateRequest], connection: Connection) -> Any:
        """Open the stream, on a channel that no loss keeps from trying at once."""
        self._close_channel()
        self._channel = self._open_channel()
        stub = migration_pb2_grpc.MigrationServiceStub(self._channel)
        metadata = (("session-id", self._session_id), ("device", self.device.name), connection.metadata)
        return stub.SendDeviceState(requests, metadata=metadata)

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()

    @property
    def sequence(self) -> int:
        """Number of the last record."""
        return self._stream.sequence

    @property
    def initial_data_loaded(self) -> bool:
        """Whether the destination has loaded the initial data of the session that goes on, if it loads ahead at all."""
        if not self._loads_ahead:
            return True
        is_newest = self._newest_session == self._session
        return is_newest and bool(self._init_sequence) and self._loaded_sequence == self._init_sequence

    def _take_ack(self, response: migration_pb2.SendDeviceStateResponse) -> None:
        # An answer to what was sent before a RESTART has the number of an INIT_DATA_SENT that does not count any more.
        if response.initial_data_loaded and 0 < self._init_sequence <= response.applied_sequence:
            self._loaded_sequence = self._init_sequence

    def start(self) -> None:
        """Start to read and send what the device offers in PRE_COPY."""
        self._size_buffer(self._machine.sizes(self.device.name))
        if self.device.has_precopy:
            self._thread.start()

    def _precopy(self) -> None:
        try:
            while not self._stopping.is_set():
                data = self._read(Kind.DEVICE_STATE_KIND_PRECOPY_DATA).data
                self.precopy_bytes += len(data)
                sizes = self._machine.sizes(self.device.name)
                self._pending_bytes = (sizes.initial_bytes or 0) + (sizes.dirty_bytes or 0)
                # A device that cannot say how much initial data it has, has sent it when it first has nothing to read.
                sent = not data if sizes.initial_bytes is None else sizes.initial_bytes == 0
                if sent and sizes.session == self._session != 0 and not self._init_sequence:
                    self._init_sequence = self._stream.sequence + 1  # first, for the ack may be quick
                    self._sent_in_session = True
                    self._send(Kind.DEVICE_STATE_KIND_INIT_DATA_SENT)
                # What a device writes again meanwhile may wait for what follows it: to ask without a pause for each
                # page of it keeps our processes busy and those of the device, in the blackout of others too.
                told = sizes.initial_bytes is not None
                if not data or (told and self._pending_bytes < self._buffer_size):
                    self._stopping.wait(IDLE_SECONDS)
                self._stream.check()
        except Exception as error:  # noqa: BLE001  # a thread's failure belongs to the story, which looks at `failure`
            self.failure = error

    def _size_buffer(self, sizes: DeviceSizes) -> None:
        """Read no more at once than there is, and 1 MiB at most (QEMU: vfio_save_setup)."""
        self._buffer_size = min(READ_SIZE, sizes.stop_copy_length or READ_SIZE)

    def _read(self, kind: migration_pb2.DeviceStateKind.ValueType) -> Saved:
        """Read once and send what comes; first say so if it is of another session."""
        saved = self._machine.read_device(self.device.name, self._buffer_size)
        if saved.session != self._session:
            if self._sent_in_session:
                self._init_sequence = 0
                self._sent_in_session = False
                self._send(Kind.DEVICE_STATE_KIND_RESTART)
            self._session = self._newest_session = saved.session
        if saved.data:
            self._sent_in_session = True
            self._ended = saved.ended and self._marks_last
            self._send(kind, bytes(saved.data), last=self._ended)
        return saved

    def _send(self, kind: migration_pb2.DeviceStateKind.ValueType, data: bytes = b"", *, last: bool = False) -> None:
        self._limiter.take(len(data))
        number = self._stream.next_sequence()
        self._stream.send(migration_pb2.SendDeviceStateRequest(sequence=number, kind=kind, data=data, last=last))

    def remaining(self) -> int:
        """Ask what the device would have to send if it stopped now, in bytes; raise what went wrong in pre-copy.

        A device that cannot say counts as nothing: to wait for an unknown would be to wait for ever. One that fails to
        say it counts as more than fits into any downtime (contract M5).
        """
        if self.failure is not None:
            raise self.failure
        sizes = self._machine.sizes(self.device.name)
        self._newest_session = sizes.session
        length = sizes.stop_copy_length
        self._stop_copy_length = -1 if length is None else length
        return FAILED_LENGTH if sizes.length_failed else length or 0

    def progress(self) -> host_pb2.DeviceProgress:
        """Return how far it is."""
        return host_pb2.DeviceProgress(
            name=self.device.name,
            sent_bytes=self.precopy_bytes + self.stop_copy_bytes,
            pending_bytes=self._pending_bytes,
            stop_copy_length=self._stop_copy_length,
            initial_data_loaded=self.initial_data_loaded,
        )

    def interrupt(self, failure: Exception) -> None:
        """Let every call on this connection fail with `failure`; on the next one the device is read on."""
        self._stream.interrupt(failure)

    def leave_precopy(self) -> None:
        """Read in PRE_COPY no more, once what was begun is sent."""
        self._stopping.set()

    def end_precopy(self) -> None:
        """Wait until that is so; raise what went wrong there."""
        self.leave_precopy()
        if self._thread.is_alive():
            self._thread.join()
        if self.failure is not None:
            raise self.failure

    def stop_copy(self) -> None:
        """Send all that is left of a stopped device; return when the destination's device has taken it.

        `EndlessStateError` if it does not come to an end.
        """
        most = most_stop_copy(None if self._stop_copy_length < 0 else self._stop_copy_length)
        ended = False
        while not ended:
            saved = self._read(Kind.DEVICE_STATE_KIND_STOP_COPY_DATA)
            ended = saved.ended
            self.stop_copy_bytes += len(saved.data)
            if self.stop_copy_bytes > most:
                raise EndlessStateError(f"{self.device.name}: more than {most} bytes of state in STOP_COPY, and no end")
        if not self._ended:
            self._send(Kind.DEVICE_STATE_KIND_END)
        self._stream.drain()

    def leave_stop_copy(self) -> None:
        """Take the device to STOP, which may last: not in the blackout unless it must (QEMU: vfio_save_cleanup)."""
        self._machine.leave_stop_copy(self.device.name)

    def stop_reading(self) -> None:
        """Read nothing more from the device, whether or not it answers."""
        self._stopping.set()
        self._machine.close()

    def close(self, *, abort: bool) -> None:
        """End the stream."""
        self.stop_reading()
        if abort:
            self._stream.interrupt(ConnectionError("the migration has ended"))
        if self._thread.is_alive():
            self._thread.join()
        self._stream.close(abort=abort)
        self._close_channel()
