"""A device address space: the devices that share it, what is mapped in it, and how their DMA is tracked.

Locks, in the order in which they are taken:

* `control` serialises start, sync and stop of tracking.
* The **turn** is held for every request that a device answers only between two steps of its engine: map, unmap, report,
  start and stop of its log. All containers of a machine share one turn, and whoever else makes such requests (changes
  of state, reset) takes it too. The reason is peer-to-peer DMA: if an unmap waits for the engine of A while a report
  waits for that of B, and each engine waits until the other device, busy with our request, takes its write, nobody ever
  goes on. With one such request at a time the other device is free.
* The **tree lock** is held for moments in which nothing is waited for. DMA by message needs only this one: a device may
  answer an unmap only after such a DMA of its own has been answered, so it must not wait for the turn. For the same
  reason a write to a peer's BAR is made after the tree lock is dropped.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from common.hooks import guarded
from common.iommu.device import DMA_READ, DMA_WRITE, DmaDevice, Memory, PeerBars
from common.iommu.dma_log import DmaLog, device_error, fits
from common.iommu.history import MappingHistory
from common.iommu.hooks import NO_HOOKS, Hooks
from common.iommu.iova_tree import BarTarget, IovaTree, Mapping, Piece, RamTarget
from common.iommu.journal import MappingDelta, MappingJournal
from common.iommu.ranges import Attempt, StartPlan, Strategy, plan_start
from common.iommu.tracker import SyncInfo, Tracker, TrackingInfo
from common.iommu.tracking import DeviceTraits, Method, choose
from common.iommu.translate import mark_runs
from common.iommu.turn import Turn
from common.iommu.viommu import Viommu
from common.memory import runs
from common.memory.bitmap import DirtyBitmap, Words, empty
from common.memory.layout import PAGE_SIZE
from common.vfio.feature import Range

__all__ = ["MAX_MESSAGE", "Container", "DmaDevice", "Exposure"]

MAX_MESSAGE: Final = 1 << 20
"""Most bytes of one DMA access by message."""

_ALL = StartPlan((Attempt((Range(0, (1 << 63) - PAGE_SIZE),), "all that is mapped"),), "an IOMMU needs no ranges")


class Exposure(NamedTuple):
    """A device that could write a page at `iova` during an interval, as `common.iommu.history.Interval`."""

    device: str
    iova: int
    since: float | None
    until: float | None


class Container:
    """An address space; any thread may call any method."""

    def __init__(
        self,
        name: str,
        ram: Memory,
        devices: Sequence[DmaDevice],
        traits: Sequence[DeviceTraits],
        *,
        viommu: Viommu | None = None,
        strategy: Strategy = "auto",
        bars: PeerBars | None = None,
        turn: Turn | None = None,
        hooks: Hooks = NO_HOOKS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`traits` belong to `devices` one by one; `turn` is the machine's, where it has several containers."""
        if [device.name for device in devices] != [its.name for its in traits]:
            raise ValueError(f"{name}: traits do not belong to the devices")
        self.name = name
        self.turn = turn or Turn()
        self.method: Method = choose(traits)
        self._ram = ram
        self._devices = tuple(devices)
        self._viommu = viommu
        self._strategy = strategy
        self._bars = bars
        self._hooks = hooks
        self._clock = clock
        self._control = threading.Lock()
        self._tree_lock = threading.Lock()
        # Changed with turn and tree lock, so either is enough to look.
        self._tree = viommu.domain(name) if viommu else IovaTree()
        kind = self.method.kind
        self._log = None if kind == "perpetual" else DmaLog(name, devices, traits, kind, self.turn)
        # Changed in the turn.
        self._tracker: Tracker | None = None
        self._journal: MappingJournal | None = None
        self._history: MappingHistory | None = None
        # RAM that a device may still write, because it refused to unmap it: dirty at every sync from then on.
        self._stuck = runs.one(0, 0)
        # Changed with the tree lock: where DMA by message is marked.
        self._dirty: DirtyBitmap | None = None

    @property
    def mappings(self) -> list[Mapping]:
        """All mappings, ascending by IOVA."""
        with self._tree_lock:
            return list(self._tree)

    @property
    def mapping_count(self) -> int:
        """How many mappings there are."""
        return len(self._tree)

    def map(self, iova: int, size: int, gpa: int, *, readable: bool = True, writable: bool = True) -> Mapping:
        """Map guest RAM or a BAR for every device; all have it when this returns, or none (QEMU series patch 8).

        OSError: EINVAL (nothing at `gpa`, or as `IovaTree.insert`), EEXIST, ENOSPC, or what a device answered, by name.
        """
        mapping = Mapping(iova, size, gpa, self._target(gpa, size), readable, writable)
        fd, offset = (self._ram.fd, mapping.target.offset) if isinstance(mapping.target, RamTarget) else (None, 0)
        flags = (DMA_READ if readable else 0) | (DMA_WRITE if writable else 0)
        with self.turn:
            with self._tree_lock:
                self._tree.insert(mapping)
            for index, device in enumerate(self._devices):
                try:
                    device.dma_map(iova, size, flags, fd, offset)
                except OSError as error:
                    # Devices that have it already may have written there: what is taken back is collected.
                    self._unmap_from(mapping, index)
                    text = f"{self.name}: {device.name}: cannot map IOVA {iova:#x} size {size:#x} (DMA_MAP)"
                    raise device_error(error, text) from error
            if self._journal is not None:
                self._journal.added(mapping)
            if self._history is not None:
                self._history.opened(mapping)
        return mapping

    def unmap(self, iova: int, size: int) -> int:
        """Unmap every mapping in [iova, iova + size) from every device; return how many bytes were mapped.

        When it returns, no device writes there any more, and all that they wrote is in the RAM bitmap. OSError: EINVAL
        (as `IovaTree.contained`), or what a device answered, by name; the mapping is gone then as well, and as that
        device may still use it, its RAM is dirty at every sync from then on.
        """
        failure: OSError | None = None
        unmapped = 0
        with self.turn:
            for mapping in self._tree.contained(iova, size):
                failure = self._unmap_from(mapping, len(self._devices)) or failure
                unmapped += mapping.size
                if self._journal is not None:
                    self._journal.removed(mapping)
                if self._history is not None:
                    self._history.closed(mapping)
        if failure is not None:
            raise failure
        return unmapped

    def _unmap_from(self, mapping: Mapping, devices: int) -> OSError | None:
        """Take a mapping away from the first `devices` devices and out of the tree; return the first refusal.

        The caller has the turn. The order is what keeps pages: devices may write until the last of them has answered,
        DMA by message needs the tree until then, and only what is marked afterwards is marked after it was written.
        """
        iova, size = mapping.iova, mapping.size
        counts = mapping.writable and mapping.ram_page >= 0
        tracker = self._tracker
        covered = tracker is not None and counts and tracker.covers(mapping)
        words = empty(mapping.pages) if covered else None
        failure: OSError | None = None
        for index, device in enumerate(self._devices[:devices]):
            answer: Words | None = None
            try:
                bitmap = covered and tracker is not None and tracker.bitmap_at_unmap(index)
                answer = device.dma_unmap(iova, size, bitmap=bitmap)
            except OSError as error:
                text = f"{self.name}: {device.name}: cannot unmap IOVA {iova:#x} size {size:#x} (DMA_UNMAP)"
                failure = failure or device_error(error, text)
            else:
                if covered and answer is None and tracker is not None:
                    answer = tracker.ask_unmapped(index, mapping)
            if answer is None or not fits(answer, mapping.pages):
                words = None
            elif words is not None:
                words |= answer
        self._hooks.unmapped(mapping)
        with self._tree_lock:
            self._tree.remove(iova, size)
        if tracker is not None:
            if counts and guarded("unmap-in-precopy"):
                tracker.collect(mapping, words)
            tracker.mark_neighbours(mapping)
        if failure is not None and counts:
            self._stuck = runs.union(self._stuck, runs.one(mapping.ram_page, mapping.pages))
        return failure

    def _target(self, gpa: int, size: int) -> RamTarget | BarTarget:
        try:
            return RamTarget(self._ram.layout.offset_of(gpa, size))
        except ValueError as error:
            bar = self._bars.find(gpa, size) if self._bars is not None else None
            if bar is None:
                raise OSError(errno.EINVAL, f"{self.name}: {error}") from error
            return bar

    def start_tracking(self, dirty: DirtyBitmap) -> TrackingInfo:
        """Start to track DMA into `dirty`: writes from the moment this returns on, so pages are read after that.

        OSError: EBUSY if it is tracked already; else a device cannot, is named, and nothing is left started (M11).
        """
        with self._control:
            if self._tracker is not None:
                raise OSError(errno.EBUSY, f"{self.name}: DMA is tracked already")
            # An aperture does not depend on what is mapped, so another attempt at it would gain nothing.
            rearms = self.method.kind == "device" and self._strategy != "aperture"
            tracker = Tracker(
                self.name, self._tree, self.turn, self.method, self._log, self._plan, dirty, self._hooks, rearms=rearms
            )
            # From here on unmaps are collected; before the logs are armed that means whole.
            self._track(tracker)
            try:
                tracker.start()
            except BaseException:
                self._track(None)
                raise
            return tracker.info

    def sync(self, *, last: bool = False) -> SyncInfo:
        """Collect what was written since the last sync into the RAM bitmap (see `Tracker.sync`).

        With `last`, guest and devices stand still: vCPUs are paused and every device has answered its STOP, so nothing
        is written or mapped any more. OSError: ENODATA if nothing is tracked; else a log could not be read.
        """
        with self._control:
            if self._tracker is None:
                raise OSError(errno.ENODATA, f"{self.name}: DMA is not tracked")
            with self.turn:
                mark_runs(self._tracker.dirty, *self._stuck)
            return self._tracker.sync(last=last)

    def stop_tracking(self) -> None:
        """Stop tracking; devices that cannot are only logged, by name. Nothing happens if nothing is tracked."""
        with self._control:
            tracker = self._tracker
            if tracker is not None:
                self._track(None)
                tracker.stop()

    def reset(self, reset: Callable[[], None]) -> None:
        """Carry out the reset of one of the devices in the turn; what its log may lose by that is dirty."""
        with self._control:
            if self._tracker is not None:
                self._tracker.reset(reset)
                return
            with self.turn:
                reset()

    @property
    def tracking(self) -> TrackingInfo | None:
        """How DMA is tracked at the moment; None if it is not."""
        tracker = self._tracker
        return None if tracker is None else tracker.info

    def _track(self, tracker: Tracker | None) -> None:
        with self.turn, self._tree_lock:
            self._tracker = tracker
            self._dirty = tracker.dirty if tracker else None
            if tracker is not None:
                self._history = MappingHistory(self._tree, clock=self._clock)

    def _plan(self) -> StartPlan:
        if self.method.kind == "iommu":
            return _ALL
        max_iova = self._viommu.max_iova if self._viommu else None
        return plan_start(self._strategy, self._tree.arrays(), max_iova=max_iova, ram_size=self._ram.layout.size)

    def dma_read(self, iova: int, size: int) -> bytes:
        """Serve a device's DMA read by message; OSError EFAULT if it must not, EINVAL if it is too long."""
        parts: list[bytes] = []
        with self._tree_lock:
            pieces = self._translate(iova, size, write=False)
            for piece in pieces:
                at = piece.mapping.target.offset + piece.offset
                ram = isinstance(piece.mapping.target, RamTarget)
                parts.append(self._ram.bytes[at : at + piece.size].tobytes() if ram else b"")
        for index, piece in enumerate(pieces):
            target = piece.mapping.target
            if isinstance(target, BarTarget) and self._bars is not None:
                at = target.offset + piece.offset
                parts[index] = self._bars.region_read(target.device, target.bar, at, piece.size)
        return b"".join(parts)

    def dma_write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Serve a device's DMA write by message: when this returns, it is done and marked.

        OSError as `dma_read`, or what a peer's BAR answered; an access that is refused writes nothing at all.
        """
        view = memoryview(data).cast("B")
        done = 0
        peers: list[tuple[BarTarget, int, memoryview]] = []
        with self._tree_lock:
            for piece in self._translate(iova, len(view), write=True):
                part = view[done : done + piece.size]
                done += piece.size
                target = piece.mapping.target
                at = target.offset + piece.offset
                if isinstance(target, BarTarget):
                    peers.append((target, at, part))
                    continue
                self._ram.bytes[at : at + piece.size] = np.frombuffer(part, np.uint8)
                if self._dirty is not None:
                    first, last = at // PAGE_SIZE, (at + piece.size - 1) // PAGE_SIZE
                    self._dirty.mark_range(first, last - first + 1)
        for target, at, part in peers:
            if self._bars is not None:
                self._bars.region_write(target.device, target.bar, at, part)

    def _translate(self, iova: int, size: int, *, write: bool) -> list[Piece]:
        if not 0 <= size <= MAX_MESSAGE:
            raise OSError(errno.EINVAL, f"{self.name}: DMA of {size} bytes in one message")
        if self._viommu is not None:
            return self._viommu.translate(self.name, iova, size, write=write)
        return self._tree.translate(iova, size, write=write)

    def begin_delta(self) -> None:
        """Start to note changes of mappings for a receiver that has none: the first delta is all that is mapped."""
        with self.turn:
            self._journal = MappingJournal(self._tree)

    def take_delta(self) -> MappingDelta:
        """Return the changes since the last call or `begin_delta` (OSError ENODATA without one)."""
        with self.turn:
            if self._journal is None:
                raise OSError(errno.ENODATA, f"{self.name}: changes of mappings are not noted")
            return self._journal.take()

    def end_delta(self) -> None:
        """Stop noting changes."""
        with self.turn:
            self._journal = None

    def could_have_written(self, page: int) -> list[Exposure]:
        """Return which devices could write a RAM page since tracking was last started, at which IOVA, and when.

        The times are the clock's; `since` None: before tracking, `until` None: to this day. Nothing if never tracked.
        """
        with self.turn:
            intervals = self._history.of_page(page) if self._history is not None else []
        return [Exposure(device.name, *interval) for interval in intervals for device in self._devices]
