"""A machine: guest RAM, vCPUs, devices, vIOMMU and containers, and what can be done with them as a whole.

Order is what this module is about. Devices stop in two steps, all out of peer-to-peer DMA before any stops, and start
in the reverse (contract M3); vCPUs stop before the first and start after the last of them. What devices are asked
between two steps of their engines is asked in the machine's turn (`common.iommu.turn`).
"""

from __future__ import annotations

import errno
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import structlog

from common import hooks
from common.iommu.container import Container
from common.iommu.iova_tree import BarTarget
from common.iommu.ranges import Strategy
from common.iommu.tracking import DeviceTraits
from common.iommu.turn import Turn
from common.iommu.viommu import Viommu
from common.ipc.channel import ClosedError
from common.machine import device_process
from common.machine.blockers import blockers
from common.machine.board import AREA_SIZE, FIRST_AREA, Board, image_start, regions
from common.machine.config import MachineSpec
from common.machine.device import AttachedDevice, Digest, Pending, ResetFailedError, ResetInsteadError
from common.machine.state_changes import StateChanges
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
        self.failure = ""
        # Held by whoever pauses, resumes, or ends a migration. The vCPUs answer a pause when their traps are answered,
        # so a trap must never wait for it; it takes only `states`.
        self.lock = threading.RLock()
        # Held by whoever changes the states of devices while vCPUs may run, for which nobody waits who has it.
        self.states = threading.RLock()
        self.precopy = False  # devices that can are to be in PRE_COPY while the machine runs
        self.switching = False  # a migration has it: nobody else pauses or resumes it
        self.turn = Turn()
        self.pending: dict[str, Pending] = {}
        self._closing = False
        self.ram = GuestRam.create(spec.ram_size)
        with ExitStack() as undo:
            self._build(directory, undo, incoming=incoming)
            undo.pop_all()

    def _build(self, directory: Path, undo: ExitStack, *, incoming: bool) -> None:
        """Start all processes; what `undo` does is for when that fails."""
        spec = self.spec
        started = []
        for described in spec.devices:
            started.append(device_process.start(described, directory, trace=spec.trace))
            undo.callback(started[-1].close)
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
            clients = list(pool.map(device_process.connect, started))
        self.devices = {
            device.name: AttachedDevice(device, client, process)
            for device, client, process in zip(spec.devices, clients, started, strict=True)
        }
        self.board = Board(self.ram.layout, [(device.name, device.bar_sizes) for device in self.devices.values()])
        self.state_changes = StateChanges()
        for device in self.devices.values():
            device.on_state = self.state_changes.note
        self.viommu = Viommu(spec.viommu.address_width) if spec.viommu.enabled else None
        self.containers = {
            name: self._container(name) for name in dict.fromkeys(device.container for device in spec.devices)
        }
        self._boot(fresh=not incoming)
        self._watch("vCPUs", lambda: f"its process has ended with exit code {self.vcpus.process.wait()}")
        for its in started:
            if its.process is not None:
                self._watch(its.name, partial(its.ended, None))
        for device in self.devices.values():
            if device.spec.attachment is not None:
                self._watch_connection(device)

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
                    report_ranges=device.reports_ranges,
                    log_outlives_mapping=device.reports_ranges,
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
                    if bar.size % PAGE_SIZE == 0:
                        container.map(bar.gpa, bar.size, bar.gpa)

    def _watch(self, name: str, ended: Callable[[], str | None]) -> None:
        def wait() -> None:
            how = ended()
            if not self._closing:
                self.fail(f"{name}: {how}")

        threading.Thread(target=wait, name=f"watch {name}", daemon=True).start()

    def _watch_connection(self, device: AttachedDevice) -> None:
        """Notice when somebody else's device goes, whose process may live on."""

        def gone() -> None:
            if not self._closing:
                self.fail(f"{device.name} has closed its connection")

        device.client.on_close = gone
        if device.client.closed.is_set():
            gone()

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
        """Stop vCPUs and devices; a machine that is paused stays so, and one that cannot be paused runs on.

        In pre-copy this ends the devices' saving sessions. OSError EBUSY if a migration is in its switchover.
        """
        with self.lock:
            self._refuse_if_switching()
            if self.state == "running":
                self.vcpus.pause()
                try:
                    with self.states:
                        self.quiesce()
                        self.enter_all(DeviceState.STOP, recover=DeviceState.RUNNING)
                except OSError:
                    self.start(despite_resets=True)
                    raise
                self.state = "paused"

    def _refuse_if_switching(self) -> None:
        if (self.switching or self.state == "handing over") and hooks.guarded("resume-generation"):
            raise OSError(errno.EBUSY, "the machine is in the switchover of a migration")

    def resume(self) -> None:
        """Let devices and vCPUs run; a machine that runs goes on.

        In pre-copy new saving sessions begin. OSError: EINVAL if it has failed or moved, EBUSY as `pause`.
        """
        with self.lock:
            self._refuse_if_switching()
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
        _log.debug("vfio_vmstate_change_prepare", running=False)
        for device in self.devices.values():
            if device.migration_flags & MigrationFlags.P2P:
                saving = device.state in (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P)
                if saving or device.state in (DeviceState.RUNNING, DeviceState.RUNNING_P2P):
                    target = DeviceState.PRE_COPY_P2P if saving else DeviceState.RUNNING_P2P
                    self.enter(device, target, recover=DeviceState.RUNNING)

    def enter_all(self, state: DeviceState, recover: DeviceState = DeviceState.ERROR) -> None:
        """Take every device to a state."""
        for device in self.devices.values():
            self.enter(device, state, recover)

    def enter(
        self,
        device: AttachedDevice,
        state: DeviceState,
        recover: DeviceState = DeviceState.ERROR,
        *,
        only_from: DeviceState | None = None,
    ) -> None:
        """Take a device to a state, in the machine's turn; the machine has failed if the device cannot be reset."""
        try:
            with self.turn:
                device.enter(state, recover, only_from=only_from)
        except ResetFailedError as error:
            self.fail(f"a device could not be reset: {error.strerror}")
            raise

    def start(self, *, despite_resets: bool = False) -> None:
        """Start devices and vCPUs; signal once what was pending when they stopped.

        A device that fails to go on is told once more, and reset if that fails too. `despite_resets`: the machine goes
        on with a device that was reset, for it has no other place to be; else ResetInsteadError.
        """
        with self.states:
            for state in (DeviceState.RUNNING_P2P, DeviceState.RUNNING):
                prepares = state is DeviceState.RUNNING_P2P
                _log.debug("vfio_vmstate_change_prepare" if prepares else "vfio_vmstate_change", running=True)
                for device in self.devices.values():
                    if state is DeviceState.RUNNING or device.migration_flags & MigrationFlags.P2P:
                        self._go_on(device, state, despite_resets=despite_resets)
            for device in self.devices.values():
                self._begin_again(device)
        self.vcpus.run()
        for name, its in self.pending.items():
            self.devices[name].signal(its)
        self.pending = {}

    def _go_on(self, device: AttachedDevice, state: DeviceState, *, despite_resets: bool) -> None:
        try:
            self.enter(device, state, recover=state)
        except ResetFailedError:
            raise
        except ResetInsteadError as error:
            if not despite_resets:
                raise
            _log.error("device lost its state", device=device.name, cause=error.strerror)
        except OSError as error:
            _log.warning("device went on at the second attempt", device=device.name, cause=error.strerror)

    def enter_precopy(self, device: AttachedDevice) -> None:
        """Take a device that runs to PRE_COPY, if it can and a migration wants it there; recover RUNNING."""
        running = device.state in (DeviceState.RUNNING, DeviceState.RUNNING_P2P)
        if self.precopy and running and device.migration_flags & MigrationFlags.PRE_COPY:
            self.enter(device, DeviceState.PRE_COPY, recover=DeviceState.RUNNING)

    def _begin_again(self, device: AttachedDevice) -> None:
        """Begin a new saving session after one has ended; a failure is the migration's, which reads it."""
        try:
            self.enter_precopy(device)
        except ResetFailedError:
            raise
        except OSError as error:
            device.failure = error

    def reset_device(self, name: str) -> None:
        """Reset a device as its guest asks: its saving session begins again, and what its log had is dirty.

        Called in a trap, so it waits for nobody who waits for the vCPUs.
        """
        device = self.devices[name]
        try:
            with self.states:
                self.containers[device.spec.container].reset(device.reset)
                self._begin_again(device)
        except ResetFailedError as error:
            cause = f"a device could not be reset: {error.strerror}"
            threading.Thread(target=self.fail, args=(cause,), daemon=True).start()
            raise

    # Looking at it.

    def digests(self, most: int | None) -> dict[str, Digest]:
        """Read all devices, which are in STOP, side by side (see `AttachedDevice.digest`)."""
        with ThreadPoolExecutor(max(len(self.devices), 1)) as pool:
            read = pool.map(lambda device: device.digest(most), self.devices.values())
            return dict(zip(self.devices, read, strict=True))

    def blockers(self) -> list[str]:
        """Return what would prevent a migration now."""
        return blockers(
            [(device.spec, device.migration_flags) for device in self.devices.values()],
            {name: (container.method.kind, container.method.reason) for name, container in self.containers.items()},
            self.failure,
        )

    def describe(self) -> dict[str, Any]:
        """Return switchover.v1.Machine as JSON."""
        try:
            programs = self.vcpus.report()["programs"]
        except ClosedError:
            programs = []  # its process has ended, and the machine has failed, or is about to
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
                    "notes": device.notes,
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
