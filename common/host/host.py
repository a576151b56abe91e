"""A host: a state directory, at most one machine, and the events around it."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import grpc
import structlog
from switchover.v1 import host_pb2

from common.host.events import Events
from common.host.network import Security
from common.ipc.channel import ClosedError, RequestError
from common.machine import record
from common.machine.client import MachineClient
from common.machine.config import MachineSpec
from common.machine.device_config import DEVICE_KINDS, Attachment
from common.machine.launch import launch
from common.machine.record import Ownership, Record
from common.rpc.errors import RefusalError

__all__ = ["ARRIVED", "COMMITTED", "REVOKED", "Host", "HostError", "default_state_dir"]

COMMITTED, REVOKED = "COMMITTED", "REVOKED"
ARRIVED = (Ownership.COMMITTED, Ownership.STARTING, Ownership.OWNER, Ownership.OFF)

PLAIN = Security()

_log = structlog.get_logger()


class HostError(Exception):
    """The daemon cannot do what it was started for; the text is for the operator."""


def default_state_dir(role: str) -> Path:
    """Return $XDG_STATE_HOME/switchover/ROLE."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "switchover" / role


class Host:
    """What a daemon holds. `role` is "source", "destination" or "host"."""

    def __init__(
        self,
        role: str,
        state_dir: Path | None,
        device_kinds: Sequence[str] = DEVICE_KINDS,
        attachments: Mapping[str, Attachment] | None = None,
        security: Security = PLAIN,
    ) -> None:
        """Take the state directory; raise HostError if another daemon has it, or others may write to it.

        `device_kinds` are the emulated devices that machines which come here may have, `attachments` say by device
        where somebody else's are found.
        """
        if unknown := set(device_kinds) - set(DEVICE_KINDS):
            raise HostError(f"no such device: {', '.join(sorted(unknown))}; there are: {', '.join(DEVICE_KINDS)}")
        self.role = role
        self.device_kinds = frozenset(device_kinds)
        self.attachments = dict(attachments or {})
        self.security = security
        self.directory = (state_dir or default_state_dir(role)).absolute()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.directory.stat().st_mode & 0o022:
            # Whoever may write here may replace the record, and with it say who owns the machine.
            raise HostError(f"{self.directory}: others than its owner may write to it: chmod 700 {self.directory}")
        self._lock_file = (self.directory / "lock").open("w")
        os.fchmod(self._lock_file.fileno(), 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise HostError(f"{self.directory} is in use by another daemon; choose another --state-dir") from None
        self.events = Events()
        self.machine: MachineClient | None = None
        self.session_id = ""
        self._migrating = threading.Lock()

    @property
    def record_path(self) -> Path:
        """Where the ownership record lies."""
        return self.directory / "record.json"

    def record(self) -> Record | None:
        """Return the ownership record."""
        return record.read(self.record_path)

    def run_directory(self, session_id: str) -> Path:
        """Return an empty directory for a machine process."""
        path = self.directory / "run" / session_id
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.mkdir(mode=0o700)
        return path

    def remove_run_directory(self, session_id: str) -> None:
        """Remove what a machine process left."""
        shutil.rmtree(self.directory / "run" / session_id, ignore_errors=True)

    def decide(self, session_id: str, decision: str) -> None:
        """Make it durable, for as long as this host exists, how a session that came here ended."""
        directory = self.directory / "decisions"
        directory.mkdir(exist_ok=True, mode=0o700)
        record.write_durably(directory / session_id, decision)

    def decision(self, session_id: str) -> str | None:
        """Return how a session ended: COMMITTED, REVOKED, or None if that is open, or no such session came.

        A COMMIT is decided by the record already; its own file is written later, for when the record has moved on.
        """
        known = self.record()
        if known is not None and known.session_id == session_id and known.ownership in ARRIVED:
            return COMMITTED
        try:
            return (self.directory / "decisions" / session_id).read_text()
        except FileNotFoundError:
            return None

    def open_machine(self, spec: MachineSpec | None) -> str:
        """Find the machine that runs here, or start the one described; return a sentence that says which.

        The record is read first: a machine that has moved away is never started a second time here, and one whose
        handover is not decided stands still until it is.
        """
        known = self.record()
        if known is None:
            return self._boot(spec, 1) if spec is not None else "no machine"
        machine = self._find(known)
        if machine is None:
            return self._without_process(known, spec)
        if known.ownership is Ownership.RELEASED:
            machine.shutdown()  # the daemon ended before it did
            return self._without_process(known, spec)
        if spec is not None and spec.name != known.name:
            machine.close()
            name = known.name
            raise HostError(f"{self.directory} holds machine {name}, not {spec.name}; choose another --state-dir")
        self.machine = machine
        self.tell_states(machine)
        match known.ownership:
            case Ownership.GONE:
                return f"machine {known.name} has moved to {known.peer}; its copy here is kept"
            case Ownership.COMMITTING:
                return f"machine {known.name} found; whether it is at {known.peer} now is being asked"
            case Ownership.COMMITTED | Ownership.STARTING:
                # It was committed to this host, so it is ours: what the last daemon did not come to do is done now.
                self.decide(known.session_id, COMMITTED)
                try:
                    machine.take_over()
                except RequestError as error:
                    return f"machine {known.name} is this host's, and does not run: {error}"
                machine.record(Ownership.OWNER, session_id=known.session_id)
        return f"machine {known.name} found {machine.describe().state}"

    def _find(self, known: Record) -> MachineClient | None:
        try:
            return MachineClient.connect(Path(known.directory))
        except OSError:
            return None

    def _without_process(self, known: Record, spec: MachineSpec | None) -> str:
        """Say what became of a machine whose process is not there; start the one described if that is possible."""
        match known.ownership:
            case Ownership.OWNER | Ownership.OFF:
                if spec is not None:
                    return self._boot(spec, known.incarnation + 1)
                return f"machine {known.name} was switched off"
            case Ownership.GONE | Ownership.RELEASED:
                if spec is not None and spec.name != known.name:
                    return self._boot(spec, 1)
                return f"machine {known.name} is not started: it has moved to {known.peer}"
            case Ownership.COMMITTED:
                # Nothing of it has left STOP here, so it may still go on at its source: this decides it.
                self.decide(known.session_id, REVOKED)
                self.record_path.unlink()
                return f"machine {known.name} was lost before it was started here; it goes on at its source"
            case Ownership.STARTING:
                return f"machine {known.name} was lost while it was started here: its process has ended"
            case Ownership.COMMITTING:
                return f"machine {known.name} was lost here; whether it is at {known.peer} now is being asked"

    def arrival_failure(self, session_id: str) -> str:
        """Return why the machine that a session has brought does not run here; empty: it does, or moved on."""
        known = self.record()
        if known is None or known.session_id != session_id or known.ownership not in ARRIVED:
            return ""
        if self.machine is None:
            return "" if known.ownership is Ownership.OFF else "its process has ended"
        return str(self.machine.describe().failure)

    def release(self, ownership: Ownership) -> None:
        """Record that the machine is not needed here any more (RELEASED or OFF), and let it go."""
        known = self.record()
        if known is not None:
            record.write(self.record_path, replace(known, ownership=ownership))
        machine, self.machine = self.machine, None
        if machine is not None:
            machine.shutdown()
            shutil.rmtree(machine.directory, ignore_errors=True)

    def _boot(self, spec: MachineSpec, incarnation: int) -> str:
        uuid = spec.uuid or str(uuid4())
        directory = self.run_directory("boot")
        self.machine = launch(replace(spec, uuid=uuid), directory, self.record_path, incarnation=incarnation)
        self.tell_states(self.machine)
        self.machine.record(Ownership.OWNER)
        self.machine.resume()
        return f"machine {spec.name} started"

    def tell_states(self, machine: MachineClient) -> None:
        """Publish each change of a device's migration state from now on, for as long as the machine process lives."""
        watched = machine.another()
        last, _ = watched.state_changes(None)

        def tell(last: int) -> None:
            with suppress(ClosedError, RequestError, OSError):
                while True:
                    last, changes = watched.state_changes(last)
                    for name, state in changes:
                        session_id = self.session_id if self.migrating else ""
                        event = host_pb2.DeviceStateEvent(name=name, state=state)
                        self.events.publish(session_id, device_state=event)
            watched.close()

        threading.Thread(target=tell, args=(last,), name="device states", daemon=True).start()

    def adopt(self, machine: MachineClient) -> None:
        """Take a machine that has arrived."""
        self.machine = machine

    def require_machine(self) -> MachineClient:
        """Return the machine; refuse the call if there is none."""
        if self.machine is None:
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION, "NO_MACHINE", f"this {self.role} has no machine now"
            )
        return self.machine

    @property
    def migrating(self) -> bool:
        """Whether a migration from or to here runs."""
        return self._migrating.locked()

    def begin_migration(self, session_id: str) -> None:
        """Claim this host for one migration; refuse if one runs."""
        if not self._migrating.acquire(blocking=False):
            raise RefusalError(
                grpc.StatusCode.ABORTED, "MIGRATION_RUNS", f"migration {self.session_id} runs here already"
            )
        self.session_id = session_id

    def end_migration(self) -> None:
        """Let the next migration come."""
        self._migrating.release()

    @contextmanager
    def not_migrating(self) -> Iterator[None]:
        """Keep migrations away while the machine is paused, resumed or stopped; refuse if one runs."""
        self.begin_migration(self.session_id)
        try:
            yield
        finally:
            self.end_migration()

    def close(self) -> None:
        """Let go of the state directory; the machine goes on."""
        if self.machine is not None:
            self.machine.close()
        self._lock_file.close()
