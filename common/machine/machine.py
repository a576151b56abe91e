"""A machine: guest RAM, vCPUs, devices, vIOMMU and containers, and what can be done with them as a whole.

Order is what this module is about. Devices stop in two steps, all out of peer-to-peer DMA before any stops, and start
in the reverse (contract M3); vCPUs stop before the first and start after the last of them. What devices are asked
between two steps of their engines is asked in the machine's turn (`common.iommu.turn`).
"""

from __future__ import annotations

import errno
import subprocess
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import structlog

from common.iommu.container import Container
from common.iommu.iova_tree import BarTarget
from common.iommu.ranges import Strategy
from common.iommu.tracking import DeviceTraits
from common.iommu.turn import Turn
from common.iommu.viommu import Viommu
from common.machine.blockers import blockers
from common.machine.board import AREA_SIZE, FIRST_AREA, Board, image_start, regions
from common.machine.config import MachineSpec
from common.machine.device import AttachedDevice, Pending, connect_device, start_device
from common.machine.traps import traps
from common.machine.vcpus import Vcpus
from common.memory.image import fill
from common.memory.layout import PAGE_SIZE
from common.memory.ram import GuestRam
from common.vfio.migration import DeviceState, MigrationFlags

__all__ = ["Machine"]

_log = structlog.get_logger()


class Machine:
    """All of a machine. `state` is "running", "paused", "incoming", "handing over", "moved" or "failed"."""

    def __init__(self, spec: MachineSpec, directory: Path, *, incoming: bool) -> None:
        """Build it, standing still: empty if `incoming`, else with its image in RAM."""
        self.spec = spec
        self.state = "incoming" if incoming else "paused"
        self.arrives = incoming  # until it was committed to this host
        self.failure = ""
        self.lock = threading.RLock()
        self.turn = Turn()
        self.pending: dict[str, Pending] = {}
        self._closing = False
        self.ram = GuestRam.create(spec.ram_size)
        started = [(device, *start_device(device, directory, trace=spec.trace)) for device in spec.devices]
        self.vcpus = Vcpus(self.ram, directory, traps(self))
        if not incoming and spec.images:
            start_page = self.ram.layout.offset_of(image_start(len(spec.programs)), PAGE_SIZE) // PAGE_SIZE
            fill(
                self.ram,
                spec.images,
                start_page=start_page,
                zero_fraction=spec.zero_fraction,
                seed=uuid.UUID(spec.uuid).int & 0xFFFF_FFFF,
            )
        with ThreadPoolExecutor(max(len(started), 1)) as pool:
            self.devices = {device.name: device for device in pool.map(lambda args: connect_device(*args), started)}
        self.board = Board(self.ram.layout, [(device.name, device.bar_sizes) for device in self.devices.values()])
        self.viommu = Viommu(spec.viommu.address_width) if spec.viommu.enabled else None
        self.containers = {
            name: self._container(name) for name in dict.fromkeys(device.container for device in spec.devices)
        }
        self._boot(fresh=not incoming)
        self._watch("vCPUs", self.vcpus.process)
        for device in self.devices.values():
            if device.process is not None:
                self._watch(device.name, device.process)

    def _container(self, name: str) -> Container:
        members = [device for device in self.devices.values() if device.spec.container == name]
        container = Container(
            name,
            self.ram,
            [device.client for device in members],
            [
                DeviceTraits(
                    device.name,
                    dma_logging=device.client.dma_logging and device.spec.device_dirty_tracking,
                    iommu_dirty=device.has_iommu_dirty and device.spec.iommu_dirty_tracking,
                    report_ranges=device.client.extension is not None and device.client.extension.report_ranges,
                )
                for device in members
            ],
            viommu=self.viommu,
            strategy=cast("Strategy", self.spec.viommu.strategy),
            bars=_PeerBars(self),
            turn=self.turn,
        )
        for device in members:
            device.client.on_dma_read = container.dma_read
            device.client.on_dma_write = container.dma_write
        return container

    def _boot(self, *, fresh: bool) -> None:
        """Describe the machine to its vCPUs; without vIOMMU a new machine's devices see RAM and BARs where they are."""
        fds: list[int] = []
        devices = []
        for device in self.devices.values():
            first = len(fds)
            fds += [*device.doorbells[:1], *device.interrupts]
            vectors = first + bool(device.doorbells)
            devices.append(
                {
                    "name": device.name,
                    "kind": device.spec.kind,
                    "container": device.spec.container,
                    "viommu": self.viommu is not None,
                    "bars": {str(index): bar.gpa for index, bar in self.board.of_device(device.name).items()},
                    "doorbell_fd": first if device.doorbells else None,
                    "vectors": list(range(vectors, len(fds))),
                }
            )
        writers = [program for program in self.spec.programs if "region" in program.knobs]
        sizes = [program.knobs["region"] for program in writers]
        placed = {
            program.name: {"region_gpa": gpa, "region_size": size}
            for program, gpa, size in zip(writers, regions(self.ram.layout, sizes), sizes, strict=True)
        }
        programs = [
            {
                **{knob: value for knob, value in program.knobs.items() if knob != "region"},
                **placed.get(program.name, {}),
                "program": program.program,
                "name": program.name,
                "area_gpa": FIRST_AREA + index * AREA_SIZE,
                "area_size": AREA_SIZE,
            }
            for index, program in enumerate(self.spec.programs)
        ]
        self.vcpus.attach({"programs": programs, "devices": devices, "fresh": fresh}, fds)
        if self.spec.trace:
            self.vcpus.start_journal()
        if self.viommu is None and fresh:
            for container in self.containers.values():
                for segment in self.ram.layout.segments:
                    container.map(segment.gpa, segment.size, segment.gpa)
                for bar in self.board.bars:
                    container.map(bar.gpa, bar.size, bar.gpa)

    def _watch(self, name: str, process: subprocess.Popen[bytes]) -> None:
        def wait() -> None:
            code = process.wait()
            if not self._closing:
                self.fail(f"the process of {name} has ended with exit code {code}")

        threading.Thread(target=wait, name=f"watch {name}", daemon=True).start()

    def fail(self, cause: str) -> None:
        """Mark the machine failed: it stands still, can be looked at, and is never started again."""
        with self.lock:
            if self.state == "failed":
                return
            _log.error("machine failed", cause=cause)
            self.failure = cause
            self.state = "failed"
        if self.vcpus.process.poll() is None:
            self.vcpus.pause()

    # Standing still and running.

    def pause(self) -> None:
        """Stop vCPUs and devices; a machine that is paused stays so."""
        with self.lock:
            if self.state == "running":
                self.vcpus.pause()
                self.quiesce()
                self.enter_all(DeviceState.STOP)
                self.state = "paused"

    def resume(self) -> None:
        """Let devices and vCPUs run; a machine that runs goes on. OSError EINVAL if it has failed or moved."""
        with self.lock:
            if self.state == "running":
                return
            if self.state not in ("paused", "failed"):
                raise OSError(errno.EINVAL, f"the machine is {self.state}")
            if self.state == "failed":
                raise OSError(errno.EINVAL, f"the machine has failed: {self.failure}")
            try:
                self.start()
            except OSError as error:
                self.fail(f"it could not be started: {error}")
                raise
            self.state = "running"

    def quiesce(self) -> None:
        """Take every device out of peer-to-peer DMA; none has stopped yet."""
        for device in self.devices.values():
            if device.migration_flags & MigrationFlags.P2P:
                saving = device.state in (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P)
                if saving or device.state in (DeviceState.RUNNING, DeviceState.RUNNING_P2P):
                    self.enter(device, DeviceState.PRE_COPY_P2P if saving else DeviceState.RUNNING_P2P)

    def enter_all(self, state: DeviceState, recover: DeviceState = DeviceState.ERROR) -> None:
        """Take every device to a state."""
        for device in self.devices.values():
            self.enter(device, state, recover)

    def enter(self, device: AttachedDevice, state: DeviceState, recover: DeviceState = DeviceState.ERROR) -> None:
        """Take a device to a state, in the machine's turn."""
        with self.turn:
            device.enter(state, recover)

    def start(self) -> None:
        """Start devices and vCPUs; signal once what was pending when they stopped."""
        for device in self.devices.values():
            if device.migration_flags & MigrationFlags.P2P:
                self.enter(device, DeviceState.RUNNING_P2P)
        self.enter_all(DeviceState.RUNNING)
        self.vcpus.run()
        for name, its in self.pending.items():
            self.devices[name].signal(its)
        self.pending = {}

    # Looking at it.

    def blockers(self) -> list[str]:
        """Return what would prevent a migration now."""
        return blockers(
            [(device.spec, device.migration_flags) for device in self.devices.values()],
            {name: (container.method.kind, container.method.reason) for name, container in self.containers.items()},
            self.failure,
        )

    def describe(self) -> dict[str, Any]:
        """Return switchover.v1.Machine as JSON."""
        programs = self.vcpus.report()["programs"] if self.vcpus.process.poll() is None else []
        return {
            "name": self.spec.name,
            "uuid": self.spec.uuid,
            "state": self.state,
            "failure": self.failure,
            "ram_bytes": self.ram.size,
            "ram_allocated_bytes": self.ram.allocated_bytes,
            "devices": [
                {
                    "name": device.name,
                    "kind": device.spec.kind,
                    "state": device.state.name,
                    "migration": [flag.name for flag in device.migration_flags],
                    "dma_logging": device.client.dma_logging,
                    "container": device.spec.container,
                }
                for device in self.devices.values()
            ],
            "containers": [
                {
                    "name": name,
                    "tracking": container.method.kind,
                    "reason": container.method.reason,
                    "mappings": container.mapping_count,
                }
                for name, container in self.containers.items()
            ],
            "blockers": self.blockers(),
            "programs": programs,
        }

    def close(self) -> None:
        """End everything that belongs to the machine."""
        self._closing = True
        self.vcpus.close()
        for device in self.devices.values():
            device.close()
        self.ram.close()


class _PeerBars:
    """BARs as targets of other devices' DMA (`common.iommu.device.PeerBars`)."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def find(self, gpa: int, size: int) -> BarTarget | None:
        bar = self._machine.board.find(gpa, size)
        return None if bar is None else BarTarget(bar.device, bar.index, gpa - bar.gpa)

    def region_read(self, device: str, bar: int, offset: int, size: int) -> bytes:
        return self._machine.devices[device].client.region_read(bar, offset, size)

    def region_write(self, device: str, bar: int, offset: int, data: memoryview) -> None:
        self._machine.devices[device].client.region_write(bar, offset, data)
