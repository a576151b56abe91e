"""What a machine does while it moves: at its source and at its destination.

Only mechanisms: what is read, sent and decided when is the daemons' business. One object for each migration, made when
a daemon begins one and undone by `end`, on demand or because the daemon has gone.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import structlog

from common.iommu.container import Container
from common.machine.device import Pending
from common.machine.fields import shown
from common.machine.machine import Machine
from common.memory.bitmap import DirtyBitmap
from common.memory.layout import PAGE_SIZE
from common.memory.packed import PackedBitmap
from common.memory.write_journal import JOURNAL_ROW, Rows
from common.vfio.migration import DeviceState

__all__ = ["VCPU", "Arriving", "Leaving"]

_log = structlog.get_logger()

VCPU = "vCPU"  # beside names of containers, which have no capitals
LATE_WRITES = 8  # that are told


class Leaving:
    """A machine on its way out, until it is gone or the attempt has ended."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._dirty: dict[str, DirtyBitmap] = {}
        self._stopped = False
        self._tracked_since_ns = 0
        self._stopped_since_ns = 0
        for container in machine.containers.values():
            container.begin_delta()

    def start_tracking(self) -> list[tuple[Container, str, str]]:
        """Start all logs; return for each container how it is tracked, and why. OSError: nothing is left started."""
        for container in self._machine.containers.values():
            dirty = DirtyBitmap(self._machine.ram.layout.pages)
            container.start_tracking(dirty)
            self._dirty[container.name] = dirty
        self._machine.vcpus.start_dirty_log()
        self._tracked_since_ns = time.monotonic_ns()
        return [
            (container, info.kind, info.reason)
            for container in self._machine.containers.values()
            if (info := container.tracking) is not None
        ]

    @property
    def running(self) -> bool:
        """Whether the machine runs, apart from the migration."""
        return self._machine.state == "running"

    def enter_precopy(self) -> None:
        """Take the devices that can to PRE_COPY; a paused machine's devices stay in STOP (QEMU series patch 1).

        From now on they are in PRE_COPY whenever the machine runs, until `stop_devices`.
        """
        machine = self._machine
        with machine.states:
            machine.precopy = True
            for device in machine.devices.values():
                _log.debug("vfio_save_setup", device=device.name, state=device.state.name)
                machine.enter_precopy(device)

    def sync(self) -> dict[str, PackedBitmap]:
        """Collect all logs. The vCPUs' comes without any lock of a container: a vCPU may be waiting in a map trap."""
        pages = self._machine.ram.layout.pages
        collected = {VCPU: self._machine.vcpus.dirty_log()}
        for container in self._machine.containers.values():
            if self._stopped or not self._is_left_to_the_end(container):
                container.sync(last=self._stopped)
            collected[container.name] = PackedBitmap.of(self._dirty[container.name].take(), pages)
        return collected

    def _is_left_to_the_end(self, container: Container) -> bool:
        """Whether a device's log is not asked while it runs (QEMU: x-pre-copy-dirty-page-tracking=off)."""
        return any(
            device.spec.container == container.name and not device.spec.pre_copy_dirty_tracking
            for device in self._machine.devices.values()
        )

    def pause_vcpus(self) -> bool:
        """Stop the vCPUs; their traps are answered by then. Return whether the machine ran.

        From now on nobody else pauses or resumes it.
        """
        with self._machine.lock:
            self._machine.switching = True
            if self.running:
                self._machine.vcpus.pause()
            return self.running

    def stop_devices(self) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Pending]]:
        """Quiesce all devices, then take all to STOP_COPY; return what is left beside RAM, devices' data and mappings.

        That is the vCPU's state, config spaces, and what was pending, which is taken out of the eventfds. Config spaces
        are read between the two steps: nobody writes there any more, and in STOP_COPY libvfio-user answers no access to
        a region.
        """
        machine = self._machine
        machine.precopy = False
        machine.quiesce()
        configs = {name: device.config_space() for name, device in machine.devices.items()}
        _log.debug("vfio_vmstate_change", running=False)
        machine.enter_all(DeviceState.STOP_COPY, recover=DeviceState.STOP)
        self._stopped = True
        self._stopped_since_ns = time.monotonic_ns()
        for name, device in machine.devices.items():
            # A machine that came paused has not signalled yet what was pending when it came.
            machine.pending[name] = device.drain() | machine.pending.get(name, Pending())
        return machine.vcpus.state_out(), configs, dict(machine.pending)

    def could_have_written(self, page: int) -> list[str]:
        """Return who could have written a page by DMA while it was tracked, and how that was tracked.

        Where journals are kept, those who did write it come first.
        """
        writers = self._have_written(page) if self._machine.spec.trace else []
        for container in self._machine.containers.values():
            for exposure in container.could_have_written(page):
                since = "before the migration" if exposure.since is None else f"{exposure.since:.3f} s"
                until = "the end" if exposure.until is None else f"{exposure.until:.3f} s"
                writers.append(
                    f"{exposure.device} at IOVA {exposure.iova:#x} from {since} to {until}, "
                    f"tracked by method {container.method.kind}"
                )
        return writers

    def _have_written(self, page: int) -> list[str]:
        """Return what the journals say of a page since tracking began."""
        times: dict[str, list[tuple[int, str]]] = {}
        for at in self._machine.vcpus.journal(page, 1)["time_ns"].tolist():
            times.setdefault("vcpu", []).append((at, ""))
        for container in self._machine.containers.values():
            for device, iova, since, until in container.could_have_written(page):
                low = 0 if since is None else int(since * 1e9)
                high = time.monotonic_ns() if until is None else int(until * 1e9)
                for at in self._journal(device, iova, PAGE_SIZE)["time_ns"].tolist():
                    if low <= at <= high:
                        times.setdefault(device, []).append((at, f" through IOVA {iova:#x}"))
        lines = []
        for name, written in times.items():
            tracked = [item for item in written if item[0] >= self._tracked_since_ns]
            if tracked:
                at, way = max(tracked)
                plural = "s" if len(tracked) > 1 else ""
                lines.append(f"{name} wrote it {len(tracked)} time{plural}, last at {at / 1e9:.3f} s{way}")
        return lines or ["no vCPU or device has written it since the migration began"]

    def late_writes(self, first: int, pages: int) -> list[str]:
        """Return what the journals say was written to RAM pages after the machine was stopped, oldest first."""
        if not self._machine.spec.trace:
            return []
        late = [(at, "vcpu", page, "") for page, at in self._machine.vcpus.journal(first, pages).tolist()]
        for container in self._machine.containers.values():
            for mapping in container.mappings:
                low, high = max(first, mapping.ram_page), min(first + pages, mapping.ram_page + mapping.pages)
                if mapping.ram_page < 0 or low >= high:
                    continue
                iova = mapping.iova + (low - mapping.ram_page) * PAGE_SIZE
                for device in self._machine.devices.values():
                    if device.spec.container == container.name:
                        for number, at in self._journal(device.name, iova, (high - low) * PAGE_SIZE).tolist():
                            page = low + number - iova // PAGE_SIZE
                            late.append((at, device.name, page, f" through IOVA {number * PAGE_SIZE:#x}"))
        return [
            f"{name} wrote page {page} {(at - self._stopped_since_ns) / 1e6:.0f} ms after the machine was stopped{way}"
            for at, name, page, way in sorted(late)
            if at > self._stopped_since_ns
        ][:LATE_WRITES]

    def _journal(self, device: str, iova: int, size: int) -> Rows:
        try:
            return self._machine.devices[device].client.write_journal(iova, size)
        except OSError:
            # It is gone, and what it wrote is known to nobody; the rest is worth telling.
            return np.empty(0, JOURNAL_ROW)

    def end(self) -> None:
        """Undo everything: logs off, devices and vCPUs as they were, what was drained signalled again (contract M9)."""
        machine = self._machine
        for container in machine.containers.values():
            container.end_delta()
            container.stop_tracking()
        with machine.lock:
            with machine.states:
                machine.precopy = machine.switching = False
                for device in machine.devices.values():
                    device.failure = None
            if machine.state == "failed":
                return
            machine.vcpus.stop_dirty_log()
            machine.vcpus.throttle(0)
            if self.running:
                machine.start(despite_resets=True)
            else:
                machine.enter_all(DeviceState.STOP, recover=DeviceState.STOP)


class Arriving:
    """A machine on its way in, until it is started."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._paused = False

    def enter_resuming(self) -> None:
        """Take all devices to RESUMING, before the first byte (contract M8)."""
        for name in self._machine.devices:
            _log.debug("vfio_load_setup", device=name)
        self._machine.enter_all(DeviceState.RESUMING, recover=DeviceState.RUNNING)

    def restart(self, name: str) -> None:
        """Take a device to RESUMING afresh: what was written to it is void.

        By a reset: the way through STOP would validate a state that is not whole.
        """
        device = self._machine.devices[name]
        with self._machine.turn:
            device.reset()
        self._machine.enter(device, DeviceState.RESUMING)

    def change_mappings(self, removed: Sequence[Sequence[Any]], added: Sequence[Sequence[Any]]) -> None:
        """Change mappings in vIOMMU and devices; OSError EINVAL if there is no such container."""
        for container in {change[0] for change in (*removed, *added)} - set(self._machine.containers):
            raise OSError(errno.EINVAL, f"there is no container {shown(container)}")
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
        """Take all devices out of RESUMING side by side, which validates their state; restore all the rest.

        OSError: EINVAL, and nothing is done, for what fits no device.
        """
        devices = self._machine.devices
        for name, config in configs.items():
            if len(config) != devices[name].config_size:
                raise OSError(
                    errno.EINVAL, f"{name}: {len(config)} bytes for {devices[name].config_size} of config space"
                )
        for name, its in pending.items():
            device = devices[name]
            if max(its.vectors, default=-1) >= len(device.interrupts):
                raise OSError(errno.EINVAL, f"{name}: has no interrupt vector {max(its.vectors)}")
            if max(its.doorbells, default=-1) >= len(device.doorbells):
                raise OSError(errno.EINVAL, f"{name}: has no doorbell {max(its.doorbells)}")

        def load_device(name: str) -> None:
            devices[name].enter(DeviceState.STOP)
            devices[name].restore_config(configs[name])

        with ThreadPoolExecutor(max(len(devices), 1)) as pool:
            list(pool.map(load_device, devices))
        self._machine.vcpus.state_in(vcpu)
        self._machine.pending = dict(pending)
        self._paused = paused

    def take_over(self) -> None:
        """Make it a machine of this host, and start it unless it came paused. OSError if it has failed meanwhile."""
        if self._machine.state == "incoming":
            self._machine.state = "paused"
            if not self._paused:
                self._machine.resume()
        elif self._machine.state == "failed":
            raise OSError(errno.EINVAL, f"the machine has failed: {self._machine.failure}")
