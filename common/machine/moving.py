"""What a machine does while it moves: at its source and at its destination.

Only mechanisms: what is read, sent and decided when is the daemons' business. One object for each migration, made when
a daemon begins one and undone by `end`, on demand or because the daemon has gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.iommu.container import Container
from common.machine.device import Pending
from common.machine.machine import Machine
from common.memory.bitmap import DirtyBitmap, Words
from common.vfio.feature import PrecopyInfo
from common.vfio.migration import DeviceState, MigrationFlags

__all__ = ["VCPU", "Arriving", "Leaving"]

VCPU = "vCPU"  # beside names of containers, which have no capitals
PRECOPY_STATES = (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P)


class Leaving:
    """A machine on its way out, until it is gone or the attempt has ended."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.running = machine.state == "running"
        self._dirty: dict[str, DirtyBitmap] = {}
        self._stopped = False
        for container in machine.containers.values():
            container.begin_delta()

    def start_tracking(self) -> list[tuple[Container, str, str]]:
        """Start all logs; return for each container how it is tracked, and why. OSError: nothing is left started."""
        for container in self._machine.containers.values():
            dirty = DirtyBitmap(self._machine.ram.layout.pages)
            container.start_tracking(dirty)
            self._dirty[container.name] = dirty
        self._machine.vcpus.start_dirty_log()
        return [
            (container, info.kind, info.reason)
            for container in self._machine.containers.values()
            if (info := container.tracking) is not None
        ]

    def enter_precopy(self) -> None:
        """Take the devices that can to PRE_COPY; a paused machine's devices stay in STOP (QEMU series patch 1)."""
        for device in self._machine.devices.values():
            if self.running and device.migration_flags & MigrationFlags.PRE_COPY:
                self._machine.enter(device, DeviceState.PRE_COPY, recover=DeviceState.RUNNING)

    def sizes(self, name: str) -> tuple[PrecopyInfo | None, int | None]:
        """Return pre-copy info (None outside PRE_COPY) and stop_copy_length of a device, as far as it tells."""
        device = self._machine.devices[name]
        info = device.client.precopy_info() if device.state in PRECOPY_STATES else None
        return info, device.client.stop_copy_length()

    def sync(self) -> dict[str, Words]:
        """Collect all logs. The vCPUs' comes without any lock of a container: a vCPU may be waiting in a map trap."""
        collected = {VCPU: self._machine.vcpus.dirty_log()}
        for container in self._machine.containers.values():
            if self._stopped or not self._is_left_to_the_end(container):
                container.sync(last=self._stopped)
            collected[container.name] = self._dirty[container.name].take()
        return collected

    def _is_left_to_the_end(self, container: Container) -> bool:
        """Whether a device's log is not asked while it runs (QEMU: x-pre-copy-dirty-page-tracking=off)."""
        return any(
            device.spec.container == container.name and not device.spec.pre_copy_dirty_tracking
            for device in self._machine.devices.values()
        )

    def pause_vcpus(self) -> None:
        """Stop the vCPUs; their traps are answered by then."""
        if self.running:
            self._machine.vcpus.pause()

    def stop_devices(self) -> None:
        """Quiesce all devices, then take all to STOP_COPY."""
        self._machine.quiesce()
        self._machine.enter_all(DeviceState.STOP_COPY, recover=DeviceState.STOP)
        self._stopped = True

    def rest(self) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Pending]]:
        """Return vCPU state, config spaces, and what was pending, which is taken out of the eventfds."""
        devices = self._machine.devices
        configs = {name: device.config_space() for name, device in devices.items()}
        pending = {name: device.drain() for name, device in devices.items()}
        self._machine.pending = pending
        return self._machine.vcpus.state_out(), configs, pending

    def could_have_written(self, page: int) -> list[str]:
        """Return who could have written a page by DMA while it was tracked, and how that was tracked."""
        writers = []
        for container in self._machine.containers.values():
            for exposure in container.could_have_written(page):
                since = "before the migration" if exposure.since is None else f"{exposure.since:.3f} s"
                until = "the end" if exposure.until is None else f"{exposure.until:.3f} s"
                writers.append(
                    f"{exposure.device} at IOVA {exposure.iova:#x} from {since} to {until}, "
                    f"tracked by method {container.method.kind}"
                )
        return writers

    def end(self) -> None:
        """Undo everything: logs off, devices and vCPUs as they were, what was drained signalled again (contract M9)."""
        machine = self._machine
        for container in machine.containers.values():
            container.end_delta()
            container.stop_tracking()
        if machine.state == "failed":
            return
        machine.vcpus.stop_dirty_log()
        machine.vcpus.throttle(0)
        if self.running:
            machine.start()
        else:
            machine.enter_all(DeviceState.STOP)


class Arriving:
    """A machine on its way in, until it is started."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._paused = False

    def enter_resuming(self) -> None:
        """Take all devices to RESUMING, before the first byte (contract M8)."""
        self._machine.enter_all(DeviceState.RESUMING)

    def change_mappings(self, removed: Sequence[Sequence[Any]], added: Sequence[Sequence[Any]]) -> None:
        """Change mappings in vIOMMU and devices."""
        for container, iova, size, *_ in removed:
            self._machine.containers[container].unmap(iova, size)
        for container, iova, size, gpa, readable, writable in added:
            self._machine.containers[container].map(iova, size, gpa, readable=readable, writable=writable)

    def load(
        self,
        vcpu: Mapping[str, Any],
        configs: Mapping[str, bytes],
        pending: Mapping[str, Pending],
        *,
        paused: bool,
    ) -> None:
        """Take all devices out of RESUMING side by side, which validates their state; restore all the rest."""
        devices = self._machine.devices
        for name, its in pending.items():
            device = devices[name]
            if max(its.vectors, default=-1) >= len(device.interrupts):
                raise OSError(22, f"{name}: has no interrupt vector {max(its.vectors)}")
            if max(its.doorbells, default=-1) >= len(device.doorbells):
                raise OSError(22, f"{name}: has no doorbell {max(its.doorbells)}")
        with ThreadPoolExecutor(max(len(devices), 1)) as pool:
            list(pool.map(lambda device: device.enter(DeviceState.STOP), devices.values()))
        for name, config in configs.items():
            devices[name].restore_config(config)
        self._machine.vcpus.state_in(vcpu)
        self._machine.pending = dict(pending)
        self._paused = paused

    def take_over(self) -> None:
        """Make it a machine of this host, and start it unless it came paused."""
        if self._machine.state == "incoming":
            self._machine.state = "paused"
            if not self._paused:
                self._machine.resume()
