"""How a daemon drives its machine process: typed calls over the machine's unix socket.

A migration belongs to the connection that said `begin`: if that closes before a COMMIT was recorded, the machine ends
the migration by itself and runs on. Bulk reads and writes of device data use connections of their own (`another`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from switchover.v1 import host_pb2

from common.ipc.channel import Buffer, Client, ClosedError, RequestError
from common.machine import REQUESTS, SOCKET
from common.machine.config import MachineSpec, from_json
from common.machine.device import Digest, Pending, Saved
from common.machine.record import Ownership
from common.memory.packed import PackedBitmap, union
from common.memory.ram import GuestRam
from common.vfio.migration import MigrationFlags

__all__ = [
    "Changes",
    "DeviceConfig",
    "DeviceInfo",
    "DeviceSizes",
    "MachineClient",
    "MappingChange",
    "Rest",
    "SyncReport",
    "Tracking",
]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a migration must know of a device. `migration_flags` is 0 for one that cannot migrate.

    `notes`: what is not known of it, in sentences. `bar_sizes`: of BARs 0 to 5 in bytes, 0 where there is none.
    """

    name: str
    kind: str
    migration_flags: int
    state: str
    comparable_dump: bool
    notes: Sequence[str] = ()
    bar_sizes: Sequence[int] = (0,) * 6

    @property
    def has_precopy(self) -> bool:
        """Whether its state can be read while it runs."""
        return bool(self.migration_flags & MigrationFlags.PRE_COPY)


@dataclass(frozen=True, slots=True)
class DeviceSizes:
    """VFIO_MIG_GET_PRECOPY_INFO and MIG_DATA_SIZE, in bytes; None where the device cannot say.

    `session` is the saving session that they are of, 0: there is none. `length_failed`: the device can say the last of
    them, and has failed to.
    """

    session: int
    initial_bytes: int | None
    dirty_bytes: int | None
    stop_copy_length: int | None
    length_failed: bool


@dataclass(frozen=True, slots=True)
class Tracking:
    """How DMA into a container is tracked: "device", "iommu" or "perpetual", and why."""

    container: str
    method: str
    reason: str


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One collection of all dirty logs: who reported what, as bitmaps of RAM pages."""

    pages: int
    sources: dict[str, PackedBitmap]

    def union(self) -> PackedBitmap:
        """Return what anyone reported."""
        return union(self.sources.values(), self.pages)


@dataclass(frozen=True, slots=True)
class MappingChange:
    """A mapping of a container; for a removal only `container`, `iova` and `size` count."""

    container: str
    iova: int
    size: int
    gpa: int = 0
    readable: bool = False
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened to the mappings since they were last asked for: removals come first."""

    removed: tuple[MappingChange, ...]
    added: tuple[MappingChange, ...]

    def __bool__(self) -> bool:
        return bool(self.removed or self.added)


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What a VMM keeps for a device."""

    name: str
    config_space: bytes
    pending: Pending


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left of a stopped machine beside RAM, device data and mappings."""

    vcpu: dict[str, Any]
    devices: tuple[DeviceConfig, ...]


class MachineClient:
    """A connection to a machine process. Failures of the machine are `RequestError`, its end is `ClosedError`."""

    def __init__(self, directory: Path, client: Client) -> None:
        self.directory = directory
        self._client = client

    @classmethod
    def connect(cls, directory: Path) -> MachineClient:
        """Connect to the machine process that lives in `directory`; raise OSError if none does."""
        return cls(directory, Client.connect(directory / SOCKET))

    def another(self) -> MachineClient:
        """Open another connection to the same machine; raise `ClosedError` if it has ended."""
        try:
            return MachineClient.connect(self.directory)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise ClosedError("the machine process has ended") from error

    def has_ended(self) -> bool:
        """Return whether there is no machine process any more; that a connection has closed does not tell."""
        try:
            self.another().close()
        except OSError:
            return True
        return False

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    # The machine as a whole.

    def describe(self) -> host_pb2.Machine:
        """Return what an operator sees of it."""
        return json_format.ParseDict(self._client.call("describe").header, host_pb2.Machine())

    def blockers(self) -> list[str]:
        """Return what would prevent a migration now."""
        found: list[str] = self._client.call("blockers")["blockers"]
        return found

    def spec(self) -> MachineSpec:
        """Return its description."""
        return from_json(self._client.call("spec")["json"])

    def ram(self, *, writable: bool) -> GuestRam:
        """Map its RAM."""
        return GuestRam.attach(self._client.call("ram").fds[0], writable=writable)

    def devices(self) -> list[DeviceInfo]:
        """Return its devices."""
        return [DeviceInfo(**members) for members in self._client.call("devices")["devices"]]

    def pause(self) -> None:
        """Stop vCPUs and devices."""
        self._client.call("pause")

    def resume(self) -> None:
        """Let them run; a machine that runs goes on."""
        self._client.call("resume")

    def record(
        self,
        ownership: Ownership,
        *,
        session_id: str = "",
        peer: str = "",
        incarnation: int = 0,
        judged: bool = True,
    ) -> None:
        """Make a decision about its owner durable (see `common.machine.record`); `incarnation` 0 keeps it."""
        self._client.call(
            "record",
            ownership=ownership.value,
            session_id=session_id,
            peer=peer,
            incarnation=incarnation,
            judged=judged,
        )

    def guest_gap_us(self, run: int) -> int | None:
        """Return the gap that the guest's clock saw before its run number `run`; None if it has seen none (yet)."""
        report = self._client.call("report").header
        gap: int | None = report["gap_us"] if report["gap_run"] == run else None
        return gap

    def state_changes(self, after: int | None) -> tuple[int, list[tuple[str, str]]]:
        """Wait some seconds for changes of devices' migration states (see `common.machine.state_changes`)."""
        reply = self._client.call("state_changes", after=after)
        return reply["last"], [(name, state) for name, state in reply["changes"]]

    def shutdown(self) -> None:
        """End the machine process and all that belongs to it; nothing happens if it has ended already."""
        with suppress(ClosedError):
            self._client.call("shutdown")
        self.close()

    # Leaving: in the order in which a migration calls them.

    def begin(self, session_id: str) -> bool:
        """Start a migration that belongs to this connection; return whether the machine runs (False: it is paused).

        RequestError MACHINE_VERSION: its process was started by another version, and knows other requests.
        """
        reply = self._client.call("begin", session_id=session_id).header
        if reply.get("requests") != REQUESTS:
            raise RequestError(
                "MACHINE_VERSION",
                "the machine was started by another version of Switchover; to be migrated it must be ended and started",
            )
        running: bool = reply["running"]
        return running

    def start_tracking(self) -> list[Tracking]:
        """Log what vCPUs and devices write from now on."""
        return [Tracking(**members) for members in self._client.call("start_tracking")["containers"]]

    def enter_precopy(self) -> None:
        """Take the devices that can to PRE_COPY."""
        self._client.call("enter_precopy")

    def running(self) -> bool:
        """Return whether the machine runs now: its operator may pause and resume it until `pause_vcpus`."""
        running: bool = self._client.call("running")["running"]
        return running

    def read_device(self, name: str, size: int) -> Saved:
        """Read migration data (see `AttachedDevice.read_saved`)."""
        reply = self._client.call("read_device", name=name, size=size)
        return Saved(reply["session"], reply.payload, reply["ended"])

    def sizes(self, name: str) -> DeviceSizes:
        """Return how much there is to read."""
        return DeviceSizes(**self._client.call("sizes", name=name).header)

    def mapping_changes(self) -> Changes:
        """Return what happened to the mappings since the last call; the first one returns all."""
        header = self._client.call("mapping_changes").header
        return Changes(
            tuple(MappingChange(*members) for members in header["removed"]),
            tuple(MappingChange(*members) for members in header["added"]),
        )

    def sync(self) -> SyncReport:
        """Collect the logs of vCPUs and devices, reading and clearing them."""
        reply = self._client.call("sync")
        view = memoryview(reply.payload)
        sources = {}
        for name, size in reply["sources"].items():
            sources[name], view = PackedBitmap.from_bytes(view[:size], reply["pages"]), view[size:]
        return SyncReport(reply["pages"], sources)

    def throttle(self, percent: int) -> None:
        """Slow the vCPUs down."""
        self._client.call("throttle", percent=percent)

    def pause_vcpus(self) -> bool:
        """Stop the vCPUs; every trap is answered by then. Return whether the machine ran; nobody changes that now."""
        running: bool = self._client.call("pause_vcpus")["running"]
        return running

    def stop_devices(self) -> Rest:
        """Take all devices out of peer-to-peer DMA, then stop all (contract M3); return what is left beside their data.

        Pending interrupts and doorbells are taken out of every eventfd.
        """
        reply = self._client.call("stop_devices")
        view = memoryview(reply.payload)
        devices = []
        offset = 0
        for members in reply["devices"]:
            config = bytes(view[offset : offset + members["config_size"]])
            offset += len(config)
            pending = Pending(tuple(members["vectors"]), tuple(members["doorbells"]))
            devices.append(DeviceConfig(members["name"], config, pending))
        return Rest(reply["vcpu"], tuple(devices))

    def leave_stop_copy(self, name: str) -> None:
        """End a device's saving session: it is in STOP."""
        self._client.call("leave_stop_copy", name=name)

    def digests(self, most: int | None = None) -> dict[str, Digest]:
        """Hash what can be read of the stopped devices, of each at most `most` bytes."""
        devices = self._client.call("digests", most=most)["devices"]
        return {name: Digest(**{**its, "bars": tuple(its["bars"])}) for name, its in devices.items()}

    def explain(self, page: int) -> list[str]:
        """Return who could have written a page of RAM by DMA, and when."""
        writers: list[str] = self._client.call("explain", page=page)["writers"]
        return writers

    def late_writes(self, first: int, pages: int) -> list[str]:
        """Return who wrote to RAM pages after the machine was stopped, as far as journals are kept."""
        writes: list[str] = self._client.call("late_writes", first=first, pages=pages)["writes"]
        return writes

    def end(self) -> None:
        """End the migration here: logging off, devices and vCPUs running again if they ran when it began."""
        self._client.call("end")

    # Arriving.

    def enter_resuming(self) -> None:
        """Take all devices to RESUMING."""
        self._client.call("enter_resuming")

    def change_mappings(self, changes: Changes) -> None:
        """Change the mappings in vIOMMU and devices."""
        self._client.call(
            "change_mappings",
            removed=[list(asdict(change).values()) for change in changes.removed],
            added=[list(asdict(change).values()) for change in changes.added],
        )

    def write_device(self, name: str, data: Buffer) -> None:
        """Give a device migration data."""
        self._client.call("write_device", data, name=name)

    def restart_device(self, name: str) -> None:
        """Take a device to RESUMING afresh: what was written to it is void."""
        self._client.call("restart_device", name=name)

    def load(self, vcpu: Mapping[str, Any], devices: Sequence[DeviceConfig], *, paused: bool) -> None:
        """Take all devices out of RESUMING, which validates their state; restore config and vCPU state.

        `paused`: the machine will not run before its user resumes it.
        """
        self._client.call(
            "load",
            b"".join(device.config_space for device in devices),
            vcpu=vcpu,
            paused=paused,
            devices=[
                {
                    "name": device.name,
                    "config_size": len(device.config_space),
                    "vectors": device.pending.vectors,
                    "doorbells": device.pending.doorbells,
                }
                for device in devices
            ],
        )

    def take_over(self) -> None:
        """Start a machine that has arrived, unless it was paused where it came from; again: no effect."""
        self._client.call("take_over")
