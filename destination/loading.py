"""How far a device's state has come, and which record may come next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from switchover.v1 import migration_pb2

from destination.refusal import bad

__all__ = ["Loading", "check_whole"]

Kind = migration_pb2.DeviceStateKind
_DATA_KINDS = (Kind.DEVICE_STATE_KIND_PRECOPY_DATA, Kind.DEVICE_STATE_KIND_STOP_COPY_DATA)
_EMPTY_KINDS = (Kind.DEVICE_STATE_KIND_INIT_DATA_SENT, Kind.DEVICE_STATE_KIND_RESTART, Kind.DEVICE_STATE_KIND_END)


class Loading:
    """How far a device is."""

    def __init__(self, has_precopy: bool) -> None:  # noqa: FBT001  # the one thing to know
        self._has_precopy = has_precopy
        self.sequence = 0
        self.initial_data_loaded = False
        self.ended = False

    def check(self, name: str, record: migration_pb2.SendDeviceStateRequest) -> None:
        """Refuse a record that cannot come next."""
        if record.sequence != self.sequence + 1:
            raise bad(f"{name}: record {record.sequence} after {self.sequence}")
        if self.ended:
            raise bad(f"{name}: a record after the end")
        if record.kind not in (*_DATA_KINDS, *_EMPTY_KINDS):
            raise bad(f"{name}: unknown record kind {record.kind}")
        if bool(record.data) != (record.kind in _DATA_KINDS):
            raise bad(f"{name}: a record of kind {Kind.Name(record.kind)} with {len(record.data)} bytes")
        if record.last and record.kind != Kind.DEVICE_STATE_KIND_STOP_COPY_DATA:
            raise bad(f"{name}: a record of kind {Kind.Name(record.kind)} cannot be the last")

    def applied(self, record: migration_pb2.SendDeviceStateRequest) -> None:
        """Note that the device has taken a record."""
        self.sequence = record.sequence
        if record.kind == Kind.DEVICE_STATE_KIND_RESTART:
            self.initial_data_loaded = False
        self.initial_data_loaded |= record.kind == Kind.DEVICE_STATE_KIND_INIT_DATA_SENT and self._has_precopy
        self.ended = record.kind == Kind.DEVICE_STATE_KIND_END or record.last

    def ack(self) -> migration_pb2.SendDeviceStateResponse:
        """Return the ack of all that the device has taken."""
        return migration_pb2.SendDeviceStateResponse(
            applied_sequence=self.sequence, initial_data_loaded=self.initial_data_loaded
        )


def check_whole(devices: Mapping[str, Loading], told: Iterable[migration_pb2.DeviceConfig]) -> None:
    """Refuse to go on unless the source tells of exactly these devices, and all of each has come."""
    sequences = {device.name: device.record_sequence for device in told}
    if set(sequences) != set(devices):
        raise bad("the devices are not those that were prepared")
    for name, sequence in sequences.items():
        if not devices[name].ended or devices[name].sequence != sequence:
            raise bad(f"{name}: its state has not arrived whole")
