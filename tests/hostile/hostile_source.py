"""A source that speaks MigrationService and can say anything at any time."""

from __future__ import annotations

import itertools
import json
import queue
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
from switchover.v1 import migration_pb2 as pb
from switchover.v1 import migration_pb2_grpc

from common.machine.config import MachineSpec, ViommuSpec, to_json
from common.machine.device_config import DeviceSpec
from common.memory.pages import PageBatch
from common.rpc.channel import open_channel
from common.rpc.errors import PeerError, peer_error
from common.rpc.page_batch import serialize

VCPU = {"clock_offset_ns": 0, "runs": 1, "run_ns": 0, "pending": [], "steps": {}}
SEND_PAGES = "/switchover.v1.MigrationService/SendPages"
PATIENCE = 60.0


def machine(*devices: str) -> MachineSpec:
    """Return a small machine without programs, with a UUID of its own."""
    specs = tuple(DeviceSpec(f"{kind}0", kind) for kind in devices)
    return MachineSpec("cheat", str(uuid.uuid4()), 64 << 20, (), 0.4, ViommuSpec(), specs, ())


def page(number: int, sequence: int = 1, content: bytes = b"\x07") -> bytes:
    """Return a batch of one page."""
    batch = PageBatch(
        sequence, 0, 1, np.array([number], "u8"), np.array([1], "u8"), b"\0", [content * (4096 // len(content))]
    )
    return serialize(batch)


class HostileSource:
    """One attempt to move a machine that does not exist."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = open_channel(address)
        self.stub = migration_pb2_grpc.MigrationServiceStub(self.channel)
        self.spec = machine()
        self.session = uuid.uuid4().hex

    def close(self) -> None:
        self.channel.close()

    def prepare_request(self, **changes: Any) -> pb.PrepareRequest:
        members: dict[str, Any] = {
            "session_id": self.session,
            "protocol_version": 1,
            "machine_uuid": self.spec.uuid,
            "incarnation": 1,
            "machine_json": to_json(self.spec),
            "lanes": 1,
            "verify": pb.VERIFY_MODE_OFF,
        }
        return pb.PrepareRequest(**members | changes)

    def prepare(self, *devices: str, **changes: Any) -> None:
        """Prepare a good session."""
        self.spec = replace(machine(*devices), uuid=self.spec.uuid)
        self.stub.Prepare(self.prepare_request(**changes), timeout=PATIENCE)

    def pages(self, messages: Iterable[bytes], lane: int | str = 0) -> Iterator[pb.SendPagesResponse]:
        call = self.channel.stream_stream(
            SEND_PAGES,
            request_serializer=lambda message: message,
            response_deserializer=pb.SendPagesResponse.FromString,
        )
        metadata = (("session-id", self.session), ("lane", str(lane)))
        return call(iter(messages), metadata=metadata, timeout=PATIENCE)  # type: ignore[return-value]

    def mappings(self, messages: Iterable[pb.SendMappingsRequest]) -> Iterator[pb.SendMappingsResponse]:
        return self.stub.SendMappings(iter(messages), metadata=(("session-id", self.session),), timeout=PATIENCE)

    def records(self, name: str, messages: Iterable[pb.SendDeviceStateRequest]) -> Iterator[pb.SendDeviceStateResponse]:
        metadata = (("session-id", self.session), ("device", name))
        return self.stub.SendDeviceState(iter(messages), metadata=metadata, timeout=PATIENCE)

    def finish(self, **changes: Any) -> None:
        members = {"session_id": self.session, "vcpu_json": json.dumps(VCPU), "lane_sequences": [0]}
        self.stub.Finish(pb.FinishRequest(**members | changes), timeout=PATIENCE)

    def commit(self, incarnation: int = 1) -> pb.CommitResponse:
        return self.stub.Commit(pb.CommitRequest(session_id=self.session, incarnation=incarnation), timeout=PATIENCE)

    def abort(self) -> None:
        self.stub.Abort(pb.AbortRequest(session_id=self.session, reason="it was a cheat"), timeout=PATIENCE)


def for_ever(*first: Any) -> Iterator[Any]:
    """Yield what is given, and then nothing, without an end."""
    yield from first
    yield queue.Queue().get(timeout=PATIENCE)


def refused(ask: Callable[[], Any]) -> str:
    """Return the reason for which a call, or a stream, is refused; fail if it is not."""
    try:
        answer = ask()
        if hasattr(answer, "__next__"):
            for _ in itertools.islice(answer, 100_000):
                pass
    except grpc.RpcError as error:
        failure: PeerError = peer_error(error)
        assert str(failure).isprintable() and len(str(failure)) <= 600
        return failure.reason
    raise AssertionError("this was not refused")
