"""The outgoing story: how a machine leaves this host.

Read it from top to bottom: `run` is the table of contents, and the phases below it stand in the order in which they
happen. Everything before COMMIT can be undone, and `_abort` undoes it: the machine then runs here as if nothing had
happened. What is behind COMMIT cannot, and only the destination's word leads past it (source/handover.py).
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import grpc
import structlog
from switchover.v1 import host_pb2, migration_pb2, migration_pb2_grpc

from common import hooks
from common.host.host import Host
from common.ipc.channel import ClosedError, RequestError
from common.logs import enter_session
from common.machine.attachments import without_attachments
from common.machine.client import Rest
from common.machine.config import to_json
from common.machine.device import DEFERRED_BYTES
from common.machine.record import Ownership
from common.memory import runs
from common.memory.packed import PackedBitmap, union
from common.rpc import versions
from common.rpc.channel import open_bulk_channel, open_channel
from common.rpc.errors import PeerError, peer_error
from source import handover, lane_kinds
from source.account import Account
from source.calls import Calls
from source.clock import guest_gap_ms, measure
from source.commit import Handover, ResolvedError, RevokedError, write_down
from source.counterparts import check_counterparts
from source.failures import CancelledError, NotConvergedError, explain
from source.history import History
from source.lane_stats import LaneStats
from source.limiter import Limiter
from source.policy import Action, Limits, RoundFacts, decide
from source.reconnect import Link
from source.state_streams import DeviceStream
from source.streams import Streams
from source.verdict import DataLossError
from source.verifier import Verifier

__all__ = ["Migration"]

CALL_SECONDS = 20.0
# Prepare touches all RAM, Finish loads all devices, Verify reads all RAM.
LONG_CALL_SECONDS, LONG_CALL_SECONDS_PER_GIB = 120.0, 2.0
WAIT_SECONDS = 0.02

OWNERS = {Ownership.OWNER: "source", Ownership.COMMITTING: "undecided", Ownership.GONE: "destination"}

_log = structlog.get_logger()
Verify = migration_pb2.VerifyMode


class Migration:
    """One attempt to move the machine. `run` is called once; `cancel` at any time, from any thread."""

    def __init__(self, host: Host, request: host_pb2.MigrateRequest, session_id: str) -> None:
        """Take a request whose defaults are filled in (`source.service`)."""
        assert host.machine is not None
        self.session_id = session_id
        self._host = host
        self._request = request
        self._address = request.destination
        self._limits = Limits(
            max_downtime_s=request.max_downtime_ms / 1000,
            timeout_s=request.timeout_s or None,
            max_rounds=request.max_rounds or None,
            switch_over_at_limit=request.on_timeout == host_pb2.ON_TIMEOUT_SWITCH_OVER,
            auto_converge=request.auto_converge,
        )
        self._limiter = Limiter(request.bandwidth_limit or None)
        self._history = History()
        self._ownership = Ownership.OWNER
        self._pool = ThreadPoolExecutor(
            max_workers=32, thread_name_prefix="migration", initializer=enter_session, initargs=(session_id,)
        )
        self._open_streams: Streams | None = None
        self._verifier: Verifier | None = None
        self._held = ExitStack()
        self._prepared = False
        self._machine = host.machine.another()
        self._channel = open_channel(self._address, host.security.channel)
        self._stub = migration_pb2_grpc.MigrationServiceStub(self._channel)
        self._account = Account(host.events, session_id, request, self._tell_progress)
        self._link = Link(self._stub, session_id, self._account.say, self._lost)
        self._calls = Calls(self._link, lambda: self._ownership is Ownership.OWNER)
        record = host.record()
        assert record is not None
        self._incarnation = record.incarnation + 1
        self.handover = Handover(self._stub, session_id, self._incarnation, self._account.say)

    def _tell_progress(self, progress: host_pb2.Progress) -> None:
        progress.reconnects = self._link.reconnects
        progress.disconnected_ms = self._link.lost_s * 1000
        streams = self._open_streams
        if streams is not None:
            streams.tell(progress)

    def _lost(self, failure: Exception) -> None:
        """Let nobody wait for a connection that is gone."""
        if self._open_streams is not None:
            self._open_streams.interrupt(failure)

    def cancel(self, why: str = "cancelled by the operator") -> None:
        """End the migration; without effect once COMMIT may have been sent."""
        self._end(CancelledError(why))

    def _end(self, failure: Exception) -> None:
        if self._calls.end(failure):
            self._interrupt(failure)

    def _interrupt(self, failure: Exception) -> None:
        """Let whoever sends or waits for the destination fail."""
        self._limiter.lift()
        self._link.interrupt(failure)
        self._calls.interrupt()
        if self._open_streams is not None:
            self._open_streams.interrupt(failure)

    def abandon(self) -> None:
        """Do not wait any longer for a destination that does not answer: this daemon ends."""
        self.cancel("the daemon was told to end")
        self.handover.end()

    def run(self) -> None:
        """Move the machine. Whatever fails, somebody owns it at the end, and the result says what happened."""
        enter_session(self.session_id)
        self._account.begin()
        _log.info("migration", destination=self._address)
        try:
            with self._deadline():
                self._setup()
                self._precopy()
            self._switchover()
            self._handover()
            self._after()
        except Exception as error:  # noqa: BLE001  # every failure ends in a result, and in an owner
            self._fail(error)
        finally:
            self._close()

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """End what outlasts the time limit; whether it was reached between rounds of pre-copy the policy sees."""
        limit = self._limits.timeout_s
        if limit is None or self._limits.switch_over_at_limit:
            yield
            return
        timer = threading.Timer(limit - self._account.elapsed(), self._time_is_up, (limit,))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _time_is_up(self, limit: float) -> None:
        if not self._account.precopy_began:
            self._end(NotConvergedError(f"setup was not done in {limit:g} s; it needs more time"))
            return
        if self._link.lost_s:
            self._end(NotConvergedError(f"not converged in {limit:g} s, and the connection was lost"))
            return
        self._end(
            NotConvergedError(
                f"not converged in {limit:g} s, and a round of pre-copy was under way; it would converge with more "
                "time or a faster link"
            )
        )

    # setup: the destination builds an empty machine; tracking starts.

    def _setup(self) -> None:
        self._account.phase("setup")
        hooks.reach("source.setup")
        machine = self._machine
        spec = machine.spec()
        self._has_clock = spec.has_clock
        self._running = machine.begin(self.session_id)
        self._account.result.paused = not self._running
        self._ram = self._held.enter_context(machine.ram(writable=False))
        self._long_call_s = LONG_CALL_SECONDS + self._ram.size / (1 << 30) * LONG_CALL_SECONDS_PER_GIB
        devices = machine.devices()
        self._account.moves(spec.uuid or "", self._ram.size, devices)
        if self._request.verify != Verify.VERIFY_MODE_OFF:
            self._verifier = Verifier(self._ram, machine, self._pool)
        data_first, data_pages = self._ram.data_runs()
        mapping = self._pool.submit(self._ram.map_data, (data_first, data_pages))
        self._held.callback(lambda: mapping.cancelled() or mapping.exception())  # before RAM is let go
        prepared = self._calls.ask_once(
            self._stub.Prepare,
            migration_pb2.PrepareRequest(
                session_id=self.session_id,
                protocol_version=versions.LOWEST,
                highest_protocol_version=versions.HIGHEST,
                features=sorted(versions.FEATURES),
                machine_uuid=spec.uuid or "",
                incarnation=self._incarnation,
                machine_json=to_json(without_attachments(spec)),
                data_first=data_first.tolist(),
                data_pages=data_pages.tolist(),
                lanes=self._request.lanes,
                verify=self._request.verify,
                lane_kind=self._request.lane_kind,
                reconnect_s=self._request.reconnect_s,
            ),
            self._long_call_s,
        )
        self._prepared = True
        self._agree(prepared)
        check_counterparts(devices, prepared.devices)
        mapping.result()
        self._calls.check()
        self._account.tracks(machine.start_tracking())
        machine.enter_precopy()
        open_bulk = partial(open_bulk_channel, self._address, self._host.security.channel)
        self._open_streams = Streams(
            self._stub,
            open_bulk,
            lane_kinds.opener(open_bulk, self.session_id, self._request, self._host.security, self._limiter),
            self._link,
            self.session_id,
            self._request,
            prepared.features,
            machine,
            self._ram,
            devices,
            {device.name: device.migration_flags for device in prepared.devices},
            self._limiter,
            self._account.meter.applied,
        )
        self._calls.check()
        self._send_mappings()

    def _agree(self, prepared: migration_pb2.PrepareResponse) -> None:
        """Take what the destination has chosen of what it was offered; refuse anything else."""
        version = prepared.protocol_version
        unknown = set(prepared.features) - versions.FEATURES
        if not versions.LOWEST <= version <= versions.HIGHEST or unknown:
            chosen = f"protocol {version}" if not unknown else f"features {', '.join(sorted(unknown))}"
            raise PeerError(
                "PROTOCOL_VERSION",
                f"has chosen {chosen}, which it was not offered",
                grpc.StatusCode.FAILED_PRECONDITION,
            )
        _log.info("agreed", protocol=version, features=sorted(prepared.features))
        begins = migration_pb2.ReconnectResponse(
            lanes=[migration_pb2.SendPagesResponse()] * self._request.lanes,
            lane_port=prepared.lane_port,
            lane_tokens=prepared.lane_tokens,
        )
        asked = self._request.reconnect_s if versions.RECONNECT in prepared.features else 0.0
        patience = min(asked, prepared.reconnect_s) if prepared.HasField("reconnect_s") else asked
        if patience < asked:
            self._account.say(f"a lost connection is waited for up to {patience:g} s: the destination allows no more")
        self._link.open(begins, patience)

    @property
    def _streams(self) -> Streams:
        assert self._open_streams is not None
        return self._open_streams

    # precopy: round 0 sends all of RAM, each later one what was dirtied meanwhile; devices send what they can.

    def _precopy(self) -> None:
        self._account.phase("precopy")
        hooks.reach("source.precopy")
        self._account.precopy_begins()
        for stream in self._streams.devices:
            stream.start()
        # Whatever was sent to whom before: of what is in RAM, this destination has nothing.
        unsent = hooks.guarded("second-hop") and hooks.guarded("failed-then-retry")
        pages = runs.one(0, self._ram.layout.pages if unsent else 0)
        number, hopeless = 0, False
        while True:
            stats = self._send_round(number, pages)
            self._send_mappings()
            # The devices first: what the guest writes between this and a pause is sent in the blackout.
            device_bytes = sum(stream.remaining() for stream in self._streams.devices)
            self._dirty = self._sync(number)
            facts = self._look(number, stats, device_bytes)
            decision = decide(self._account.facts, self._limits)
            self._account.round_decided(facts, stats, self._streams.compression, decision)
            self._calls.check()
            if decision.hopeless and not hopeless:
                self._account.say(decision.reason)
            hopeless = hopeless or decision.hopeless
            if decision.action is Action.SWITCH_OVER:
                return
            if decision.action is Action.GIVE_UP:
                raise NotConvergedError(decision.reason)
            if decision.action is Action.THROTTLE:
                self._machine.throttle(decision.throttle_percent)
            elif not facts.dirty_bytes:
                self._calls.ending.wait(WAIT_SECONDS)
            number += 1
            pages = self._dirty.runs()
            self._history.sent(number, self._dirty)

    def _send_round(self, number: int, pages: runs.Runs) -> LaneStats:
        hooks.reach(f"source.round{number}")
        self._account.round_begins(number, runs.total(pages))
        began, without_s = time.monotonic(), self._link.without_s
        stats = self._streams.lanes.send(pages, self._ram.data_runs(pages), number)
        self._account.round_sent(stats, time.monotonic() - began - (self._link.without_s - without_s))
        self._host.metrics.sent(stats.pages, stats.sent_bytes)
        return stats

    def _send_mappings(self) -> None:
        self._streams.mappings.send(self._machine.mapping_changes())

    def _sync(self, number: int) -> PackedBitmap:
        """Collect what was dirtied, and remember who said so."""
        hooks.reach(f"source.sync{number}")
        report = self._machine.sync()
        for source, packed in report.sources.items():
            self._history.reported(number, source, packed)
            pages = packed.count()
            self._account.reported(source, pages)
            self._host.metrics.dirty(source, pages)
        return report.union()

    def _look(self, number: int, stats: LaneStats, device_bytes: int) -> RoundFacts:
        # Its operator may have paused or resumed it.
        self._running = self._machine.running()
        return self._account.look(
            number,
            stats,
            dirty_pages=self._dirty.count(),
            device_bytes=device_bytes,
            initial_data_loaded=not (self._running and hooks.guarded("switchover-ack"))
            or all(stream.initial_data_loaded for stream in self._streams.devices),
        )

    # switchover: the machine stands still, and all that is left of it goes over.

    def _switchover(self) -> None:
        self._streams.end_precopy()
        # Now, and not in setup: two clocks drift apart by a downtime in an hour or so.
        self._clock = measure(
            lambda: self._calls.ask(self._stub.ReadClock, migration_pb2.ReadClockRequest(), CALL_SECONDS).monotonic_ns
        )
        self._send_mappings()
        self._account.phase("switchover")
        hooks.reach("source.switchover")
        self._stopped_at = time.monotonic()
        self._link.wait_no_longer_than(self._stopped_at + self._limits.max_downtime_s)
        with self._account.downtime("pause"):
            self._running = self._machine.pause_vcpus()
            # Nobody maps or unmaps any more. These go over while the devices stop.
            changes = self._machine.mapping_changes()
            last_mappings = self._pool.submit(self._streams.mappings.send, changes)
        hooks.reach("source.paused")
        with self._account.downtime("quiesce"):
            rest = self._machine.stop_devices()
        hooks.reach("source.stopped")
        devices = self._streams.devices
        together = [[stream] for stream in devices] if hooks.guarded("parallel-device-streams") else [devices]
        last_bytes = [self._pool.submit(_stop_copies, streams) for streams in together]
        if self._verifier is not None and self._request.verify == Verify.VERIFY_MODE_STRICT:
            self._verifier.start_reading()
        number = len(self._account.facts)
        with self._account.downtime("last_sync"):
            before = [self._dirty] if hooks.guarded("missed-dirty") else []
            last = union([self._sync(number - 1), *before], self._ram.layout.pages)
        with self._account.downtime("last_ram"):
            self._history.sent(number, last)
            stats = self._send_round(number, last.runs())
            self._account.result.ram.downtime_bytes = stats.sent_bytes
        with self._account.downtime("devices"):
            for sent in (*last_bytes, last_mappings):
                sent.result()
            self._finish(rest)
        if self._verifier is not None and self._request.verify == Verify.VERIFY_MODE_STRICT:
            with self._account.downtime("verification"):
                self._compare(self._verifier)

    def _finish(self, rest: Rest) -> None:
        self._account.moved(self._streams.devices, rest.devices)
        # The guest's clock goes on where it stopped, on a host whose own clock counts from another moment.
        rest.vcpu["clock_offset_ns"] -= self._clock.offset_ns
        request = self._streams.finish_request(self.session_id, rest, paused=not self._running)
        self._calls.ask(self._stub.Finish, request, self._long_call_s)

    def _compare(self, verifier: Verifier) -> None:
        hooks.reach("source.comparing")
        for stream in self._streams.devices:
            stream.leave_stop_copy()
        strict = self._request.verify == Verify.VERIFY_MODE_STRICT
        request = verifier.read(self.session_id, None if strict else DEFERRED_BYTES)
        response = self._calls.ask(self._stub.Verify, request, self._long_call_s)
        verifier.judge(response, self._history, self._account.result)

    # handover: the record first, then COMMIT, and from then on only the destination's word counts.

    def _handover(self) -> None:
        self._account.phase("handover")
        hooks.reach("source.handover")
        self._calls.check()
        began = time.monotonic()
        self._decide(handover.Event.BEGIN)
        hooks.reach("source.committing")
        event, start_ms = self.handover.commit()
        now = time.monotonic()
        self._decide(event)
        self.handover.recorded()
        match event:
            case handover.Event.REVOKED:
                because = f": {self.handover.refusal}" if self.handover.refusal else ""
                raise RevokedError(f"the destination did not commit{because}; the machine goes on here")
            case handover.Event.DECLARED_HERE | handover.Event.DECLARED_THERE:
                raise ResolvedError(f"an operator has declared that the {OWNERS[self._ownership]} owns the machine")
        result = self._account.result
        result.downtime.start = start_ms
        result.downtime.handover = (now - began) * 1000 - start_ms
        result.downtime_ms = (now - self._stopped_at) * 1000
        result.total_ms = (now - self._account.started_at) * 1000
        self.handover.wait_until_started()
        self._account.say(f"the machine is at {self._address}")

    def _decide(self, event: handover.Event) -> None:
        state = handover.after(self._ownership, event)
        known = self._host.record()
        assert known is not None
        decided = replace(
            known,
            ownership=state,
            session_id=self.session_id,
            peer=self._address,
            incarnation=handover.incarnation_after(event, self._incarnation - 1),
            judged=self._request.verify != Verify.VERIFY_MODE_DEFERRED,
        )
        write_down(self._host, self._machine, decided)
        self._ownership = state
        self._account.result.owner = OWNERS[state]

    # done: the verdict, then the machine's copy here is let go.

    def _after(self) -> None:
        if self._verifier is not None:
            if self._request.verify == Verify.VERIFY_MODE_DEFERRED:
                self._verifier.start_reading()
                self._compare(self._verifier)
            self._verifier.check_unchanged()
        result = self._account.result
        result.mappings = self._streams.mappings.mappings
        if self._running and self._has_clock:
            result.guest_gap_ms = guest_gap_ms(self._stub, self.session_id)
        result.guest_gap_error_ms = self._clock.error_ns / 1e6
        result.result = "completed"
        self._close_streams(abort=False)
        self._host.release(Ownership.RELEASED)
        self._account.phase("done")

    # When it does not go well.

    def _fail(self, error: Exception) -> None:
        result = self._account.result
        # After REVOKED, or if an operator has said so, this host is the owner again.
        before_commit = self._ownership is Ownership.OWNER
        if before_commit and self._calls.ended_by is not None:
            error = self._calls.ended_by
        result.result = "cancelled" if isinstance(error, CancelledError) else "failed"
        if before_commit or isinstance(error, DataLossError):
            result.verified = "false"
        result.total_ms = result.total_ms or self._account.elapsed() * 1000
        if self._open_streams is not None:
            self._account.sent(self._open_streams.sent)
        result.reason, result.error = explain(error, self._address)
        if result.reason == "INTERNAL":
            _log.error("migration failed", exc_info=error)
        if before_commit:
            self._abort(result.error)
        elif isinstance(error, DataLossError) and not self._request.continue_on_mismatch:
            self._halt(result.error)

    def _abort(self, why: str) -> None:
        """Undo everything: afterwards the machine runs here as if nothing had happened."""
        self._account.phase("abort")
        # The guest first: without COMMIT the destination cannot start the machine, so nothing has to be waited for.
        self._interrupt(ConnectionError(why))
        if self._open_streams is not None:
            self._open_streams.stop_reading()
        try:
            self._machine.end()
        except (ClosedError, RequestError) as error:
            _log.error("the machine did not take the end of the migration", message=str(error))
        self._close_streams(abort=True)
        # A cancelled Prepare may be under way there.
        if self._prepared or self._calls.ended_by is not None:
            try:
                self._stub.Abort(
                    migration_pb2.AbortRequest(session_id=self.session_id, reason=why), timeout=CALL_SECONDS
                )
            except grpc.RpcError as error:
                _log.warning("the destination could not be told", message=str(peer_error(error)))

    def _halt(self, why: str) -> None:
        """Pause a machine that runs at the destination with memory that differs; its copy here is kept."""
        request = migration_pb2.HaltRequest(session_id=self.session_id, reason=why)
        try:
            self._stub.Halt(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            _log.error("the machine could not be paused at the destination", message=str(peer_error(error)))
        else:
            self._account.say(f"the machine is paused at {self._address}; its copy here is kept")

    def _close_streams(self, *, abort: bool) -> None:
        streams, self._open_streams = self._open_streams, None
        if streams is not None:
            streams.close(abort=abort)

    def _close(self) -> None:
        self._close_streams(abort=True)
        if self._verifier is not None:
            self._verifier.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._link.close()
        self._calls.close()
        gc.collect()  # a failure knows the frames that it came through, and they know views that would keep RAM mapped
        self._held.close()
        self._channel.close()
        self._machine.close()
        result = self._account.result
        result.reconnects = self._link.reconnects
        result.disconnected_ms = self._link.without_s * 1000
        self._host.metrics.ended(result)
        _log.info("migration ended", result=result.result, owner=result.owner, reason=result.reason, error=result.error)
        self._account.close()


def _stop_copies(streams: Sequence[DeviceStream]) -> None:
    for stream in streams:
        stream.stop_copy()
