"""A host: a state directory, at most one machine, and the events around it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import grpc
import structlog
from switchover.v1 import host_pb2

from common.host.events import Events
from common.host.metrics import Metrics
from common.host.network import Security
from common.host.ownership import ARRIVED, COMMITTED, REVOKED, Opening, decision_of, is_new, opening, why_kept
from common.ipc.channel import ClosedError, RequestError
from common.machine import record
from common.machine.client import MachineClient
from common.machine.config import MachineSpec
from common.machine.device_config import DEVICE_KINDS, Attachment
from common.machine.launch import launch
from common.machine.record import Ownership, Record
from common.rpc.errors import RefusalError

__all__ = ["Host", "HostError", "default_state_dir"]

PLAIN = Security()
MAX_DECISIONS = 4096
STATE_SECONDS = 0.1

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
        self.metrics = Metrics()
        self.machine: MachineClient | None = None
        self.session_id = ""
        self.ending = False  # no more migrations begin
        self._migrating = threading.Lock()

    @property
    def record_path(self) -> Path:
        """Where the ownership record lies."""
        return self.directory / "record.json"

    def record(self) -> Record | None:
        """Return the ownership record."""
        return record.read(self.record_path)

    def run_directory(self, session_id: str) -> Path:
        """Return an empty directory for a machine process; what is left of those that were here before it goes."""
        path = self.directory / "run" / session_id
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.mkdir(mode=0o700)
        return path

    def remove_run_directory(self, session_id: str) -> None:
        """Remove what a machine process left."""
        shutil.rmtree(self.directory / "run" / session_id, ignore_errors=True)

    def decide(self, session_id: str, decision: str, begun_by: frozenset[str] | None = None) -> None:
        """Make it durable how a session that came here ended; OPEN: it has come, from who has these names.

        For as long as this host exists, but for REVOKED ones of more than `MAX_DECISIONS` sessions ago.
        """
        directory = self.directory / "decisions"
        directory.mkdir(exist_ok=True, mode=0o700)
        names = self.begun_by(session_id) if begun_by is None else begun_by
        record.write_durably(directory / session_id, f"{decision}\n{json.dumps(sorted(names))}\n")
        with os.scandir(directory) as entries, suppress(FileNotFoundError):  # another thread is here too
            kept = sorted((entry.stat().st_mtime_ns, entry.name) for entry in entries)
            if len(kept) > MAX_DECISIONS:
                # Whoever may ask for decisions could fill the disk. No COMMIT is on its way for so many sessions.
                oldest = next((name for _, name in kept if name != session_id and self._noted(name) == REVOKED), None)
                if oldest is not None:
                    (directory / oldest).unlink()

    def decision(self, session_id: str) -> str | None:
        """Return how a session ended: COMMITTED, REVOKED, or None if that is open, or no such session came."""
        return decision_of(self.record(), session_id, self._noted(session_id))

    def is_new(self, session_id: str) -> bool:
        """Return whether a session has never come here."""
        return is_new(self.record(), session_id, self._noted(session_id))

    def begun_by(self, session_id: str) -> frozenset[str]:
        """Return the names, in a certificate, of who has begun a session; none without TLS, or if it never came."""
        _, _, names = self._note(session_id).partition("\n")
        return frozenset(json.loads(names or "[]"))

    def _noted(self, session_id: str) -> str | None:
        return self._note(session_id).partition("\n")[0] or None

    def _note(self, session_id: str) -> str:
        try:
            return (self.directory / "decisions" / session_id).read_text()
        except FileNotFoundError:
            return ""

    def open_machine(self, spec: MachineSpec | None) -> str:
        """Find the machine that runs here, or start the one described; return a sentence that says which.

        The record is read first (`common.host.ownership.opening`): a machine that has moved away is never started a
        second time here, and one whose handover is not decided stands still until it is.
        """
        known = self.record()
        described = spec.name if spec is not None else None
        left_to = self._left_to(described)
        machine = self._find(known) if known is not None else None
        action = opening(known, runs=machine is not None, described=described, left=left_to is not None)
        if machine is not None and action is Opening.END:
            machine.shutdown()  # the daemon ended before it did
            machine = None
            action = opening(known, runs=False, described=described, left=left_to is not None)
        if action is Opening.NONE and left_to is not None and (known is None or known.name != described):
            return f"machine {described} is not started: it has moved to {left_to} ({self._left_path(described)})"
        if known is None or machine is None:
            return self._without_process(known, spec, action)
        if spec is not None and spec.name != known.name:
            machine.close()
            name = known.name
            raise HostError(f"{self.directory} holds machine {name}, not {spec.name}; choose another --state-dir")
        self.machine = machine
        self.tell_states(machine)
        if action is Opening.ASK:
            return f"machine {known.name} found; whether it is at {known.peer} now is being asked"
        if known.ownership is Ownership.GONE:
            return f"machine {known.name} has moved to {known.peer}; its copy here is kept"
        if action is Opening.TAKE_OVER:
            # What the last daemon did not come to do is done now.
            self.decide(known.session_id, COMMITTED)
            try:
                machine.take_over()
            except RequestError as error:
                return f"machine {known.name} is this host's, and does not run: {error}"
            machine.record(Ownership.OWNER, session_id=known.session_id)
        else:
            machine.end()  # the last daemon may have ended between a decision and what follows from it
        return f"machine {known.name} found {machine.describe().state}"

    def _find(self, known: Record) -> MachineClient | None:
        try:
            return MachineClient.connect(Path(known.directory))
        except OSError:
            return None

    def _without_process(self, known: Record | None, spec: MachineSpec | None, action: Opening) -> str:
        """Start the machine described if that is the action; else say what became of the one that was here."""
        if spec is not None and action is Opening.BOOT:
            same = known is not None and known.ownership not in (Ownership.GONE, Ownership.RELEASED)
            return self._boot(spec, known.incarnation + 1 if known is not None and same else 1)
        if known is None:
            return "no machine"
        match action:
            case Opening.GIVE_BACK:
                self.give_back(known.session_id)
                return f"machine {known.name} was lost before it was started here; it goes on at its source"
            case Opening.LOST:
                # Whatever is recorded here later: its source must not believe that it never ran here.
                self.decide(known.session_id, COMMITTED)
                return f"machine {known.name} was lost while it was started here: its process has ended"
            case Opening.ASK:
                return f"machine {known.name} was lost here; whether it is at {known.peer} now is being asked"
        match known.ownership:
            case Ownership.GONE | Ownership.RELEASED:
                return f"machine {known.name} is not started: it has moved to {known.peer}"
            case Ownership.FORGOTTEN:
                return f"machine {known.name} was forgotten"
        return f"machine {known.name} was switched off"

    def arrival_failure(self, session_id: str) -> str:
        """Return why the machine that a session has brought does not run here; empty: it does, or moved on."""
        known = self.record()
        if known is None or known.session_id != session_id or known.ownership not in ARRIVED:
            return ""
        if known.ownership is Ownership.FORGOTTEN:
            return "what was left of it was forgotten"
        if self.machine is None:
            return "" if known.ownership is Ownership.OFF else "its process has ended"
        return str(self.machine.describe().failure)

    def release(self, ownership: Ownership) -> None:
        """Record that the machine is not needed here any more (RELEASED, OFF or FORGOTTEN), and let it go."""
        known = self.record()
        if known is not None:
            if ownership is not Ownership.RELEASED:
                self._left_path(known.name).unlink(missing_ok=True)  # it has come back since
            # A session that has left from here is not taken for one that came.
            session_id = known.session_id if ownership is Ownership.RELEASED or known.ownership in ARRIVED else ""
            record.write(self.record_path, replace(known, ownership=ownership, session_id=session_id))
        machine, self.machine = self.machine, None
        if machine is not None:
            machine.shutdown()
            shutil.rmtree(machine.directory, ignore_errors=True)

    def set_aside(self) -> None:
        """Note of a machine that has left where it went, before another machine's record takes the place of its own."""
        known = self.record()
        if known is not None and known.ownership in (Ownership.GONE, Ownership.RELEASED):
            self._left_path(known.name).parent.mkdir(exist_ok=True, mode=0o700)
            record.write_durably(self._left_path(known.name), known.peer)

    def _left_path(self, name: str | None) -> Path:
        return self.directory / "left" / f"{name}"

    def _left_to(self, name: str | None) -> str | None:
        """Return where a machine went that has left before the one in the record came; None: it has not."""
        try:
            return self._left_path(name).read_text() if name is not None else None
        except FileNotFoundError:
            return None

    def give_back(self, session_id: str) -> None:
        """Revoke the session of a machine that was committed to this host, and of which nothing has run, or is left."""
        self.decide(session_id, REVOKED)
        self.record_path.unlink()
        self.machine = None

    def forget(self) -> None:
        """Let go of a machine that this host does not own, or that has failed, as if it had never been here.

        Refuse the call if it is still needed, or if nothing is kept.
        """
        known = self.record()
        try:
            state = self.machine.describe().state if self.machine is not None else None
        except ClosedError:
            state = None
        reason = why_kept(known.ownership if known is not None else None, state=state)
        if known is None or reason is not None:
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "NOT_FORGOTTEN", f"not forgotten: {reason}")
        self.release(Ownership.FORGOTTEN)

    def _boot(self, spec: MachineSpec, incarnation: int) -> str:
        self.set_aside()
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
                    # They come in crowds, and most of them in a blackout.
                    time.sleep(STATE_SECONDS)
            watched.close()

        threading.Thread(target=tell, args=(last,), name="device states", daemon=True).start()

    def adopt(self, machine: MachineClient) -> None:
        """Take a machine that has arrived."""
        self.machine = machine

    @property
    def gone_to(self) -> str:
        """Where the machine that was here last has gone; empty: it has not."""
        known = self.record()
        return known.peer if known is not None and known.ownership in (Ownership.GONE, Ownership.RELEASED) else ""

    def require_machine(self) -> MachineClient:
        """Return the machine; refuse the call if there is none, or only the copy of one that has gone."""
        gone_to = self.gone_to
        if self.machine is None or gone_to:
            went = f"; it went to {gone_to}" if gone_to else ""
            went += ", and its copy is kept here until switchover forget" if self.machine is not None else ""
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION, "NO_MACHINE", f"this {self.role} has no machine now{went}"
            )
        return self.machine

    @property
    def migrating(self) -> bool:
        """Whether a migration from or to here runs."""
        return self._migrating.locked()

    def begin_migration(self, session_id: str) -> None:
        """Claim this host for one migration; refuse if one runs, or the daemon is about to end."""
        if self.ending:
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "ENDING", "this daemon has been told to end")
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
