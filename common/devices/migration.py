"""A device's migration state and the data streams that its arcs open and close.

The states are the kernel's (common.vfio.migration); one request is carried out one arc at a time, and what fails leaves
the device in the state that it has reached. A state that cannot be loaded leaves it in ERROR, from which a reset leads
back to RUNNING.
"""

from __future__ import annotations

import errno
import time
from typing import Protocol

from common.devices.knobs import Knobs, OneTimeFaults
from common.devices.stream import Loading, Saving, StateFormat
from common.vfio.feature import Buffer, PrecopyInfo
from common.vfio.migration import (
    PRECOPY_STATES,
    RUNNING_STATES,
    SAVING_STATES,
    DeviceState,
    closes_stream,
    next_state,
    opens_stream,
)

__all__ = ["P2P_STATES", "MigratedState", "Migration"]

P2P_STATES = frozenset({DeviceState.RUNNING_P2P, DeviceState.PRE_COPY_P2P})


class MigratedState(Protocol):
    """What a device saves and loads beside its memory."""

    def save_state(self) -> bytes:
        """Return everything that the device is, in bytes that are the same for the same state."""

    def load_state(self, state: bytes) -> None:
        """Become what `state` says; raise ValueError, having changed nothing, if that is not possible."""


class Migration:
    """The state machine of one device; the caller holds the engine's lock."""

    def __init__(
        self,
        device: MigratedState,
        state_format: StateFormat,
        knobs: Knobs,
        faults: OneTimeFaults,
    ) -> None:
        self.state = DeviceState.RUNNING
        self._device = device
        self._format = state_format
        self._flags = knobs.flags
        self._faults = faults
        self._load_delay = knobs.load_delay_ms / 1000
        self._saving: Saving | None = None
        self._loading: Loading | None = None

    @property
    def running(self) -> bool:
        """Whether the device works."""
        return self.state in RUNNING_STATES

    def set_state(self, target: DeviceState) -> None:
        """Go to `target`, arc by arc; OSError: EINVAL (no way, or a state that cannot be loaded), EIO (injected)."""
        while (step := next_state(self.state, target, self._flags)) is not self.state:
            self._faults.reach_state(step)
            self._take_arc(self.state, step)
            self.state = step

    def reset(self) -> None:
        """Return to RUNNING from wherever it is; streams end."""
        self.state = DeviceState.RUNNING
        self._saving = self._loading = None

    def read(self, size: int) -> memoryview:
        """Return the next bytes of the stream, valid until the next read; nothing: none now (PRE_COPY), or its end.

        Raise OSError (EINVAL) if the state cannot be read.
        """
        if self._saving is None or self.state not in SAVING_STATES:
            raise OSError(errno.EINVAL, f"nothing to read in {self.state.name}")
        self._faults.reach("fail_read")
        return self._saving.read(size)

    def write(self, data: Buffer) -> None:
        """Take the next bytes of a stream; raise OSError (EINVAL) unless the device is resuming."""
        if self._loading is None or self.state is not DeviceState.RESUMING:
            raise OSError(errno.EINVAL, f"no state is loaded in {self.state.name}")
        self._faults.reach("fail_write")
        self._loading.write(data)

    def precopy_info(self) -> PrecopyInfo:
        """Return what can be read now; raise OSError (EINVAL) outside of pre-copy."""
        if self._saving is None or self.state not in PRECOPY_STATES:
            raise OSError(errno.EINVAL, f"no pre-copy in {self.state.name}")
        self._faults.reach("fail_precopy_info")
        return self._saving.info()

    def stop_copy_length(self) -> int:
        """Return how many bytes STOP_COPY would bring if it came now, in any state."""
        self._faults.reach("fail_data_size")
        if self._saving is None:
            return self._format.length(self._device.save_state())
        if self.state is DeviceState.STOP_COPY:
            return self._saving.remaining(b"")
        return self._saving.remaining(self._device.save_state())

    def _take_arc(self, previous: DeviceState, state: DeviceState) -> None:
        direction = opens_stream(previous, state)
        if direction == "read":
            self._saving = self._format.save()
        elif direction == "write":
            self._loading = self._format.load()
        if state is DeviceState.STOP_COPY and self._saving is not None:
            self._saving.finish(self._device.save_state())
        if closes_stream(previous, state):
            loading, self._saving, self._loading = self._loading, None, None
            if loading is not None:
                self._load(loading)

    def _load(self, loading: Loading) -> None:
        time.sleep(self._load_delay)
        try:
            self._faults.reach("fail_load")
            self._device.load_state(loading.finish())
        except (ValueError, OSError) as error:
            self.state = DeviceState.ERROR
            raise OSError(errno.EINVAL, f"the state cannot be loaded: {error}") from error
