"""All streams of a migration: page lanes, mappings, and one for each device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import grpc
from switchover.v1 import host_pb2, migration_pb2, migration_pb2_grpc

from common.machine.client import DeviceInfo, MachineClient, Rest
from common.memory.ram import GuestRam
from common.vfio.migration import MigrationFlags
from source.lanes import PageLane, PageLanes
from source.limiter import Limiter
from source.state_streams import DeviceStream, MappingStream

__all__ = ["Streams"]


class Streams:
    """Opened all together; any of them that fails ends the session, so they are ended all together too."""

    def __init__(
        self,
        stub: migration_pb2_grpc.MigrationServiceStub,
        open_channel: Callable[[], grpc.Channel],
        open_lane: Callable[[int], PageLane],
        session_id: str,
        request: host_pb2.MigrateRequest,
        machine: MachineClient,
        ram: GuestRam,
        devices: Sequence[DeviceInfo],
        peers: Mapping[str, int],
        limiter: Limiter,
    ) -> None:
        """`peers` are the migration flags of the destination's devices; `open_lane` opens the page lane of a number."""
        with ExitStack() as opened:
            lanes: list[PageLane] = []
            for number in range(request.lanes):
                lanes.append(open_lane(number))
                opened.callback(lanes[-1].close, abort=True)
            self.lanes = PageLanes(ram, lanes, compress=request.compress)
            self.mappings = MappingStream(stub, session_id)
            opened.callback(self.mappings.close, abort=True)
            self.devices: list[DeviceStream] = []
            for device in devices:
                loads_ahead = device.has_precopy and bool(peers.get(device.name, 0) & MigrationFlags.PRE_COPY)
                stream = DeviceStream(open_channel, session_id, device, machine.another(), limiter, loads_ahead)
                opened.callback(stream.close, abort=True)
                self.devices.append(stream)
            opened.pop_all()

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
        for stream in self._all():
            stream.close(abort=abort)

    def _all(self) -> tuple[DeviceStream | MappingStream | PageLanes, ...]:
        return (*self.devices, self.mappings, self.lanes)
