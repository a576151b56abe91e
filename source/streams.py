"""All streams of a migration: page lanes, mappings, and one for each device."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack

import grpc
from switchover.v1 import host_pb2, migration_pb2, migration_pb2_grpc

from common.machine.client import DeviceInfo, MachineClient, Rest
from common.memory.ram import GuestRam
from common.rpc import versions
from common.vfio.migration import MigrationFlags
from source.lane_kinds import batch_pages
from source.lane_stats import LaneStats
from source.lanes import OpenLane, PageLanes
from source.limiter import Limiter
from source.packer import Packer
from source.reconnect import Link
from source.state_streams import DeviceStream, MappingStream

__all__ = ["Streams"]


class Streams:
    """Opened all together, and ended all together; one that fails for good ends the session."""

    def __init__(
        self,
        stub: migration_pb2_grpc.MigrationServiceStub,
        open_channel: Callable[[], grpc.Channel],
        open_lane: OpenLane,
        link: Link,
        session_id: str,
        request: host_pb2.MigrateRequest,
        features: Container[str],
        machine: MachineClient,
        ram: GuestRam,
        devices: Sequence[DeviceInfo],
        peers: Mapping[str, int],
        limiter: Limiter,
        on_applied: Callable[[int, int], None],
    ) -> None:
        """`peers` are the migration flags of the destination's devices; `on_applied` is told (pages, bytes) of acks."""
        self._link = link
        with ExitStack() as opened:
            unit_pages = batch_pages(request.lane_kind, features)
            packing = versions.PACKING in features
            self._packer = Packer(ram, request.compression, request.lanes, unit_pages, packing=packing)
            opened.callback(self._packer.close)

            def applied(pages: int, size: int) -> None:
                self._packer.applied(pages, size)
                on_applied(pages, size)

            self.lanes = PageLanes(request.lanes, link, open_lane, self._packer, applied)
            opened.callback(self.lanes.close, abort=True)
            self.mappings = MappingStream(stub, session_id, link)
            opened.callback(self.mappings.close, abort=True)
            self.devices: list[DeviceStream] = []
            for device in devices:
                loads_ahead = device.has_precopy and bool(peers.get(device.name, 0) & MigrationFlags.PRE_COPY)
                stream = DeviceStream(
                    open_channel,
                    session_id,
                    link,
                    device,
                    machine.another(),
                    limiter,
                    loads_ahead=loads_ahead,
                    marks_last=versions.LAST_RECORD in features,
                )
                opened.callback(stream.close, abort=True)
                self.devices.append(stream)
            opened.pop_all()

    @property
    def sent(self) -> LaneStats:
        """What has gone over the lanes so far."""
        return self.lanes.sent

    @property
    def compression(self) -> str:
        """How pages are compressed at present."""
        return self._packer.compression

    def end_precopy(self) -> None:
        """Stop reading devices in PRE_COPY; raise what went wrong there."""
        for stream in self.devices:
            stream.leave_precopy()
        for stream in self.devices:
            stream.end_precopy()

    def tell(self, progress: host_pb2.Progress) -> None:
        """Fill in what was sent so far."""
        del progress.devices[:]
        progress.devices.extend(stream.progress() for stream in self.devices)
        progress.compression = self.compression
        self.sent.tell(progress)

    def finish_request(self, session_id: str, rest: Rest, *, paused: bool) -> migration_pb2.FinishRequest:
        """Return what is left of the machine, and how far each stream must have come."""
        last_record = {stream.device.name: stream.sequence for stream in self.devices}
        return migration_pb2.FinishRequest(
            session_id=session_id,
            vcpu_json=json.dumps(rest.vcpu),
            devices=[
                migration_pb2.DeviceConfig(
                    name=device.name,
                    record_sequence=last_record[device.name],
                    config_space=device.config_space,
                    pending_vectors=device.pending.vectors,
                    pending_doorbells=device.pending.doorbells,
                )
                for device in rest.devices
            ],
            paused=paused,
            lane_sequences=self.lanes.sequences,
            mapping_sequence=self.mappings.sequence,
        )

    def interrupt(self, failure: Exception) -> None:
        """Let whoever sends or waits for the destination fail."""
        for stream in self._all():
            stream.interrupt(failure)

    def stop_reading(self) -> None:
        """Read nothing more from devices, whether or not they answer."""
        for stream in self.devices:
            stream.stop_reading()

    def close(self, *, abort: bool) -> None:
        """End the streams: in good order, or at once."""
        if abort:
            self._link.interrupt(ConnectionError("the migration has ended"))
        for stream in self._all():
            stream.close(abort=abort)
        self._packer.close()

    def _all(self) -> tuple[DeviceStream | MappingStream | PageLanes, ...]:
        return (*self.devices, self.mappings, self.lanes)
