"""The machine's unix socket: daemons ask, the machine does.

Each connection has a thread, so bulk device data never keeps an operator waiting. The connection that began a migration
holds it: when that goes before a COMMIT was recorded, the attempt ends here, and the machine runs on. A machine of
which nothing is recorded yet would be found by nobody: it ends with the connection of the daemon that has started it.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from common.iommu.iova_tree import Mapping
from common.ipc.channel import ClosedError, Handler, Message, RequestError, serve
from common.machine import REQUESTS, SOCKET, record
from common.machine.config import to_json
from common.machine.device import Pending
from common.machine.machine import Machine
from common.machine.moving import Arriving, Leaving
from common.machine.record import Ownership, Record
from common.vfio.migration import DeviceState

__all__ = ["MachineService"]

_log = structlog.get_logger()

SIGNAL_SECONDS = 1.0
STATE_CHANGE_SECONDS = 5.0  # for which a daemon may wait in one request


class MachineService:
    """Serves one machine until it is shut down."""

    def __init__(self, machine: Machine, directory: Path, record_path: Path, incarnation: int) -> None:
        self.machine = machine
        self.ended = threading.Event()
        self.leaving: Leaving | None = None
        self.arriving = Arriving(machine)
        self.recorded = self.committed = False
        self.incarnation = incarnation
        self.session_id = ""  # of the migration that runs
        self._state_before = machine.state
        self._directory = directory
        self._record_path = record_path
        self._lock = threading.Lock()

    def run(self, first: socket.socket) -> None:
        """Serve the connection that there is, and those that come, until the machine ends."""
        path = self._directory / SOCKET
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Whoever sees the socket can connect to it: it gets its name when it listens already.
        unlisted = path.with_suffix(".new")
        listener.bind(str(unlisted))
        unlisted.chmod(0o600)
        listener.listen()
        unlisted.rename(path)
        threading.Thread(target=self._serve, args=(first,), kwargs={"first": True}, daemon=True).start()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        # A signal may come to another thread, and nothing wakes this one for its handler (common/signals.py).
        while not self.ended.wait(SIGNAL_SECONDS):
            pass
        path.unlink(missing_ok=True)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket, *, first: bool = False) -> None:
        connection = _Connection(self)
        try:
            serve(sock, connection.handlers())
        except ClosedError:
            pass
        except Exception:  # noqa: BLE001  # a defect ends its connection, not the machine
            _log.exception("defect")
        finally:
            sock.close()
            if connection.holds_migration or (first and not self.recorded):
                self.release()

    def begin(self, session_id: str) -> bool:
        """Begin a migration; return whether the machine runs."""
        with self._lock:
            if self.machine.state == "incoming":
                self.session_id = session_id
                return False
            if self.leaving is not None:
                raise RequestError("EBUSY", "a migration runs")
            if self.machine.state not in ("running", "paused"):
                raise RequestError("EINVAL", f"the machine has {self.machine.state}")
            self.leaving = Leaving(self.machine)
            self.session_id = session_id
            return self.leaving.running

    def release(self) -> None:
        """End the migration whose holder has gone, unless it was committed; or a machine that nobody would find."""
        with self._lock:
            if self.committed:
                return
            if not self.recorded:
                self.ended.set()
            elif self.leaving is not None:
                leaving, self.leaving = self.leaving, None
                try:
                    leaving.end()
                except OSError as error:
                    self.machine.fail(f"it could not go on after a migration that has ended: {error}")
                self.session_id = ""

    def record(self, ownership: Ownership, session_id: str, peer: str, incarnation: int, *, judged: bool) -> None:
        """Write a decision down, and act on it: a machine that is gone is not started again.

        RequestError EINVAL: a machine that has failed is not handed over.
        """
        if ownership in (Ownership.COMMITTING, Ownership.COMMITTED) and self.machine.state == "failed":
            raise RequestError("EINVAL", f"the machine has failed: {self.machine.failure}")
        spec = self.machine.spec
        self.incarnation = incarnation or self.incarnation
        record.write(
            self._record_path,
            Record(
                machine_uuid=spec.uuid or "",
                name=spec.name,
                incarnation=self.incarnation,
                ownership=ownership,
                directory=str(self._directory),
                session_id=session_id,
                peer=peer,
                judged=judged,
            ),
        )
        self.recorded, self.committed = True, ownership is not Ownership.OWNER
        if ownership is Ownership.OWNER and self.leaving is None:
            self.session_id = ""
        if ownership is Ownership.COMMITTING:
            self._state_before, self.machine.state = self.machine.state, "handing over"
        elif ownership is Ownership.GONE:
            self.machine.state = "moved"
        elif self.machine.state == "handing over":
            self.machine.state = self._state_before


class _Connection:
    """The requests of one connection (see `common.machine.client` for what each means)."""

    def __init__(self, service: MachineService) -> None:
        self._service = service
        self._machine = service.machine
        self.holds_migration = False

    def handlers(self) -> dict[str, Handler]:
        """Return what can be asked."""
        asked: list[Callable[..., Any]] = [
            *(
                self.describe,
                self.blockers,
                self.spec,
                self.ram,
                self.devices,
                self.pause,
                self.resume,
                self.record,
                self.report,
                self.state_changes,
            ),
            *(self.shutdown, self.begin, self.running, self.start_tracking, self.enter_precopy),
            *(self.read_device, self.sizes),
            *(
                self.mapping_changes,
                self.sync,
                self.throttle,
                self.pause_vcpus,
                self.stop_devices,
                self.leave_stop_copy,
            ),
            *(self.digests, self.explain, self.late_writes, self.end, self.enter_resuming, self.change_mappings),
            *(self.write_device, self.restart_device, self.load, self.take_over),
        ]
        return {handler.__name__: handler for handler in asked}

    def _leaving(self) -> Leaving:
        leaving = self._service.leaving
        if leaving is None:
            raise RequestError("EINVAL", "no migration runs")
        return leaving

    # The machine as a whole.

    def describe(self, _: Message) -> dict[str, Any]:
        return {**self._machine.describe(), "pid": os.getpid(), "incarnation": self._service.incarnation}

    def blockers(self, _: Message) -> dict[str, Any]:
        return {"blockers": self._machine.blockers()}

    def spec(self, _: Message) -> dict[str, Any]:
        return {"json": to_json(self._machine.spec)}

    def ram(self, _: Message) -> Message:
        return Message(fds=[self._machine.ram.fd])

    def devices(self, _: Message) -> dict[str, Any]:
        return {
            "devices": [
                {
                    "name": device.name,
                    "kind": device.spec.kind,
                    "migration_flags": int(device.migration_flags),
                    "state": device.state.name,
                    "comparable_dump": device.client.extension is not None and device.client.extension.comparable_dump,
                    "notes": device.notes,
                    "bar_sizes": [device.bar_sizes.get(index, 0) for index in range(6)],
                }
                for device in self._machine.devices.values()
            ]
        }

    def pause(self, _: Message) -> None:
        self._machine.pause()

    def resume(self, _: Message) -> None:
        self._machine.resume()

    def record(self, request: Message) -> None:
        ownership = Ownership(request["ownership"])
        self._service.record(
            ownership, request["session_id"], request["peer"], request["incarnation"], judged=request["judged"]
        )

    def report(self, _: Message) -> dict[str, Any]:
        return self._machine.vcpus.report()

    def state_changes(self, request: Message) -> dict[str, Any]:
        last, changes = self._machine.state_changes.after(request["after"], STATE_CHANGE_SECONDS)
        return {"last": last, "changes": changes}

    def shutdown(self, _: Message) -> None:
        self._service.ended.set()

    # Leaving.

    def begin(self, request: Message) -> dict[str, Any]:
        running = self._service.begin(request["session_id"])
        self.holds_migration = True
        return {"running": running, "requests": REQUESTS}

    def running(self, _: Message) -> dict[str, Any]:
        return {"running": self._leaving().running}

    def start_tracking(self, _: Message) -> dict[str, Any]:
        tracked = self._leaving().start_tracking()
        return {
            "containers": [
                {"container": container.name, "method": method, "reason": reason}
                for container, method, reason in tracked
            ]
        }

    def enter_precopy(self, _: Message) -> None:
        self._leaving().enter_precopy()

    def read_device(self, request: Message) -> Message:
        saved = self._machine.devices[request["name"]].read_saved(request["size"])
        return Message({"session": saved.session, "ended": saved.ended}, saved.data)

    def sizes(self, request: Message) -> dict[str, Any]:
        self._leaving()
        found = self._machine.devices[request["name"]].sizes()
        return {
            "session": found.session,
            "initial_bytes": None if found.precopy is None else found.precopy.initial_bytes,
            "dirty_bytes": None if found.precopy is None else found.precopy.dirty_bytes,
            "stop_copy_length": found.length,
            "length_failed": found.length_failed,
        }

    def mapping_changes(self, _: Message) -> dict[str, Any]:
        self._leaving()
        deltas = {name: container.take_delta() for name, container in self._machine.containers.items()}
        return {
            "removed": [_change(name, item) for name, delta in deltas.items() for item in delta.removed],
            "added": [_change(name, item) for name, delta in deltas.items() for item in delta.added],
        }

    def sync(self, _: Message) -> Message:
        collected = self._leaving().sync()
        packed = {name: bitmap.to_bytes() for name, bitmap in collected.items()}
        sources = {name: len(data) for name, data in packed.items()}
        return Message({"pages": self._machine.ram.layout.pages, "sources": sources}, b"".join(packed.values()))

    def throttle(self, request: Message) -> None:
        self._machine.vcpus.throttle(request["percent"])

    def pause_vcpus(self, _: Message) -> dict[str, Any]:
        return {"running": self._leaving().pause_vcpus()}

    def stop_devices(self, _: Message) -> Message:
        vcpu, configs, pending = self._leaving().stop_devices()
        devices = [
            {
                "name": name,
                "config_size": len(config),
                "vectors": pending[name].vectors,
                "doorbells": pending[name].doorbells,
            }
            for name, config in configs.items()
        ]
        return Message({"vcpu": vcpu, "devices": devices}, b"".join(configs.values()))

    def leave_stop_copy(self, request: Message) -> None:
        self._leaving()
        device = self._machine.devices[request["name"]]
        # The request may have waited while the migration was ended, and the device runs: it is left alone then.
        self._machine.enter(device, DeviceState.STOP, recover=DeviceState.STOP, only_from=DeviceState.STOP_COPY)
        _log.debug("vfio_save_cleanup", device=request["name"])

    def digests(self, request: Message) -> dict[str, Any]:
        found = self._machine.digests(request["most"])
        return {"devices": {name: dataclasses.asdict(digest) for name, digest in found.items()}}

    def explain(self, request: Message) -> dict[str, Any]:
        return {"writers": self._leaving().could_have_written(request["page"])}

    def late_writes(self, request: Message) -> dict[str, Any]:
        return {"writes": self._leaving().late_writes(request["first"], request["pages"])}

    def end(self, _: Message) -> None:
        self.holds_migration = False
        self._service.release()

    # Arriving.

    def enter_resuming(self, _: Message) -> None:
        self._service.arriving.enter_resuming()

    def change_mappings(self, request: Message) -> None:
        self._service.arriving.change_mappings(request["removed"], request["added"])

    def write_device(self, request: Message) -> None:
        _log.debug("vfio_load_state_device_data", device=request["name"], data_size=len(request.payload))
        self._machine.devices[request["name"]].client.mig_data_write(request.payload)

    def restart_device(self, request: Message) -> None:
        self._service.arriving.restart(request["name"])

    def load(self, request: Message) -> None:
        configs, pending = {}, {}
        payload = memoryview(request.payload)
        for device in request["devices"]:
            name, size = device["name"], device["config_size"]
            configs[name], payload = bytes(payload[:size]), payload[size:]
            pending[name] = Pending(tuple(device["vectors"]), tuple(device["doorbells"]))
        self._service.arriving.load(request["vcpu"], configs, pending, paused=request["paused"])

    def take_over(self, _: Message) -> None:
        self._service.arriving.take_over()


def _change(container: str, mapping: Mapping) -> tuple[str, int, int, int, bool, bool]:
    return container, mapping.iova, mapping.size, mapping.gpa, mapping.readable, mapping.writable
