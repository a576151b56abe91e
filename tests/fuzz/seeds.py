"""Make the valid inputs of which the fuzzer makes others: python tests/fuzz/seeds.py writes them to tests/data/fuzz."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import uuid
from dataclasses import asdict
from pathlib import Path

import lz4.block
import zstandard
from decoders import KINDS, KNOBS, answers_of
from google.protobuf.message import Message
from switchover.v1 import migration_pb2

from common.devices.__main__ import build
from common.devices.nvme import Nvme
from common.machine.config import from_json, to_json
from common.machine.record import Ownership, Record
from common.vfio.feature import FEATURE_GET, FEATURE_SET, DeviceFeature, LoggingReport, LoggingStart, Range
from common.vfio.migration import DeviceState
from common.vfio_user import codec
from common.vfio_user.capabilities import Capabilities, Extension, TwinSocket
from common.vfio_user.client import VfioUserClient
from common.vfio_user.codec import Command, DmaMap, DmaUnmap, Feature, Header, MigData, RegionAccess, Version
from common.vfio_user.description import DeviceInfo, IrqFlags, IrqInfo, IrqSet, RegionQuery
from common.vfio_user.server import VfioUserServer

DATA = Path(__file__).parent.parent / "data"
PAGE = 4096


def page_batches() -> dict[str, bytes]:
    page = bytes(range(256)) * 16
    raw = migration_pb2.SendPagesRequest(
        sequence=1, round=0, encoding=1, run_first=[3, 600], run_pages=[2, 1], zero=b"\x02", payload=page * 2
    )
    packed = lz4.block.compress(page * 3, store_size=False)
    lz4_ = migration_pb2.SendPagesRequest(
        sequence=2, round=1, encoding=2, run_first=[0], run_pages=[3], zero=b"\x00", payload=packed
    )
    holes = migration_pb2.SendPagesRequest(
        sequence=3, encoding=1, run_first=[0, 512], run_pages=[100, 512], zero=b"\xff" * 76 + b"\x0f"
    )
    zstd = migration_pb2.SendPagesRequest(
        sequence=2, encoding=3, run_first=[0], run_pages=[3], zero=b"\x00", payload=zstandard.compress(page * 3)
    )
    references = migration_pb2.SendPagesRequest(
        sequence=4, round=2, encoding=1, run_first=[3, 8], run_pages=[1, 3], zero=b"\x00", payload=page
    )
    references.delta, references.equal, references.unchanged = b"\x01", b"\x0e", b""
    references.equal_to.extend([3, 3, 3])
    more = migration_pb2.SendPagesRequest()
    more.CopyFrom(raw)
    more.more = True
    batches = {"raw": raw, "lz4": lz4_, "zstd": zstd, "holes": holes, "references": references, "more": more}
    return {name: batch.SerializeToString() for name, batch in batches.items()}


def feature(number: int, operation: int, payload: bytes = b"", room: int = 0) -> bytes:
    return Feature(codec.FEATURE_SIZE + max(len(payload), room), number | operation).pack() + payload


def state(target: DeviceState) -> bytes:
    return feature(DeviceFeature.MIG_DEVICE_STATE, FEATURE_SET, struct.pack("<Ii", target, -1))


def conversation() -> bytes:
    """Return what a client says that looks at a device, lets it work, logs, saves it, and loads it."""
    irqs = IrqSet(2, IrqFlags.DATA_EVENTFD | IrqFlags.ACTION_TRIGGER, 0, 1).pack()
    said = [
        (Command.VERSION, Version(0, 2, Capabilities(8, 1 << 20, 4096, Extension(), TwinSocket())).pack()),
        (Command.DEVICE_GET_INFO, DeviceInfo().pack()),
        (Command.DEVICE_GET_REGION_INFO, RegionQuery(0, 32).pack_info()),
        (Command.DEVICE_GET_REGION_IO_FDS, RegionQuery(0, 64).pack_io_fds()),
        (Command.DEVICE_GET_IRQ_INFO, IrqInfo(2).pack()),
        (Command.DEVICE_SET_IRQS, irqs),
        (Command.DMA_MAP, DmaMap(3, 0, 0x1_0000, 0x1_0000).pack()),
        (Command.REGION_WRITE, RegionAccess(4, 7, 2).pack() + b"\x06\x00"),
        (Command.REGION_WRITE, RegionAccess(0x10, 0, 4).pack() + bytes(4)),
        (Command.REGION_READ, RegionAccess(0, 0, 64).pack()),
        (Command.DEVICE_FEATURE, feature(DeviceFeature.MIGRATION, FEATURE_GET, room=8)),
        (
            Command.DEVICE_FEATURE,
            feature(
                DeviceFeature.DMA_LOGGING_START, FEATURE_SET, LoggingStart(PAGE, (Range(0x1_0000, 0x1_0000),)).pack()
            ),
        ),
        (
            Command.DEVICE_FEATURE,
            feature(
                DeviceFeature.DMA_LOGGING_REPORT, FEATURE_GET, LoggingReport(0x1_0000, 0x1_0000, PAGE).pack(), room=32
            ),
        ),
        (Command.DEVICE_FEATURE, feature(codec.PRECOPY_INFO, FEATURE_GET, room=16)),
        (Command.DEVICE_FEATURE, feature(DeviceFeature.MIG_DATA_SIZE, FEATURE_GET, room=8)),
        (Command.DMA_UNMAP, DmaUnmap(codec.UNMAP_GET_DIRTY_BITMAP, 0x1_0000, 0x1_0000, PAGE, 8).pack()),
        (Command.DEVICE_FEATURE, state(DeviceState.STOP_COPY)),
        (Command.MIG_DATA_READ, MigData(4096).pack()),
        (Command.DEVICE_FEATURE, state(DeviceState.RESUMING)),
        (Command.MIG_DATA_WRITE, MigData(64).pack() + bytes(64)),
        (Command.DEVICE_RESET, b""),
        (Command.DMA_UNMAP, DmaUnmap(codec.UNMAP_ALL, 0, 0).pack()),
    ]
    return b"".join(
        Header(number, command, codec.HEADER_SIZE + len(body)).pack() + body
        for number, (command, body) in enumerate(said, 1)
    )


def answers(kind: str) -> bytes:
    """Return what a device of ours answers to `decoders.use_client`, in the form of its inputs."""
    from decoders import use_client

    ours, in_between = socket.socketpair()
    other, theirs = socket.socketpair()
    device = build(kind, "device", KNOBS.get(kind, {}))
    threads = [threading.Thread(target=VfioUserServer(device, theirs).serve)]
    said: list[tuple[int, bytes]] = []

    def carry(source: socket.socket, target: socket.socket, keep: list[tuple[int, bytes]] | None) -> None:
        while True:
            head, fds, _, _ = socket.recv_fds(source, 16, 8)
            if not head:
                break
            size = Header.unpack(head, codec.MAX_REPLY_SIZE).size
            message = head + (source.recv(size - 16, socket.MSG_WAITALL) if size > 16 else b"")
            socket.send_fds(target, [message], fds)
            for fd in fds:
                os.close(fd)
            if keep is not None:
                keep.append((2 if fds else 0, message))
        target.shutdown(socket.SHUT_WR)

    threads.append(threading.Thread(target=carry, args=(in_between, other, None)))
    threads.append(threading.Thread(target=carry, args=(other, in_between, said)))
    for thread in threads:
        thread.start()
    client = VfioUserClient(ours, "device")
    use_client(client)
    client.close()
    for thread in threads:
        thread.join()
    for sock in (in_between, other):
        sock.close()
    packed = b"".join(struct.pack("<BI", flags, len(message)) + message for flags, message in said)
    assert answers_of(packed) == said
    return packed


def saved(kind: str) -> bytes:
    device = build(kind, "device", KNOBS.get(kind, {}))
    if isinstance(device, Nvme):
        device._generations[[1, 5, 40]] = [1, 2, 3]
    device.set_state(DeviceState.STOP_COPY)
    parts = []
    while part := bytes(device.mig_data_read(1 << 20)):
        parts.append(part)
    device.disconnected()
    return b"".join(parts)


MACHINE = """\
name = "shop"
uuid = "6f0c8f0e-7d3f-4d0f-9a51-6b7cf1b1d9aa"
trace = false
[ram]
size = "256MiB"
image = ["/usr"]
zero_fraction = 0.5
[viommu]
enabled = true
address_width = 39
strategy = "mapped"
[[device]]
kind = "nic"
rate = "50MB/s"
packet = 1500
faults = ["fail:STOP_COPY", "fail_read"]
[[device]]
kind = "accelerator"
memory = "1MiB"
container = "other"
log_page_sizes = ["4KiB", "2MiB"]
[[device]]
kind = "nvme"
blocks = 1024
pre_copy = "off"
compare_bars = [0, 4]
[[device]]
socket = "their.sock"
command = "their-device {socket}"
name = "theirs"
[[guest]]
program = "driver"
device = "nic0"
peer = "accelerator0"
[[guest]]
program = "writer"
pattern = "hotspot"
region = "16MiB"
[[guest]]
program = "clock"
period_us = 500
"""

DEVICES = """\
[[device]]
name = "theirs"
socket = "~/their.sock"
[[device]]
name = "others"
command = "other-device --listen {socket}"
"""

VCPU = {"clock_offset_ns": -5, "runs": 2, "run_ns": 1000, "pending": [], "steps": {"clock0": 7}}


def description() -> bytes:
    document = {
        "name": "m",
        "uuid": str(uuid.UUID(int=7)),
        "ram": {"size": 64 << 20, "image": ["/usr"], "zero_fraction": 0.4},
        "viommu": {"enabled": True, "address_width": 48, "strategy": "auto"},
        "device": [
            {"kind": "nic", "name": "nic0", "rate": 1000, "packet": 1500},
            {"kind": "accelerator", "memory": 65536, "churn": 1, "log_page_sizes": [4096]},
            {"kind": "vfio-user", "name": "theirs", "socket": "", "command": ""},
        ],
        "guest": [{"program": "driver", "device": "nic0"}, {"program": "writer", "region": 2 << 20}],
    }
    return to_json(from_json(json.dumps(document))).encode()


def prepare() -> Message:
    return migration_pb2.PrepareRequest(
        session_id="s1",
        protocol_version=1,
        machine_uuid=str(uuid.UUID(int=7)),
        incarnation=2,
        machine_json=description().decode(),
        data_first=[0, 100],
        data_pages=[10, 5],
        lanes=1,
        verify=1,
    )


def finish() -> Message:
    return migration_pb2.FinishRequest(
        session_id="s1",
        vcpu_json=json.dumps(VCPU),
        devices=[
            migration_pb2.DeviceConfig(
                name="nic0",
                record_sequence=3,
                config_space=saved_config(),
                pending_vectors=[0],
                pending_doorbells=[0],
            )
        ],
        lane_sequences=[4],
        mapping_sequence=1,
    )


def saved_config() -> bytes:
    device = build("nic", "nic0", {})
    config = device.region_read(7, 0, 256)
    device.disconnected()
    return bytes(config)


def requests() -> bytes:
    said = ({"method": "echo", "params": {"key": 1}}, b"payload"), ({"method": "length", "params": {}}, bytes(100))
    return b"".join(
        struct.pack("<II", len(head := json.dumps(header).encode()), len(payload)) + head + payload
        for header, payload in said
    )


def replies() -> bytes:
    said = ({"result": {"key": 1}}, b"payload"), ({"error": {"reason": "EINVAL", "message": "no"}}, b"")
    return b"".join(
        struct.pack("<II", len(head := json.dumps(header).encode()), len(payload)) + head + payload
        for header, payload in said
    )


def record() -> bytes:
    known = Record("6f0c8f0e-7d3f-4d0f-9a51-6b7cf1b1d9aa", "m", 3, Ownership.COMMITTING, "/x", "s1", "b:7700")
    return json.dumps(asdict(known)).encode()


def bodies() -> dict[str, bytes]:
    irqs = IrqSet(2, IrqFlags.DATA_BOOL | IrqFlags.ACTION_MASK, 0, 2).pack(b"\0\1")
    found = (
        Version(0, 2, Capabilities(8, 1 << 20, 4096, Extension(), TwinSocket(0))).pack(),
        DmaMap(3, 0, 0x1000, 0x1000).pack(),
        DmaUnmap(1, 0x1000, 0x1000, 4096, 8).pack(),
        DmaUnmap(1, 0x1000, 0x1000, 4096, 8).pack() + bytes(8),
        codec.DmaAccess(0, 8).pack(),
        RegionAccess(0, 7, 4).pack(),
        Feature(16, 1 | FEATURE_GET).pack(),
        MigData(8).pack() + bytes(8),
        DeviceInfo(3, 9, 5).pack(),
        bytes.fromhex("5000000007000000000000002000000000100000000000000000000000000000")
        + bytes.fromhex(
            "010001000000000002000000000000000000000000000000000400000000000000080000000000000004000000000000"
        ),
        RegionQuery(0, 64).pack_info(),
        RegionQuery(0, 64).pack_io_fds(),
        struct.pack("<IIII", 64, 0, 0, 1) + struct.pack("<QQIIII8xQ", 0, 4, 1, 0, 0, 0, 0),
        IrqInfo(2, 1, 3).pack(),
        irqs,
        LoggingReport(0, 0x1000, 4096).pack(),
        struct.pack("<QQ", 1, 2),
        Header(1, 2, 16).pack(),
        LoggingStart(4096, (Range(0, 0x1000), Range(0x2000, 0x1000))).pack(),
    )
    return {f"{index:02}": bytes([index]) + body for index, body in enumerate(found)}


def seeds() -> dict[str, dict[str, bytes]]:
    """Return the valid inputs of each decoder, by name."""
    transcripts = {
        path.stem: b"".join(path.read_bytes().splitlines(keepends=True)[:12])
        for path in sorted((DATA / "vfio_user").glob("*-attach.jsonl"))
    }
    return {
        "page_batch": page_batches(),
        "vfio_user_body": bodies(),
        "vfio_user_server": {kind: bytes([index]) + conversation() for index, kind in enumerate(KINDS)},
        "vfio_user_client": {kind: answers(kind) for kind in ("nic", "sample")},
        "device_state": {kind: bytes([index]) + saved(kind) for index, kind in enumerate(KINDS)},
        "machine_file": {"machine": MACHINE.encode()},
        "device_file": {"devices": DEVICES.encode()},
        "machine_description": {"machine": description()},
        "ownership_record": {"record": record()},
        "transcript": transcripts,
        "prepare_request": {"machine": prepare().SerializeToString()},
        "finish_request": {"nic": finish().SerializeToString()},
        "ipc_server": {"requests": requests()},
        "ipc_client": {"replies": replies()},
    }


def main() -> None:
    (DATA / "fuzz").mkdir(exist_ok=True)
    for decoder, its in seeds().items():
        directory = DATA / "fuzz" / decoder
        directory.mkdir(exist_ok=True)
        for name, data in its.items():
            (directory / f"valid-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
