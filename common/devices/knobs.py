"""What can be set about an emulated device: a JSON object, checked before anything is built from it."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from common import hooks
from common.vfio.dirty_log import LogLimits
from common.vfio.migration import DeviceState, MigrationFlags

__all__ = ["Knobs", "OneTimeFaults", "parse"]

_LEGAL_FLAGS = (0, 1, 3, 5, 7)
_FAIL = "fail:"
_LOGGING = ("logging_start", "logging_report", "logging_stop")
_CALLS = (*_LOGGING, "precopy_info", "data_size", "read", "write", "reset", "map", "unmap")
_FAULTS = {"unlogged", "fail_load", *(f"fail_{call}" for call in _CALLS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """Knobs of every kind of device.

    `migration_flags`: MigrationFlags as a number instead of the kind's own, 0 for a device that cannot be migrated.
    `log_max_bits`, `log_max_ranges`, `log_page_sizes` (bytes): limits of the DMA log. `load_delay_ms`: what leaving
    RESUMING takes longer than it must. `faults`: "unlogged" (the device forgets to log its DMA), "fail_load" (refuses
    once what it is given to load), "fail:STATE" (fails once, with EIO, to enter that state), and "fail_CALL" (fails
    once, with EIO): "logging_start", "logging_report", "logging_stop", "precopy_info", "data_size" (the length of
    STOP_COPY's data), "read" and "write" (of migration data), "reset", "map" and "unmap" (of DMA). `trace`: keeps a
    journal of its writes.
    """

    KIND_FLAGS: ClassVar[MigrationFlags] = MigrationFlags(0)

    migration_flags: int | None = None
    dma_logging: bool = True
    log_max_bits: int | None = None
    log_max_ranges: int = 256
    log_page_sizes: tuple[int, ...] = (4096,)
    load_delay_ms: int = 0
    faults: tuple[str, ...] = ()
    trace: bool = False

    def __post_init__(self) -> None:
        if self.flags not in _LEGAL_FLAGS:
            raise ValueError(f"migration_flags {int(self.flags)}: no device has these; possible are {_LEGAL_FLAGS}")
        if not 0 <= self.load_delay_ms <= 600_000:
            raise ValueError(f"load_delay_ms {self.load_delay_ms} is not within 0 and 600000")
        states = {state.name for state in DeviceState if state is not DeviceState.ERROR}
        for fault in self.faults:
            if fault not in _FAULTS and not (fault.startswith(_FAIL) and fault.removeprefix(_FAIL) in states):
                raise ValueError(f'no such fault: "{fault}"')
        try:
            _ = self.log_limits
        except ValueError as error:
            raise ValueError(f"log_max_ranges or log_page_sizes: {error}") from None

    @property
    def flags(self) -> MigrationFlags:
        """What the device's migration can do."""
        return self.KIND_FLAGS if self.migration_flags is None else MigrationFlags(self.migration_flags)

    @property
    def log_limits(self) -> LogLimits:
        """Limits of the device's DMA log."""
        return LogLimits(self.log_max_ranges, self.log_max_bits, self.log_page_sizes)


class OneTimeFaults:
    """Requests that fail once, as the knobs of a device say, or a test while it works."""

    def __init__(self, device: str, faults: Iterable[str]) -> None:
        self._device = device
        self._waiting = set(faults)

    def reach(self, fault: str) -> None:
        """Raise OSError (EIO) if this fault was asked for and has not happened yet."""
        if fault in self._waiting or hooks.fails(f"{self._device}.{fault}"):
            self._waiting.discard(fault)
            raise OSError(errno.EIO, f"{fault}: as told")

    def reach_state(self, state: DeviceState) -> None:
        """Raise OSError (EIO) if the device is to fail once to enter a state."""
        self.reach(f"{_FAIL}{state.name}")


K = TypeVar("K", bound=Knobs)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


# The annotations of the fields are the schema; a kind may use any of these.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (_is_int, "a whole number"),
    "int | None": (_is_int, "a whole number"),
    "float": (lambda value: _is_int(value) or (isinstance(value, float) and 0 <= value < 1e18), "a number"),
    "tuple[int, ...]": (lambda value: isinstance(value, list) and all(map(_is_int, value)), "a list of whole numbers"),
    "tuple[str, ...]": (
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "a list of strings",
    ),
}


def parse(knobs: type[K], values: Mapping[str, Any]) -> K:
    """Return the knobs of a kind from a JSON object; raise ValueError with a sentence about the first that is wrong."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(knobs)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f'no such knob: "{name}" (there are {", ".join(sorted(fields))})')
        check, expected = _CHECKS[fields[name]]
        if not check(value):
            raise ValueError(f"{name} must be {expected}, not {value!r}")
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return knobs(**arguments)
