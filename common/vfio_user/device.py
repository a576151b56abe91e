"""What a vfio-user server and its device need of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.vfio.feature import Buffer, PrecopyInfo, Range
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user.capabilities import Extension
from common.vfio_user.description import IoEventFd, IrqFlags, IrqInfo, RegionInfo

__all__ = ["Device", "MessageDma"]


class MessageDma(Protocol):
    """DMA by message: what a device asks its client for. All raise OSError as the client refuses."""

    def dma_read(self, iova: int, count: int) -> bytes:
        """Return `count` bytes at `iova`."""

    def dma_write(self, iova: int, data: Buffer) -> None:
        """Write `data` at `iova`."""


class Device(Protocol):
    """What a server needs of its device.

    A refusal is an OSError, whose errno the client gets. All methods are called in the thread of `serve`, one at a
    time. Descriptors are lent: a device that keeps one duplicates it. `regions` and `irqs` never change; region and
    interrupt accesses are within them when they arrive.
    """

    name: str
    regions: Sequence[RegionInfo]
    irqs: Sequence[IrqInfo]
    migration_flags: MigrationFlags
    """0: the device cannot be migrated, and no feature is there."""
    dma_logging: bool
    extension: Extension

    def connected(self, dma: MessageDma) -> None:
        """Take the way to the client, which is there before any command is."""

    def disconnected(self) -> None:
        """Let go of all that the client gave: mappings, interrupts. Nothing is called after it."""

    def reset(self) -> None:
        """Reset the device to its state at power-on; its migration state becomes RUNNING."""

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        """Return `count` bytes at `offset` of a region."""

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """Write at `offset` of a region."""

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        """Return the eventfds that stand for writes to a region."""

    def set_irqs(self, index: int, flags: IrqFlags, start: int, count: int, data: Buffer, fds: Sequence[int]) -> None:
        """Configure, mask or trigger `count` vectors from `start`; `data`: a byte for each with DATA_BOOL.

        With DATA_EVENTFD there are `count` descriptors, or none, which takes them away; a trigger without data for no
        vector turns the interrupts off.
        """

    def dma_map(self, iova: int, size: int, flags: int, offset: int, fd: int | None) -> None:
        """Make `size` bytes at `offset` of a file accessible at `iova`; without file: by message only.

        `flags`: DMA_READABLE, DMA_WRITABLE.
        """

    def dma_unmap(self, iova: int, size: int, page_size: int | None) -> Buffer | None:
        """Take a mapping away, exactly as it was made (else ENOENT), when the last access to it has ended.

        With a `page_size` return what the logs that run, the device's or the IOMMU's, have about it, and clear it; a
        refusal leaves the mapping in place. The IOMMU's bits are gone with the mapping in any case.
        """

    def dma_unmap_all(self) -> None:
        """Take all mappings away."""

    def get_state(self) -> DeviceState:
        """Return the migration state."""

    def set_state(self, state: DeviceState) -> None:
        """Go to a migration state, step by step."""

    def logging_start(self, page_size: int, ranges: Sequence[Range]) -> int:
        """Start the log; return the page size that it uses."""

    def logging_stop(self) -> None:
        """Stop the log and lose it."""

    def logging_report(self, iova: int, length: int, page_size: int) -> Buffer:
        """Return, and clear, the log's bitmap of a range."""

    def write_journal(self, iova: int, length: int, limit: int) -> Buffer:
        """Return the newest `limit` rows of what the device wrote to a range, oldest first, if `extension.trace`."""

    def iommu_dirty_start(self, page_size: int) -> int:
        """Start the IOMMU's dirty bits, if `extension.iommu_dirty`; return the page size that they have."""

    def iommu_dirty_stop(self) -> None:
        """Stop them and lose them."""

    def iommu_dirty_report(self, iova: int, length: int, page_size: int) -> Buffer:
        """Return, and clear, the IOMMU's bits of a range."""

    def stop_copy_length(self) -> int:
        """Return how many bytes STOP_COPY would bring now."""

    def precopy_info(self) -> PrecopyInfo:
        """Return how much can be read in PRE_COPY now; EINVAL in other states."""

    def mig_data_read(self, size: int) -> Buffer:
        """Return up to `size` bytes of the state; none: nothing now in PRE_COPY, the end in STOP_COPY."""

    def mig_data_write(self, data: Buffer) -> None:
        """Take all of `data` as the next part of the state."""
