"""The DMA port of a device: memory where it is mapped, messages elsewhere, and a log of what was written.

Whatever was written is marked after the write, so that a report that clears the mark is followed by a copy that has the
data. A write that reached its end in part is marked whole: unknown is dirty.
"""

from __future__ import annotations

from common import hooks
from common.devices.mappings import PAGE_SIZE, Mapping, Mappings
from common.memory.write_journal import WriteJournal
from common.vfio.dirty_log import DirtyLog
from common.vfio.feature import Buffer
from common.vfio_user.server import MessageDma

__all__ = ["DmaFault", "DmaPort", "DmaStalled"]


class DmaFault(Exception):  # noqa: N818 - the field's name for it
    """An access was refused: not mapped, not permitted, or refused by whom it went to."""


class DmaStalled(Exception):  # noqa: N818 - not an error: the access was not made and may be made later
    """An access cannot be made now: bus mastering is off, or it might go to a peer and peers must not be bothered."""


class DmaPort:
    """Reads and writes by IOVA. Used under the lock that guards `mappings` and `log`.

    `bus_master`: whether the device may do DMA at all. `peers`: whether messages may be sent (not in the P2P states).
    `logging`: False makes the device's own log forget its writes, which is a fault that a test injects. `iommu` holds
    the dirty bits of the IOMMU that the port plays: it sees every write that goes through it, whatever the device does.
    `journal` has every write too, by IOVA, if it is kept.
    """

    def __init__(self, mappings: Mappings, log: DirtyLog, iommu: DirtyLog, hook: str) -> None:
        self.bus_master = False
        self.peers = True
        self.logging = True
        self.messages: MessageDma | None = None
        self.journal: WriteJournal | None = None
        self._mappings = mappings
        self._log = log
        self._iommu = iommu
        self._hook = hook

    def read(self, iova: int, count: int, *, by_message: bool = False) -> bytes:
        """Return `count` bytes, if so told by message even where memory is mapped; raise `DmaFault` or `DmaStalled`."""
        if not self.bus_master:
            raise DmaStalled
        mapping = None if by_message else self._mappings.find(iova)
        if mapping is not None and mapping.view is not None and mapping.readable and iova + count <= mapping.end:
            start = iova - mapping.iova
            return bytes(mapping.view[start : start + count])
        parts = []
        for piece, at, size in self._pieces(iova, count, write=False, by_message=by_message):
            try:
                data = piece.read(at, size) if piece is not None else bytes(self._by_message().dma_read(at, size))
            except OSError as error:
                raise DmaFault(f"read of {size} bytes at iova 0x{at:x}: {error}") from error
            if len(data) != size:
                raise DmaFault(f"read of {size} bytes at iova 0x{at:x}: {len(data)} bytes came")
            parts.append(data)
        return b"".join(parts)

    def write(self, iova: int, data: Buffer, *, by_message: bool = False) -> None:
        """Write all of `data`, as `read` does, and mark it; raise `DmaFault` or `DmaStalled`."""
        if not self.bus_master:
            raise DmaStalled
        count = len(data)
        mapping = None if by_message else self._mappings.find(iova)
        if mapping is not None and mapping.view is not None and mapping.writable and iova + count <= mapping.end:
            start = iova - mapping.iova
            if hooks.guarded("report-before-data"):
                mapping.view[start : start + count] = data
                self._note(iova, count)
                self._mark(iova, count)
            else:
                self._mark(iova, count)
                self._note(iova, count)
                mapping.view[start : start + count] = data
            return
        source = memoryview(data)
        done = 0
        for piece, at, size in self._pieces(iova, count, write=True, by_message=by_message):
            try:
                if piece is not None:
                    piece.write(at, source[done : done + size])
                else:
                    self._by_message().dma_write(at, source[done : done + size])
            except OSError as error:
                raise DmaFault(f"write of {size} bytes at iova 0x{at:x}: {error}") from error
            finally:
                self._note(at, size)
                self._mark(at, size)
            done += size

    def _mark(self, iova: int, count: int) -> None:
        if self.logging:
            self._log.mark(iova, count)
        self._iommu.mark(iova, count)

    def _note(self, iova: int, count: int) -> None:
        if self.journal is not None:
            first = iova // PAGE_SIZE
            self.journal.note(first, (iova + count - 1) // PAGE_SIZE - first + 1)
        hooks.reach(self._hook)

    def _by_message(self) -> MessageDma:
        if self.messages is None:
            raise DmaFault("nobody carries messages")
        return self.messages

    def _pieces(self, iova: int, count: int, *, write: bool, by_message: bool) -> list[tuple[Mapping | None, int, int]]:
        """Split an access into (mapping or None for a message, IOVA, bytes), or refuse it before anything is moved."""
        pieces: list[tuple[Mapping | None, int, int]] = []
        end = iova + count
        if end > 1 << 64:
            raise DmaFault(f"access to {count} bytes at iova 0x{iova:x} ends beyond 64 bits")
        while iova < end:
            mapping = self._mappings.find(iova)
            if mapping is None:
                size = min(end, self._mappings.next_start(iova)) - iova
                pieces.append((None, iova, size))
            else:
                if not (mapping.writable if write else mapping.readable):
                    raise DmaFault(f"iova 0x{iova:x} is not mapped {'writable' if write else 'readable'}")
                size = min(end, mapping.end) - iova
                pieces.append((mapping if mapping.local and not by_message else None, iova, size))
            iova += size
        if not self.peers and any(mapping is None for mapping, _, _ in pieces):
            raise DmaStalled
        return pieces
