"""A session of dirty tracking in one container: arm, collect, arm again.

On races. A device logs IOVAs; what an IOVA leads to changes while we collect. Four rules keep every page:

1. A REPORT clears the log, so from then on the bits exist only here. REPORT on all devices, translation and marking of
   a window are one turn, and map and unmap take turns with it: a bit for I→A is never translated after I→B, and
   whoever gets a turn finds in the RAM bitmap all that was taken from a log before.
2. Between two windows anything may be mapped or unmapped. What goes is collected when it goes, after the last device
   has answered, for until then it may write; what comes stays in the log until the next sync, which is in time,
   because the last one comes after guest and devices have stopped.
3. A mapping is covered only if one armed range holds all of it. Any other is dirty at every sync and when it goes: so
   "everything mapped" is everything that was mapped at any time since the last sync.
4. Arming again begins with "nothing is covered" and ends, after the last START, with "all that is mapped is dirty".
   Bits that STOP throws away belong to mappings that went meanwhile (rule 3) or are there at the end. So no turn is
   held over STOP and START, and the guest maps and unmaps beside them.

A log that is lost covers nothing: that is what perpetual means, and the same code does it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common import hooks
from common.iommu.dma_log import DmaLog
from common.iommu.hooks import Hooks
from common.iommu.iova_tree import IovaTree, Mapping, MappingArrays
from common.iommu.ranges import Attempt, Coverage, StartPlan, plan_windows
from common.iommu.tracking import Method, MethodKind, rearm_pays
from common.iommu.translate import DirtyPages, dirty_ram_pages, mark_runs
from common.iommu.turn import Turn
from common.memory.bitmap import DirtyBitmap, Words, pages_of
from common.memory.layout import PAGE_SIZE
from common.vfio.feature import Range

__all__ = ["SyncInfo", "Tracker", "TrackingInfo"]

_log = logging.getLogger(__name__)
_NOTHING = Coverage(())
# What a device says of ranges that it cannot log; other errors are not cured by other ranges.
_REFUSALS = frozenset({errno.EOPNOTSUPP, errno.E2BIG, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class TrackingInfo:
    """How a container is tracked now.

    `reason` is for people; `ranges` are armed; `page_size` in bytes is the largest that a device logs with.
    """

    kind: MethodKind
    reason: str
    ranges: tuple[Range, ...]
    page_size: int


@dataclass(frozen=True, slots=True)
class SyncInfo:
    """What a sync found, in pages.

    `logged_pages` were reported by devices (a page counts once for each IOVA), `uncovered_pages` were marked because no
    log covered them or arming again lost their bits, `unmapped_pages` were collected at unmaps since the last sync.
    `bar_hits` and `stale_bits` are reported pages that lead to a BAR or nowhere. `reports` are windows asked for;
    `rearmed`: the logs were stopped to be armed again, whether or not a device took it.
    """

    logged_pages: int
    uncovered_pages: int
    unmapped_pages: int
    bar_hits: int
    stale_bits: int
    reports: int
    rearmed: bool


class Tracker:
    """One session; `coverage` changes only in the turn. Start, sync and stop are the caller's to serialise."""

    def __init__(
        self,
        container: str,
        tree: IovaTree,
        turn: Turn,
        method: Method,
        log: DmaLog | None,
        plan: Callable[[], StartPlan],
        dirty: DirtyBitmap,
        hooks: Hooks,
        *,
        rearms: bool,
    ) -> None:
        """`log` None: perpetual. `plan` is called in the turn; `rearms`: another plan may cover more than the first."""
        self._container = container
        self._tree = tree
        self._turn = turn
        self._log = log
        self._plan = plan
        self._hooks = hooks
        self._rearms = rearms
        self._refused: set[tuple[Range, ...]] = set()
        self._reason = method.reason
        self._spent_pages = 0
        self._unmapped_pages = 0
        self._coverage = _NOTHING
        self.dirty = dirty
        self.method = method

    @property
    def info(self) -> TrackingInfo:
        """How the container is tracked now."""
        page_size = self._log.granule if self._log else PAGE_SIZE
        return TrackingInfo(self.method.kind, self.method.reason, self._coverage.ranges, page_size)

    def start(self) -> None:
        """Arm the logs; OSError names the device that refused the last attempt (M11: none is left running)."""
        if self._log is None:
            return
        with self._turn:
            plan = self._plan()
        coverage = self._arm(self._log, plan.reason, plan.attempts)
        with self._turn:
            self._coverage = coverage

    def stop(self) -> None:
        """Stop the logs; failures are only logged."""
        if self._log is not None:
            self._log.stop()

    def covers(self, mapping: Mapping) -> bool:
        """Whether the logs see every write to a mapping; the caller has the turn."""
        return self._coverage.covers(mapping.iova, mapping.size)

    def bitmap_at_unmap(self, index: int) -> bool:
        """Whether the device at `index` can be asked for 4 KiB pages as it unmaps: the log has that page size."""
        return self._log is not None and self._log.page_size(index) == PAGE_SIZE

    def ask_unmapped(self, index: int, mapping: Mapping) -> Words | None:
        """Ask the device at `index` for what it wrote to a mapping that it has given up; the caller has the turn."""
        assert self._log is not None
        try:
            return self._log.report_unmapped(index, mapping)
        except OSError as error:
            self._lose(error)
            return None

    def collect(self, mapping: Mapping, words: Words | None) -> None:
        """Mark what was written to a mapping that is gone: the pages in `words`, or all of it if nobody knows.

        The caller has the turn, every device has answered the unmap, and the mapping is out of the tree.
        """
        if words is None:
            self.dirty.mark_range(mapping.ram_page, mapping.pages)
            self._spent_pages += mapping.pages
            self._unmapped_pages += mapping.pages
        else:
            pages = pages_of(words) + mapping.ram_page
            self.dirty.mark_pages(pages)
            self._unmapped_pages += len(pages)

    def mark_neighbours(self, mapping: Mapping) -> None:
        """Mark what shares a large page of a log with a mapping that is gone; the caller has the turn.

        A device that logs in pages of more than 4 KiB may have cleared all of one when a part of it was unmapped,
        whether or not that part was RAM, was writable, or was asked for.
        """
        granule = self._log.granule if self._log else PAGE_SIZE
        low, high = mapping.iova // granule * granule, -(-mapping.end // granule) * granule
        for other in self._tree.overlapping(low, high - low):
            if other.writable and other.ram_page >= 0:
                start, end = max(low, other.iova), min(high, other.end)
                self.dirty.mark_range(other.ram_page + (start - other.iova) // PAGE_SIZE, (end - start) // PAGE_SIZE)

    def sync(self, *, last: bool) -> SyncInfo:
        """Collect every log into the RAM bitmap.

        `last`: guest and devices stand still, so arming again would only cost. OSError names the device whose log could
        not be read (M11: the migration fails); from then on everything is dirty at every sync.
        """
        with self._turn:
            collected, self._unmapped_pages = self._unmapped_pages, 0
            windows = self._windows()
        logged = bar_hits = stale = reports = 0
        for window in windows:
            with self._turn if hooks.guarded("remap-same-iova") else nullcontext():
                found = self._collect_window(window)
            self._hooks.window_done(window)
            if found is not None:
                logged += len(found.pages)
                bar_hits += found.bar_hits
                stale += found.unmapped
                reports += 1
        with self._turn:
            arrays = self._tree.arrays()
            unseen = ~self._coverage.mask(arrays.starts, arrays.sizes)
            uncovered = self._mark_mapped(arrays, unseen & hooks.guarded("untracked-device"))
            self._spent_pages += uncovered
            mapped = int(arrays.sizes[arrays.ram_writable].sum()) // PAGE_SIZE
            pays = self._rearms and not last and rearm_pays(self._spent_pages, uncovered, mapped)
        marked = self._rearm() if pays else None
        if marked is not None:
            uncovered = marked
        return SyncInfo(logged, uncovered, collected, bar_hits, stale, reports, marked is not None)

    def _windows(self) -> list[Range]:
        if self._log is None:
            return []
        log = self._log
        return plan_windows(self._tree.arrays(), self._coverage, granule=log.granule, arbitrary=log.arbitrary)

    def _collect_window(self, window: Range) -> DirtyPages | None:
        """Take a window's bits from the logs into the RAM bitmap; None if what it was planned for is gone."""
        assert self._log is not None
        if not self._log.arbitrary:
            mapping = self._tree.find(window.iova)
            if mapping is None or (mapping.iova, mapping.size) != (window.iova, window.length):
                return None
        try:
            words = self._log.report(window)
        except OSError as error:
            # Logs that answered before the one that failed are cleared, and their answers are lost.
            self._lose(error)
            raise
        self._hooks.reported(window)
        found = dirty_ram_pages(words, window.iova, PAGE_SIZE, self._tree.arrays())
        self.dirty.mark_pages(found.pages)
        return found

    def _mark_mapped(self, arrays: MappingArrays, which: NDArray[np.bool_]) -> int:
        wanted = which & arrays.ram_writable
        return mark_runs(self.dirty, arrays.pages[wanted], arrays.sizes[wanted] // PAGE_SIZE)

    def _arm(self, log: DmaLog, reason: str, attempts: Sequence[Attempt]) -> Coverage:
        """Start the logs with the first attempt that all devices accept; OSError if there is none."""
        refusals: list[OSError] = []
        for attempt in attempts:
            try:
                if attempt.ranges:
                    log.start(attempt.ranges)
            except OSError as error:
                refusals.append(error)
                if error.errno not in _REFUSALS:
                    break
                self._refused.add(attempt.ranges)
                _log.info("%s (%s)", error.strerror, attempt.what)
                continue
            said = "".join(f"; refused: {error.strerror}" for error in refusals)
            self.method = Method(self.method.kind, f"{self._reason}; {reason}: {attempt.what}{said}")
            return Coverage(attempt.ranges, exact=not log.arbitrary, granule=log.granule)
        raise refusals[-1]

    def _rearm(self) -> int | None:
        """Arm the logs with what is mapped now (rule 4), return how many pages that cost; None: nothing new to try.

        If no device takes it, the migration goes on with everything dirty at every sync.
        """
        assert self._log is not None
        with self._turn:
            plan = self._plan()
            attempts = [attempt for attempt in plan.attempts if attempt.ranges not in self._refused]
            if not attempts:
                self._rearms = False
                return None
            self._coverage = _NOTHING
        return self._arm_again(self._log, plan.reason, attempts)

    def reset(self, reset: Callable[[], None]) -> None:
        """Carry out a device's reset, which ends the device's own log: then all are armed again as they were (rule 4).

        The dirty bits of an IOMMU do not end with it. An error of `reset` leaves nothing covered.
        """
        with self._turn:
            ranges = self._coverage.ranges if self.method.kind == "device" else ()
            if ranges:
                self._coverage = _NOTHING
            reset()
        if ranges and self._log is not None:
            self._arm_again(self._log, "a device was reset", [Attempt(ranges, "what was armed before")])

    def _arm_again(self, log: DmaLog, reason: str, attempts: Sequence[Attempt]) -> int:
        """Stop all logs and start them again; return how many pages are dirty by that."""
        log.stop()
        self._hooks.disarmed()
        try:
            coverage = self._arm(log, reason, attempts)
        except OSError as error:
            coverage = _NOTHING
            with self._turn:
                self._lose(error)
        self._hooks.rearmed()
        with self._turn:
            self._coverage = coverage
            self._spent_pages = 0
            arrays = self._tree.arrays()
            return self._mark_mapped(arrays, arrays.ram_writable & hooks.guarded("rearm-while-mapping"))

    def _lose(self, error: OSError) -> None:
        self._coverage = _NOTHING
        self._rearms = False
        why = f"all that is mapped writable is dirty at every sync: {error.strerror}"
        self.method = Method("perpetual", why)
        _log.warning("%s: %s", self._container, self.method.reason)
