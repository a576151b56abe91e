"""The one step that cannot be undone: COMMIT, and what to do when its answer does not come.

A source that is COMMITTING asks until the destination says who owns the machine. That it does not answer decides
nothing; nor does the end of this daemon, for the next one finds the record and goes on asking (`Settling`). Where the
destination is lost for good, an operator may declare what it does not say any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import structlog
from switchover.v1 import migration_pb2, migration_pb2_grpc

from common.host.host import Host
from common.ipc.channel import ClosedError, RequestError
from common.logs import enter_session
from common.machine import record
from common.machine.client import MachineClient
from common.machine.record import Ownership, Record
from common.rpc.channel import open_channel
from common.rpc.errors import peer_error
from source import handover
from source.handover import Event

__all__ = ["Handover", "NotStartedError", "ResolvedError", "RevokedError", "Settling", "UndecidedError", "write_down"]

CALL_SECONDS = 20.0
RETRY_SECONDS = 1.0
POLL_SECONDS = 0.05

# One that is COMMITTED only may still lose the machine before anything of it has run, and revoke: it is told again.
STARTED = (migration_pb2.SESSION_STATE_STARTING, migration_pb2.SESSION_STATE_RUNNING)

_log = structlog.get_logger()
Request = TypeVar("Request")
Response = TypeVar("Response")


class RevokedError(Exception):
    """The destination has decided that it does not take the machine."""


class ResolvedError(Exception):
    """An operator has declared who owns the machine."""


class NotStartedError(Exception):
    """The destination owns the machine, and could not start it."""


class UndecidedError(Exception):
    """This daemon ends before the destination has said who owns the machine; the next one goes on asking."""


class _DeclaredError(Exception):
    def __init__(self, event: Event) -> None:
        super().__init__(event.value)
        self.event = event


def write_down(host: Host, machine: MachineClient | None, decided: Record) -> None:
    """Record a decision, by the machine, which acts on it.

    What the destination or an operator has decided is true of a machine whose process has ended as well. Only to begin
    with a handover there must be a machine: else raise ClosedError.
    """
    if machine is not None:
        try:
            machine.record(
                decided.ownership,
                session_id=decided.session_id,
                peer=decided.peer,
                incarnation=decided.incarnation,
                judged=decided.judged,
            )
        except ClosedError:
            if decided.ownership is Ownership.COMMITTING:
                raise
        else:
            return
    record.write(host.record_path, decided)


class Handover:
    """A machine that is COMMITTING, and the question who owns it.

    One thread asks (`commit` or `resolve`), records the answer and says that it has (`recorded`); others may answer in
    the destination's place (`declare`), or end the waiting.
    """

    def __init__(
        self,
        stub: migration_pb2_grpc.MigrationServiceStub,
        session_id: str,
        incarnation: int,
        say: Callable[[str], None],
    ) -> None:
        """`incarnation` is the one that the destination was offered; `say` is told why it takes longer."""
        self._stub = stub
        self._commit = migration_pb2.CommitRequest(session_id=session_id, incarnation=incarnation)
        self._session_id = session_id
        self._say = say
        self._told = ""
        self.refusal = ""  # what COMMIT was refused with
        self._lock = threading.Lock()
        self._call: grpc.Future[Any] | None = None
        self._answer: Event | None = None
        self._declared = False
        self._ended = False
        self._disturbed = threading.Event()
        self._recorded = threading.Event()

    def _tell(self, text: str) -> None:
        """Say it, once as long as it stays the same."""
        if text != self._told:
            self._told = text
            self._say(text)

    def declare(self, event: Event) -> bool:
        """Answer in the destination's place; return whether that is on disk now. False: there is another answer."""
        with self._lock:
            if self._answer is not None or self._ended:
                return False
            self._answer, self._declared = event, True
            self._disturb()
        return self._recorded.wait(CALL_SECONDS)

    def end(self) -> None:
        """Do not wait any longer: who waits gets `UndecidedError`."""
        with self._lock:
            self._ended = True
            self._disturb()

    def _disturb(self) -> None:
        self._disturbed.set()
        if self._call is not None:
            self._call.cancel()

    def recorded(self) -> None:
        """Say that the answer is on disk."""
        self._recorded.set()

    def commit(self) -> tuple[Event, float]:
        """Send COMMIT; return the answer, and how long the start took there in ms (0: that was not heard)."""
        try:
            response = self._ask(self._stub.Commit, self._commit)
            if response.state in STARTED:
                return self._answered(Event.COMMITTED), response.start_us / 1000
        except grpc.RpcError as error:
            failure = peer_error(error)
            self.refusal = str(failure)
            _log.warning("COMMIT was not answered", reason=failure.reason, message=self.refusal)
        except _DeclaredError as declared:
            return declared.event, 0.0
        return self.resolve(), 0.0

    def resolve(self) -> Event:
        """Ask until the destination says who owns the machine, or somebody in its place."""
        request = migration_pb2.ResolveRequest(session_id=self._session_id)
        try:
            while True:
                try:
                    state = self._ask(self._stub.Resolve, request).state
                    if state in STARTED:
                        return self._answered(Event.COMMITTED)
                    if state == migration_pb2.SESSION_STATE_REVOKED:
                        return self._answered(Event.REVOKED)
                    if state == migration_pb2.SESSION_STATE_COMMITTED:
                        self._ask(self._stub.Commit, self._commit)
                except grpc.RpcError as error:
                    self._tell(
                        f"who owns the machine is not known until the destination answers: {peer_error(error)}; if it "
                        "never will, switchover resolve declares it"
                    )
                self._wait(RETRY_SECONDS)
        except _DeclaredError as declared:
            return declared.event

    def wait_until_started(self) -> None:
        """Wait until the destination has started the machine that it owns; raise `NotStartedError` if it could not."""
        request = migration_pb2.GetSessionRequest(session_id=self._session_id)
        while True:
            try:
                session = self._ask(self._stub.GetSession, request)
            except grpc.RpcError as error:
                self._tell(f"whether the machine runs is not known until the destination answers: {peer_error(error)}")
                self._wait(RETRY_SECONDS)
                continue
            if session.failure:
                raise NotStartedError(f"the destination owns the machine and could not start it: {session.failure}")
            if session.state == migration_pb2.SESSION_STATE_RUNNING:
                return
            if session.state not in STARTED:
                raise NotStartedError("the destination has owned the machine, and does not know it any more")
            self._wait(POLL_SECONDS)

    def _answered(self, answer: Event) -> Event:
        """Return what counts: what the destination says, unless an operator was faster."""
        with self._lock:
            self._answer = self._answer or answer
            return self._answer

    def _ask(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        with self._lock:
            self._check()
            self._call = call = method.future(request, timeout=CALL_SECONDS)
        try:
            return call.result()
        except grpc.FutureCancelledError:
            self._check()
            raise

    def _wait(self, seconds: float) -> None:
        self._disturbed.wait(seconds)
        self._check()

    def _check(self) -> None:
        if self._declared and self._answer is not None:
            raise _DeclaredError(self._answer)
        if self._ended:
            raise UndecidedError("the daemon ends before the destination has said who owns the machine")


class Settling:
    """A handover that an earlier daemon, or a failed migration, left COMMITTING: it is finished in the background."""

    def __init__(self, host: Host, known: Record) -> None:
        self._host = host
        self._known = known
        self._channel = open_channel(known.peer, host.security.channel)
        self.handover = Handover(
            migration_pb2_grpc.MigrationServiceStub(self._channel), known.session_id, known.incarnation + 1, self._say
        )
        host.begin_migration(known.session_id)
        self._thread = threading.Thread(target=self._settle, name="settle", daemon=True)
        self._thread.start()

    def _say(self, text: str) -> None:
        self._host.events.publish(self._known.session_id, message=text)

    def _settle(self) -> None:
        known = self._known
        enter_session(known.session_id)
        try:
            with self._channel:
                event = self.handover.resolve()
                self._record(event)
                self.handover.recorded()
                if event is Event.COMMITTED:
                    self.handover.wait_until_started()
                    if known.judged:
                        self._host.release(Ownership.RELEASED)
            _log.info("handover settled", decision=event.value)
        except (NotStartedError, UndecidedError, ClosedError, RequestError, OSError) as error:
            self._say(f"the handover to {known.peer} is not settled: {error}")
            _log.warning("handover not settled", message=str(error))
        finally:
            self._host.end_migration()

    def _record(self, event: Event) -> None:
        """Record what was decided; a machine that stays here goes on, unless its process has ended."""
        known, machine = self._known, self._host.machine
        ownership = handover.after(Ownership.COMMITTING, event)
        incarnation = handover.incarnation_after(event, known.incarnation)
        write_down(self._host, machine, replace(known, ownership=ownership, incarnation=incarnation))
        if machine is not None and ownership is Ownership.OWNER:
            with suppress(ClosedError):
                machine.end()

    def end(self) -> None:
        """Do not wait any longer; the next daemon goes on asking."""
        self.handover.end()
        self._thread.join()
