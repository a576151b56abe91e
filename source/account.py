"""What a migration tells of itself: progress while it runs, and the result at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import structlog
from switchover.v1 import host_pb2, migration_pb2

from common.host.events import Events
from common.machine.client import DeviceConfig, DeviceInfo, Tracking
from common.memory.layout import PAGE_SIZE
from source.lane_stats import LaneStats, total
from source.meter import Meter
from source.policy import Action, Decision, RoundFacts
from source.state_streams import DeviceStream

__all__ = ["Account"]

PROGRESS_SECONDS = 0.2

_log = structlog.get_logger()
Part = Literal["pause", "quiesce", "last_sync", "last_ram", "devices", "verification", "handover", "start"]


class Account:
    """Keeps the result as it comes about, and publishes progress several times a second from `begin` to `close`."""

    def __init__(
        self,
        events: Events,
        session_id: str,
        request: host_pb2.MigrateRequest,
        tell_progress: Callable[[host_pb2.Progress], None],
    ) -> None:
        """`tell_progress` fills in what the streams have sent so far."""
        self.meter = Meter()
        self._sent = LaneStats()
        self.facts: list[RoundFacts] = []
        self.throttle_percent = 0
        self.precopy_began = 0.0
        self.started_at = time.monotonic()
        self.result = host_pb2.MigrationResult(
            session_id=session_id,
            destination=request.destination,
            verify=migration_pb2.VerifyMode.Name(request.verify).removeprefix("VERIFY_MODE_").lower(),
            verified="false",
            lane_kind=migration_pb2.LaneKind.Name(request.lane_kind).removeprefix("LANE_KIND_").lower(),
            owner="source",
            guest_gap_ms=-1,
            max_downtime_ms=request.max_downtime_ms,
            expected_downtime_ms=-1,
        )
        self._events = events
        self._session_id = session_id
        self._tell_of_streams = tell_progress
        self._progress = host_pb2.Progress(expected_downtime_ms=-1, dirty_rate=-1)
        self._ended = threading.Event()
        self._teller = threading.Thread(target=self._tell_progress, name="progress", daemon=True)

    def begin(self) -> None:
        """Publish progress from now on; everybody is there who tells of it."""
        self._teller.start()

    def elapsed(self) -> float:
        """Return the seconds since the migration was accepted."""
        return time.monotonic() - self.started_at

    def phase(self, name: str) -> None:
        """Enter a phase: setup, precopy, switchover, handover, done, abort."""
        self._progress.phase = name
        _log.info("phase", phase=name)
        self._events.publish(self._session_id, phase=name)

    def say(self, message: str) -> None:
        """Publish a line."""
        _log.info("told", message=message, session=self._session_id)  # whose thread it is does not tell
        self._events.publish(self._session_id, message=message)

    def moves(self, machine_uuid: str, ram_bytes: int, devices: Sequence[DeviceInfo]) -> None:
        """Note what is moved."""
        self.result.machine_uuid = machine_uuid
        self.result.ram.bytes = ram_bytes
        self.result.devices.extend(
            host_pb2.DeviceResult(name=device.name, kind=device.kind, verified="not verified", notes=device.notes)
            for device in devices
        )

    def moved(self, streams: Sequence[DeviceStream], configs: Sequence[DeviceConfig]) -> None:
        """Note what it took to move the devices."""
        devices = {device.name: device for device in self.result.devices}
        for stream in streams:
            devices[stream.device.name].precopy_bytes = stream.precopy_bytes
            devices[stream.device.name].stop_copy_bytes = stream.stop_copy_bytes
        for config in configs:
            devices[config.name].pending_interrupts = len(config.pending.vectors)
            devices[config.name].pending_doorbells = len(config.pending.doorbells)

    def tracks(self, trackings: Sequence[Tracking]) -> None:
        """Note how DMA is tracked."""
        self.result.dirty_tracking.extend(
            host_pb2.TrackingResult(container=tracking.container, method=tracking.method, reason=tracking.reason)
            for tracking in trackings
        )

    def reported(self, source: str, pages: int) -> None:
        """Note that a collection found `pages` dirty pages in a container (or by the vCPUs, which is not noted)."""
        for tracking in self.result.dirty_tracking:
            if tracking.container == source:
                tracking.dirty_pages += pages

    def round_begins(self, number: int, pages: int) -> None:
        """Start to count a round's acks."""
        self._progress.round = number
        self._progress.round_pages = pages
        self.meter.round_begins()

    def round_sent(self, stats: LaneStats, seconds: float) -> None:
        """Note what a round has sent."""
        self.meter.round_done(seconds, stats.page_bytes)
        self._sent = total((self._sent, stats))
        self.result.ram.transferred_bytes = self._sent.sent_bytes
        self.result.ram.pages = self._sent.pages
        self._sent.tell(self.result.ram)

    def sent(self, stats: LaneStats) -> None:
        """Note what was sent in all, of a round too that does not come to its end."""
        ram = self.result.ram
        ram.transferred_bytes = max(ram.transferred_bytes, self.meter.total_bytes)
        ram.pages = stats.pages
        stats.tell(ram)

    def look(
        self, number: int, stats: LaneStats, *, dirty_pages: int, device_bytes: int, initial_data_loaded: bool
    ) -> RoundFacts:
        """Return what is known at the end of a round, and remember it."""
        elapsed = self.elapsed()
        since = self.facts[-1].elapsed_s if self.facts else self.precopy_began
        dirty_bytes = dirty_pages * PAGE_SIZE
        facts = RoundFacts(
            number=number,
            elapsed_s=elapsed,
            sent_bytes=stats.page_bytes,
            dirty_bytes=dirty_bytes,
            dirty_rate=dirty_bytes / (elapsed - since),
            device_bytes=device_bytes,
            bandwidth=self.meter.bandwidth,
            initial_data_loaded=initial_data_loaded,
            throttle_percent=self.throttle_percent,
        )
        self.facts.append(facts)
        return facts

    def round_decided(self, facts: RoundFacts, stats: LaneStats, compression: str, decision: Decision) -> None:
        """Note how a round ended, how pages are compressed now, and what follows."""
        began = self.facts[-2].elapsed_s if len(self.facts) > 1 else self.precopy_began
        self.result.rounds.append(
            host_pb2.Round(
                number=facts.number,
                pages=stats.pages,
                zero_pages=stats.zero_pages,
                sent_bytes=stats.sent_bytes,
                ms=(facts.elapsed_s - began) * 1000,
                dirty_pages=facts.dirty_bytes // PAGE_SIZE,
                throttle_percent=facts.throttle_percent,
                decision=decision.reason,
                unchanged_pages=stats.unchanged_pages,
                equal_pages=stats.equal_pages,
                delta_pages=stats.delta_pages,
                compressed_pages=stats.compressed_pages,
                compression=compression,
            )
        )
        expected = facts.expected_downtime_s
        self._progress.expected_downtime_ms = expected * 1000 if expected < float("inf") else -1
        if decision.action is Action.SWITCH_OVER:
            self.result.expected_downtime_ms = self._progress.expected_downtime_ms
        self._progress.dirty_rate = facts.dirty_rate
        self._progress.decision = decision.reason
        self.throttle_percent = decision.throttle_percent
        self._progress.throttle_percent = decision.throttle_percent
        self.result.throttle_percent = max(self.result.throttle_percent, decision.throttle_percent)

    def precopy_begins(self) -> None:
        """Start the clock of round 0."""
        self.precopy_began = self.elapsed()
        self.result.setup_ms = self.precopy_began * 1000

    @contextmanager
    def downtime(self, part: Part) -> Iterator[None]:
        """Measure a part of the downtime."""
        began = time.monotonic()
        try:
            yield
        finally:
            setattr(self.result.downtime, part, (time.monotonic() - began) * 1000)

    def _tell_progress(self) -> None:
        while not self._ended.wait(PROGRESS_SECONDS):
            self._progress.round_done_pages = self.meter.round_pages
            self._progress.bandwidth = self.meter.current_bandwidth()
            self._progress.sent_bytes = self.meter.total_bytes
            self._tell_of_streams(self._progress)
            self._events.publish(self._session_id, progress=self._progress)

    def close(self) -> None:
        """Publish the result, which is the session's last event."""
        self._ended.set()
        self._teller.join()
        self._events.publish(self._session_id, result=self.result)
