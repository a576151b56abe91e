"""Which method tracks the DMA of a container, and when a log is worth arming again: decisions without I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["DeviceTraits", "Method", "MethodKind", "choose", "rearm_pays"]

MethodKind = Literal["device", "iommu", "perpetual"]


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """What a device can do for dirty tracking; what it did not declare, it cannot."""

    name: str
    # It logs its own DMA (PROBE of VFIO_DEVICE_FEATURE_DMA_LOGGING_START succeeds, and the user did not forbid it).
    dma_logging: bool = False
    # The IOMMU in front of it keeps dirty bits that can be asked for.
    iommu_dirty: bool = False
    # REPORT takes any range, not only one that equals a mapping (libvfio-user issue 824).
    report_ranges: bool = False
    # Its log keeps the bits of a mapping that is gone.
    log_outlives_mapping: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """How the DMA of a container is tracked, and why, in a sentence for people."""

    kind: MethodKind
    reason: str


def choose(devices: Sequence[DeviceTraits]) -> Method:
    """Choose the method of a container: its devices, else the IOMMU, else everything is dirty at every sync.

    A method must cover every device; where the devices' abilities are mixed, neither does (QEMU:
    vfio_devices_all_dirty_tracking, without the mixed iommufd case in which writes were missed).
    """
    if not devices:
        return Method("device", "there is no device whose DMA could be missed")
    silent = [device.name for device in devices if not device.dma_logging]
    if not silent:
        return Method("device", "every device logs its own DMA")
    cannot = f"{_names(silent)} cannot log {'its' if len(silent) == 1 else 'their'} own DMA"
    unseen = [device.name for device in devices if not device.iommu_dirty]
    if not unseen:
        return Method("iommu", f"{cannot}, but the IOMMU sees the DMA of every device")
    return Method(
        "perpetual",
        f"{cannot} and no IOMMU sees the DMA of {_names(unseen)}: all that is mapped writable is dirty at every sync",
    )


def rearm_pays(spent_pages: int, uncovered_pages: int, mapped_pages: int) -> bool:
    """Whether to arm the logs again with the ranges that are mapped now.

    `uncovered_pages` are outside the armed ranges now, so dirty at every sync; `spent_pages` were marked for that
    reason since the last arming, and `mapped_pages` is what arming again would mark. Nobody knows how many syncs
    will follow, so we rent until we have paid the price: never more than twice the cost of the better choice.
    """
    return uncovered_pages > 0 and spent_pages >= mapped_pages


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
