"""Whether the destination's devices can take the places of ours: what must be equal before anything moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from switchover.v1 import migration_pb2

from common.machine.client import DeviceInfo

__all__ = ["DeviceDiffersError", "check_counterparts"]


class DeviceDiffersError(Exception):
    """A device of the destination cannot take the place of ours."""


def check_counterparts(ours: Sequence[DeviceInfo], theirs: Iterable[migration_pb2.PreparedDevice]) -> None:
    """Raise `DeviceDiffersError` for a device that is not there, or whose BARs are of other sizes than ours.

    Where BARs lie follows from the sizes of all of them (`common.machine.board`), and the guest knows where they lie
    here.
    """
    sizes_there = {device.name: list(device.bar_sizes) for device in theirs}
    for device in ours:
        there = sizes_there.get(device.name)
        if there is None:
            raise DeviceDiffersError(f"{device.name}: the destination has no such device")
        if there != list(device.bar_sizes):
            raise DeviceDiffersError(
                f"{device.name}: its BARs have {_listed(there)} bytes at the destination, "
                f"and {_listed(device.bar_sizes)} here"
            )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
