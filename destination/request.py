"""What a source asks for, in this host's terms, checked before anything is done about it.

A message may have 64 MiB, and a list in it many times more entries than anything here can have: what is long is refused
before anything is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import grpc
from switchover.v1 import migration_pb2

from common.host.host import Host
from common.machine.attachments import with_attachments
from common.machine.client import Changes, DeviceConfig, MappingChange
from common.machine.config import MachineSpec, from_json
from common.machine.device import Pending
from common.machine.fields import ConfigError
from common.memory.layout import PAGE_SIZE
from common.rpc.errors import RefusalError
from destination.refusal import bad

__all__ = ["MAX_CHANGES", "changes", "check_memory", "describe", "find_devices", "rest"]

MAX_CHANGES = 1 << 16
"""Mappings that one batch may remove, and add."""

MAX_VCPU_JSON = 1 << 20
MAX_PENDING = 2048  # vectors: an MSI-X table has no more
CONFIG_SIZES = range(64, 4096 + 1)  # from a header alone to that of PCI Express


def describe(request: migration_pb2.PrepareRequest) -> MachineSpec:
    """Return the machine that a request describes; refuse a description or runs of data that cannot be."""
    try:
        spec = from_json(request.machine_json)
    except ConfigError as error:
        raise bad(str(error)) from error
    if spec.uuid != request.machine_uuid:
        raise bad("machine description and request name different machines")
    pages = spec.ram_size // PAGE_SIZE
    end = 0
    if len(request.data_first) != len(request.data_pages):
        raise bad("runs of data: as many first pages as lengths are needed")
    for first, count in zip(request.data_first, request.data_pages, strict=True):
        if not (end <= first < pages and 0 < count <= pages - first):
            raise bad(f"runs of data: {count} pages from {first} are not in order or not in RAM")
        end = first + count
    return spec


def find_devices(spec: MachineSpec, host: Host) -> MachineSpec:
    """Return the description with this host's devices; refuse if it does not have them all."""
    emulated = {device.kind for device in spec.devices if device.attachment is None}
    try:
        if missing := emulated - host.device_kinds:
            raise LookupError(f"this host has no device of kind {', '.join(sorted(missing))}")
        return with_attachments(spec, host.attachments)
    except LookupError as error:
        raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "NO_SUCH_DEVICE", str(error)) from error
    except ValueError as error:
        raise bad(f"machine description: {error}") from error


def check_memory(needed: int) -> None:
    """Refuse a machine that holds more bytes than this host has memory free."""
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if needed > available:
        raise RefusalError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "NOT_ENOUGH_MEMORY",
            f"the machine holds {needed >> 20} MiB in RAM, this host has {available >> 20} MiB free",
        )


def changes(batch: migration_pb2.SendMappingsRequest) -> Changes:
    """Return a batch of mapping changes in the machine's terms."""
    if len(batch.removed) > MAX_CHANGES or len(batch.added) > MAX_CHANGES:
        raise bad(f"{len(batch.removed)} + {len(batch.added)} mappings in one batch, at most {MAX_CHANGES} of a kind")
    return Changes(
        tuple(MappingChange(item.container, item.iova, item.size) for item in batch.removed),
        tuple(
            MappingChange(
                item.range.container, item.range.iova, item.range.size, item.gpa, item.readable, item.writable
            )
            for item in batch.added
        ),
    )


def rest(
    request: migration_pb2.FinishRequest, devices: Collection[str], lanes: int
) -> tuple[dict[str, Any], list[DeviceConfig]]:
    """Return the vCPU's state and what a VMM keeps for each of `devices`; refuse what is not of a machine like this.

    What the vCPU's state means is the vCPU's to check; that it says how often it has run is checked here.
    """
    if len(request.lane_sequences) != lanes:
        raise bad(f"not all page batches have arrived: {len(request.lane_sequences)} lanes, {lanes} were announced")
    if len(request.devices) != len(devices) or {device.name for device in request.devices} != set(devices):
        raise bad("the devices are not those that were prepared")
    if len(request.vcpu_json) > MAX_VCPU_JSON:
        raise bad(f"vCPU state: {len(request.vcpu_json)} characters, at most {MAX_VCPU_JSON} are possible")
    try:
        vcpu = json.loads(request.vcpu_json)
    except (ValueError, RecursionError) as error:
        raise bad(f"vCPU state: {error}") from error
    if not isinstance(vcpu, dict) or type(vcpu.get("runs")) is not int:
        raise bad("vCPU state: it does not say how often the vCPU has run")
    return vcpu, [_config(device) for device in request.devices]


def _config(device: migration_pb2.DeviceConfig) -> DeviceConfig:
    if len(device.config_space) not in CONFIG_SIZES:
        raise bad(f"{device.name}: a configuration space of {len(device.config_space)} bytes")
    if len(device.pending_vectors) > MAX_PENDING or len(device.pending_doorbells) > MAX_PENDING:
        raise bad(f"{device.name}: more than {MAX_PENDING} pending interrupts or doorbells")
    pending = Pending(tuple(device.pending_vectors), tuple(device.pending_doorbells))
    return DeviceConfig(device.name, device.config_space, pending)
