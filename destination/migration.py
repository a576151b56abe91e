"""The incoming story: how a machine arrives at this host.

Read it from top to bottom: `prepare`, then what arrives side by side (pages, device records, mappings), `finish`,
`verify`, `commit`; `revoke` instead of `commit` at any time before it. The source drives: each of these is a call of
its own, and `after` (destination/handover.py) says which may follow which.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import grpc
import structlog
from switchover.v1 import migration_pb2

from common import hooks
from common.host.host import Host
from common.host.ownership import COMMITTED, REVOKED
from common.ipc.channel import ClosedError, RequestError
from common.logs import enter_session
from common.machine.client import MachineClient
from common.machine.launch import launch
from common.machine.record import Ownership
from common.memory.layout import PAGE_SIZE
from common.memory.pages import Applier, PageBatch, Receive
from common.rpc.errors import RefusalError
from common.rpc.lane_frame import pack_refusal
from common.rpc.lane_socket import LaneSocket
from destination import handover
from destination.handover import Event
from destination.lane_port import LanePort
from destination.lanes import Lanes
from destination.loading import Loading, check_whole
from destination.readback import ReadBack
from destination.refusal import bad
from destination.request import changes, check_memory, describe, find_devices, rest
from destination.streams import OLD_GENERATION, OpenStreams
from destination.tcp_lane import receive_batches

__all__ = ["Arrival"]

IDLE_SECONDS = 30.0
# The guest's clock ticks as soon as it runs, on a host that has the time for it.
GAP_PAUSE_SECONDS, MAX_GAP_PAUSE_SECONDS = 0.005, 0.25
WATCH_SECONDS = 1.0
STREAM_SECONDS = 5.0
# So long a source may read its RAM before it asks for the deferred verdict.
VERDICT_SECONDS, VERDICT_SECONDS_PER_GIB = 120.0, 2.0
# That a source may notice later than we do that the network is gone: it begins to wait only then.
NOTICE_SECONDS = 10.0

_log = structlog.get_logger()
Kind = migration_pb2.DeviceStateKind
Verify = migration_pb2.VerifyMode


class Arrival:
    """One machine on its way to this host. Calls come from gRPC's threads; `_decision` orders those that decide."""

    def __init__(
        self,
        host: Host,
        request: migration_pb2.PrepareRequest,
        lane_listen: tuple[str, int],
        reconnect_s: float,
    ) -> None:
        """`lane_listen`: host and port that TCP lanes come to, if they are asked for.

        `reconnect_s`: for how many seconds the session waits for its source when streams have broken; 0: not at all.
        """
        self.session_id = request.session_id
        self.machine_uuid = request.machine_uuid
        self.state: handover.State.ValueType = handover.PREPARING
        self._host = host
        self._incarnation = request.incarnation
        self._verify = request.verify or Verify.VERIFY_MODE_STRICT
        self._decision = threading.RLock()
        self._pool = ThreadPoolExecutor(
            max_workers=16, thread_name_prefix="arrival", initializer=enter_session, initargs=(request.session_id,)
        )
        self._lanes = Lanes(max(request.lanes, 1))
        self._lane_listen = lane_listen
        self._lane_port: LanePort | None = None
        self._mapping_sequence = 0
        self._streams = OpenStreams()
        self._reconnect_s = reconnect_s
        self._broken = False  # a stream of this generation is
        self._finishing = threading.Lock()
        self._finished: tuple[migration_pb2.FinishRequest, migration_pb2.FinishResponse] | None = None
        self._prepared = False
        self._active_at = time.monotonic()
        self._held = ExitStack()
        self._readback: ReadBack | None = None
        self._machine: MachineClient | None = None
        self._devices: dict[str, Loading] = {}
        self._paused = self._has_clock = False
        self._revoked_for = ""
        self._refused_with = "WRONG_STATE"
        self.failure = ""
        self.guest_gap_us: int | None = None

    # setup

    def prepare(self, request: migration_pb2.PrepareRequest) -> migration_pb2.PrepareResponse:
        """Build the machine: empty RAM, already touched where data will come, and devices in RESUMING.

        A session that is revoked meanwhile is only that: what is built is taken down here.
        """
        try:
            prepared = self._build(request)
        except BaseException as error:
            try:
                self._revoke(f"it could not be prepared: {error}")
            finally:
                self._end()
            raise
        with self._decision:
            self._prepared = True
            revoked = self.state != handover.PREPARING
        if revoked:
            self._end()
        self._expect(handover.PREPARING)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return prepared

    def _build(self, request: migration_pb2.PrepareRequest) -> migration_pb2.PrepareResponse:
        _log.info("arrival", machine=request.machine_uuid, incarnation=request.incarnation)
        spec = find_devices(describe(request), self._host)
        self._has_clock = spec.has_clock
        check_memory(sum(request.data_pages) * PAGE_SIZE)
        directory = self._host.run_directory(self.session_id)
        try:
            machine = launch(spec, directory, self._host.record_path, incarnation=request.incarnation, incoming=True)
        except OSError as error:
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "CANNOT_BUILD", str(error)) from error
        self._machine = machine
        machine.begin(self.session_id)
        hooks.reach("destination.preparing")
        self._host.tell_states(machine)
        self._ram = self._held.enter_context(machine.ram(writable=True))
        for first, count in zip(request.data_first, request.data_pages, strict=True):
            self._ram.populate(first, count)
        self._lanes.applier = applier = Applier(self._ram)
        self._readback = ReadBack(self._verify, self._ram, applier, machine, self._pool)
        machine.enter_resuming()
        self._devices = {device.name: Loading(device.has_precopy) for device in machine.devices()}
        self._readback.wait_until_ready()
        if request.lane_kind == migration_pb2.LANE_KIND_TCP:
            self._lane_port = self._listen()
        return migration_pb2.PrepareResponse(
            devices=[
                migration_pb2.PreparedDevice(
                    name=device.name,
                    migration_flags=device.migration_flags,
                    comparable_dump=device.comparable_dump,
                    bar_sizes=device.bar_sizes,
                )
                for device in machine.devices()
            ],
            lane_port=self._lane_port.port if self._lane_port is not None else 0,
            lane_tokens=self._lane_port.tokens if self._lane_port is not None else (),
        )

    def _listen(self) -> LanePort:
        lanes = len(self._lanes.sequences)
        try:
            return LanePort(*self._lane_listen, self._host.security.lane_server, lanes, self.serve_lane)
        except OSError as error:
            where = "port {1} of {0}".format(*self._lane_listen)
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION, "CANNOT_LISTEN", f"page lanes: {where}: {error.strerror}"
            ) from error

    # precopy and switchover: three kinds of streams, side by side

    def apply_pages(self, lane: int, batches: Iterator[PageBatch]) -> Iterator[migration_pb2.SendPagesResponse]:
        """Write one gRPC lane's pages to RAM; acknowledge what is there where the source waits for it."""
        for batch in batches:
            self._apply_batch(lane, batch)
            if not batch.more:
                yield migration_pb2.SendPagesResponse(applied_sequence=batch.sequence)

    def serve_lane(self, generation: int, lane: int, connection: LaneSocket) -> None:
        """The same for a TCP lane, to its end; what it is refused for it is told."""
        enter_session(self.session_id)
        try:
            with self.streaming(f"lane {lane}", generation, connection.shutdown):
                receive_batches(connection, partial(self._apply_batch, lane))
        except RefusalError as refusal:
            with suppress(OSError):
                connection.send([pack_refusal(refusal.reason, str(refusal))])

    def _apply_batch(self, lane: int, batch: PageBatch, receive: Receive | None = None) -> None:
        hooks.reach(f"destination.apply{self._streams.generation}")
        self._expect(handover.PREPARING)
        self._lanes.apply(lane, batch, receive)
        self._host.metrics.received(batch.pages, batch.payload_bytes)

    def apply_device_state(
        self, name: str, records: Iterator[migration_pb2.SendDeviceStateRequest]
    ) -> Iterator[migration_pb2.SendDeviceStateResponse]:
        """Give one device its data; acknowledge each record once the device has taken it."""
        loading = self._devices.get(name)
        if loading is None:
            raise bad(f"there is no device {name}")
        assert self._machine is not None
        machine = self._machine.another()
        try:
            for record in records:
                self._expect(handover.PREPARING)
                loading.check(name, record)
                if record.kind == Kind.DEVICE_STATE_KIND_INIT_DATA_SENT:
                    hooks.reach("destination.initial_data")
                if record.data:
                    machine.write_device(name, record.data)
                elif record.kind == Kind.DEVICE_STATE_KIND_RESTART:
                    machine.restart_device(name)
                loading.applied(record)
                yield loading.ack()
        finally:
            machine.close()

    def apply_mappings(
        self, batches: Iterator[migration_pb2.SendMappingsRequest]
    ) -> Iterator[migration_pb2.SendMappingsResponse]:
        """Change the mappings in vIOMMU and devices."""
        assert self._machine is not None
        machine = self._machine.another()
        try:
            for batch in batches:
                self._expect(handover.PREPARING)
                if batch.sequence != self._mapping_sequence + 1:
                    raise bad(f"mappings: batch {batch.sequence} after {self._mapping_sequence}")
                machine.change_mappings(changes(batch))
                self._mapping_sequence = batch.sequence
                yield migration_pb2.SendMappingsResponse(applied_sequence=batch.sequence)
        finally:
            machine.close()

    def reconnect(self, request: migration_pb2.ReconnectRequest) -> migration_pb2.ReconnectResponse:
        """Begin a new generation of streams, and say what the ones before have applied: none of them ever does more."""
        if not self._reconnect_s:
            raise bad("the session was not prepared for this")
        self._expect(handover.PREPARING, handover.READY)
        _log.info("source is back", generation=request.generation)
        self._streams.begin(request.generation)
        return migration_pb2.ReconnectResponse(
            lanes=[migration_pb2.SendPagesResponse(applied_sequence=number) for number in self._lanes.sequences],
            devices={name: loading.ack() for name, loading in self._devices.items()},
            mappings=migration_pb2.SendMappingsResponse(applied_sequence=self._mapping_sequence),
            lane_port=self._lane_port.port if self._lane_port is not None else 0,
            lane_tokens=self._lane_port.renew(request.generation) if self._lane_port is not None else (),
        )

    # the end of the switchover

    def finish(self, request: migration_pb2.FinishRequest) -> migration_pb2.FinishResponse:
        """Check that all has arrived, load the rest, take the devices out of RESUMING: they validate their state.

        The same request again is answered as it was, for the answer may have been lost.
        """
        with self._finishing:
            if self.state != handover.READY or self._finished is None or self._finished[0] != request:
                self._finished = request, self._finish(request)
            return self._finished[1]

    def _finish(self, request: migration_pb2.FinishRequest) -> migration_pb2.FinishResponse:
        began = time.monotonic()
        self._expect(handover.PREPARING)
        vcpu, configs = rest(request, self._devices, len(self._lanes.sequences))
        self._check_complete(request)
        self._run = vcpu["runs"] + 1
        assert self._machine is not None
        assert self._readback is not None
        self._paused = request.paused
        self._readback.before_loading()
        hooks.reach("destination.finish")
        try:
            self._machine.load(vcpu, configs, paused=request.paused)
            self._readback.after_loading()
        except BaseException as error:
            # A device that has refused its state is reset. Asked once more, it would seem to have taken it.
            self.lose(f"it could not be loaded: {error}", "CANNOT_LOAD")
            raise
        with self._decision:
            self._expect(handover.PREPARING)
            self.state = handover.after(self.state, Event.LOADED)
        return migration_pb2.FinishResponse(load_us=int((time.monotonic() - began) * 1e6))

    def _check_complete(self, request: migration_pb2.FinishRequest) -> None:
        if list(request.lane_sequences) != self._lanes.sequences:
            raise bad("not all page batches have arrived")
        if request.mapping_sequence != self._mapping_sequence:
            raise bad("not all mapping changes have arrived")
        check_whole(self._devices, request.devices)

    def verify(self, request: migration_pb2.VerifyRequest) -> migration_pb2.VerifyResponse:
        """Compare with what is read back from RAM and devices: now (strict), or as read before the start (deferred)."""
        with self._finishing:  # two that read one device at once would read neither right
            if self._verify == Verify.VERIFY_MODE_STRICT:
                self._expect(handover.READY)
            self._active_at = time.monotonic()
            if self._readback is None:
                raise bad("the session is not prepared yet")
            compared = self._readback.compare(request)
            if self._verify == Verify.VERIFY_MODE_DEFERRED:
                self._let_go()
            return compared

    # handover: each decision is on disk before anyone acts on it

    def commit(self, request: migration_pb2.CommitRequest) -> migration_pb2.CommitResponse:
        """Become the owner, and start the machine."""
        with self._decision:
            if request.incarnation != self._incarnation:
                raise RefusalError(
                    grpc.StatusCode.FAILED_PRECONDITION, "WRONG_INCARNATION", "COMMIT names another incarnation"
                )
            try:
                state = handover.after(self.state, Event.COMMIT)
            except ValueError as error:
                raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "NOT_READY", str(error)) from error
            assert self._machine is not None
            if state != self.state:
                assert self._readback is not None
                try:
                    self._readback.wait_until_read()
                    self._record(Ownership.COMMITTED)
                except RequestError as error:
                    raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "NOT_READY", str(error)) from error
                self.state = state
                hooks.reach("destination.committed")
            if self.state != handover.COMMITTED:
                return migration_pb2.CommitResponse(state=self.state)
            began = time.monotonic()
            try:
                self._start()
            except (ClosedError, RequestError, OSError) as error:
                # It is ours, and it does not run. If it has not begun to start, the next COMMIT begins again, unless
                # nothing is left of it: then it is its source's. Else the source keeps its copy, and it is for an
                # operator to decide.
                if self.state == handover.STARTING:
                    self.failure = str(error)
                    self._host.end_migration()
                elif self._machine.has_ended():
                    self._give_back()
                raise RefusalError(grpc.StatusCode.ABORTED, "NOT_STARTED", str(error)) from error
            start_us = int((time.monotonic() - began) * 1e6)
        self._host.metrics.arrived("committed")
        _log.info("arrival committed", start_ms=start_us / 1000)
        self._pool.submit(self._settle_in)
        return migration_pb2.CommitResponse(state=self.state, start_us=start_us)

    def _start(self) -> None:
        assert self._machine is not None
        self._host.adopt(self._machine)
        self._record(Ownership.STARTING)
        self.state = handover.after(self.state, Event.START)
        self._machine.take_over()
        self.state = handover.after(self.state, Event.STARTED)

    def _give_back(self) -> None:
        self._host.give_back(self.session_id)
        self._revoked_for = "the machine process has ended before it was started"
        self.state = handover.after(self.state, Event.LOST)
        self.close()
        self._host.end_migration()

    def _record(self, ownership: Ownership) -> None:
        assert self._machine is not None
        self._machine.record(ownership, session_id=self.session_id, incarnation=self._incarnation)

    def _settle_in(self) -> None:
        """After the start, off the clock: the machine is ours for good; its guest tells how long it stood still."""
        assert self._machine is not None
        try:
            self._host.decide(self.session_id, COMMITTED)
            self._record(Ownership.OWNER)
            if self._lane_port is not None:
                self._lane_port.close()
            if self._verify != Verify.VERIFY_MODE_DEFERRED:
                self._let_go()
        except (ClosedError, RequestError, OSError) as error:
            # It runs and is ours as the record says already; the next start of this daemon makes up for it.
            _log.error("arrival not settled", message=str(error))
        finally:
            self._host.end_migration()
        self._host.events.publish(self.session_id, machine_state="paused" if self._paused else "running")
        deadline, pause = time.monotonic() + IDLE_SECONDS, GAP_PAUSE_SECONDS
        while self._has_clock and not self._paused and self.guest_gap_us is None and time.monotonic() < deadline:
            try:
                self.guest_gap_us = self._machine.guest_gap_us(self._run)
            except (ClosedError, RequestError):
                return
            time.sleep(pause)
            pause = min(2 * pause, MAX_GAP_PAUSE_SECONDS)

    def revoke(self, why: str, reason: str = "WRONG_STATE") -> None:
        """Decide that the machine will not run here; without effect if that was decided already.

        Raise ValueError if it was committed.
        """
        if self._revoke(why, reason):
            self._end()

    def _revoke(self, why: str, reason: str = "WRONG_STATE") -> bool:
        """Decide it; return whether there is something to take down now, and by nobody else."""
        with self._decision:
            if self.state == handover.REVOKED:
                return False
            state = handover.after(self.state, Event.REVOKE)
            self._host.decide(self.session_id, REVOKED)
            self._revoked_for, self._refused_with = why, reason
            self.state = state
            prepared = self._prepared
        self._host.metrics.arrived("revoked")
        _log.info("arrival revoked", reason=why)
        return prepared

    def _end(self) -> None:
        try:
            self._take_down()
        finally:
            self._host.end_migration()
        # A source that means well ends its streams itself, and is not to take this for the failure.
        if self._streams:
            patience = threading.Timer(STREAM_SECONDS, self._streams.end)
            patience.daemon = True
            patience.start()

    def _take_down(self) -> None:
        self.close()
        if self._machine is not None:
            with suppress(RequestError):  # whatever it says: it ends with our connection
                self._machine.shutdown()
            self._host.remove_run_directory(self.session_id)

    def close(self) -> None:
        """Let go of everything."""
        if self._lane_port is not None:
            self._lane_port.close()
        self._pool.shutdown(wait=False)
        self._let_go()

    def _let_go(self) -> None:
        """Let go of RAM and of what read it back: nothing is applied or compared after this."""
        if self._readback is not None:
            self._readback.close()
        self._held.close()

    # what every call uses

    def _expect(self, *states: handover.State.ValueType) -> None:
        self._active_at = time.monotonic()
        if self.state == handover.PREPARING and not self._prepared:
            raise bad("the session is not prepared yet")
        if self.state not in states:
            name = handover.State.Name(self.state).removeprefix("SESSION_STATE_")
            why = f": {self._revoked_for}" if self._revoked_for else ""
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, self._refused_with, f"the session is {name}{why}")

    @property
    def is_streaming(self) -> bool:
        """Whether its source has a stream open."""
        return bool(self._streams)

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for its source: for its first streams, or since it has lost them."""
        first = bool(self._reconnect_s) and self._prepared and self.state == handover.PREPARING
        return (self._broken or first) and not self._streams

    @contextmanager
    def streaming(self, name: str, generation: int, end: Callable[[], object]) -> Iterator[None]:
        """Serve the one stream of that name in this block; one that is refused before COMMIT ends the session.

        `end` ends it from outside, should its source leave it open when the session has ended.
        """
        try:
            with self._streams.serving(name, generation, end):
                self._broken = False  # not before: the source may not have heard that it may come
                try:
                    self._expect(handover.PREPARING)
                    yield
                finally:
                    self._active_at = time.monotonic()
        except RefusalError as error:
            if error.reason != OLD_GENERATION:
                self.lose(str(error))
            raise
        except (ClosedError, RequestError, OSError) as error:
            if isinstance(error, ClosedError | RequestError):
                self.lose(str(error), "CANNOT_LOAD")
            else:
                self.broken(generation, str(error))
            # Whoever fails because the session has ended says why it has.
            why = self._revoked_for or str(error)
            raise RefusalError(grpc.StatusCode.ABORTED, "CANNOT_LOAD", why) from error

    def broken(self, generation: int, why: str) -> None:
        """Note that a stream has lost its source, which may come back if that was agreed."""
        if not self._reconnect_s:
            self.lose(why)
        elif (
            generation == self._streams.generation
            and not self._broken
            and self.state in (handover.PREPARING, handover.READY)
        ):
            _log.info("stream lost", generation=generation, reason=why, waits_s=self._reconnect_s)
            self._broken = True

    def lose(self, why: str, reason: str = "WRONG_STATE") -> None:
        """Revoke a session that cannot go on; after COMMIT it needs no source any more.

        `reason` is what whoever comes then is refused with: its source may hear of it from any of its streams first.
        """
        if self.state in (handover.PREPARING, handover.READY):
            try:
                self.revoke(why, reason)
            except ValueError:
                _log.info("stream lost after COMMIT", reason=why)
            except OSError as error:
                # Not on disk is not decided: `_watch` tries again.
                _log.error("arrival not revoked", message=str(error))

    def _watch(self) -> None:
        """Revoke a session that the source has forgotten: nothing is lost, for it is still the owner.

        After COMMIT let go of what is kept for a verdict that nobody asks for any more.
        """
        enter_session(self.session_id)
        assert self._readback is not None
        while self._readback.is_kept or self.state in (handover.PREPARING, handover.READY):
            time.sleep(WATCH_SECONDS)
            if self._streams or self._finishing.locked():
                self._active_at = time.monotonic()
            patience = self._reconnect_s + NOTICE_SECONDS if self._broken else IDLE_SECONDS
            if self.state not in (handover.PREPARING, handover.READY):
                patience = VERDICT_SECONDS + VERDICT_SECONDS_PER_GIB * self._ram.size / (1 << 30)
            if time.monotonic() - self._active_at <= patience:
                continue
            if self.state in (handover.PREPARING, handover.READY):
                self.lose("nothing was heard of the source")
            elif self.state == handover.RUNNING:
                _log.warning("memory is not compared: nothing was heard of the source")
                self._let_go()
