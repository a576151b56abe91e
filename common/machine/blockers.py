"""What keeps a machine from being migrated, each in a sentence, before anyone tries (contract M16)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.machine.device_config import DeviceSpec
from common.vfio.migration import MigrationFlags

__all__ = ["blockers"]


def blockers(
    devices: Sequence[tuple[DeviceSpec, MigrationFlags]], methods: Mapping[str, tuple[str, str]], failure: str
) -> list[str]:
    """Return the blockers of a machine whose containers are tracked by `methods` (name → kind and reason).

    The sentences are QEMU's (vfio_migration_realize) where it has one.
    """
    found = [f"the machine has failed: {failure}"] if failure else []
    for spec, flags in devices:
        kind, reason = methods[spec.container]
        if spec.migration == "off":
            found.append(f"{spec.name}: Migration is disabled for VFIO device")
        elif not flags & MigrationFlags.STOP_COPY:
            found.append(f"{spec.name}: VFIO migration is not supported by the device")
        elif kind == "perpetual" and spec.migration == "auto":
            found.append(
                f"{spec.name}: VFIO device doesn't support device and IOMMU dirty tracking ({reason}); "
                'migration = "on" accepts that'
            )
    without_p2p = [spec.name for spec, flags in devices if not flags & MigrationFlags.P2P]
    if len(devices) > 1 and without_p2p:
        found.append(
            "Multiple VFIO devices migration is supported only if all of them support P2P migration: "
            f"{', '.join(without_p2p)} cannot"
        )
    return found
