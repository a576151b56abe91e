"""A device of the machine: its process, its connection, its interrupts and doorbell, its migration state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import xxhash

from common.machine.config import DeviceSpec
from common.vfio.feature import Buffer, PrecopyInfo
from common.vfio.migration import PRECOPY_STATES, SAVING_STATES, DeviceState, MigrationFlags
from common.vfio_user.client import VfioUserClient

__all__ = ["AttachedDevice", "Digest", "Pending", "ResetFailedError", "ResetInsteadError", "Sizes", "start_device"]

_log = structlog.get_logger()

# PCI configuration space, as far as a VMM must know it.
CONFIG_REGION = 7
COMMAND = 0x04
COMMAND_MEMORY = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
CAPABILITIES = 0x34
CAPABILITY_MSIX = 0x11
MSIX_ENABLE = 1 << 15
BAR_REGISTERS = range(0x10, 0x28, 4)

VFIO_PCI_MSIX_IRQ_INDEX = 2
VFIO_IRQ_SET_DATA_EVENTFD_ACTION_TRIGGER = 0x24
VFIO_REGION_INFO_FLAG_READ = 1
READ_SIZE = 1 << 20
# A device that does not answer for so long has died; loading a state may take it half of that.
REQUEST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Pending:
    """What was signalled and not yet seen: MSI-X vectors by the guest, doorbells by the device."""

    vectors: tuple[int, ...] = ()
    doorbells: tuple[int, ...] = ()

    def __or__(self, other: Pending) -> Pending:
        return Pending(
            tuple(sorted({*self.vectors, *other.vectors})), tuple(sorted({*self.doorbells, *other.doorbells}))
        )


@dataclass(frozen=True, slots=True)
class Digest:
    """xxh3_64 of everything that can be read of a stopped device; `dump` is 0 where no dump can be compared."""

    config: int
    bars: tuple[int, ...]
    dump: int
    compared: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """What there is to read of a device: in pre-copy (None outside of it or where it cannot tell), and in STOP_COPY.

    `session` is the saving session, 0 if there is none. `length` None: the device cannot tell; `length_failed`: it can,
    and did not.
    """

    session: int
    precopy: PrecopyInfo | None
    length: int | None
    length_failed: bool


class ResetInsteadError(OSError):
    """A device could not change its state, nor go back, and was reset: it is in RUNNING and its state is lost."""


class ResetFailedError(OSError):
    """A device could not even be reset: nobody knows what it does (QEMU: hw_error)."""


class AttachedDevice:
    """One device. State changes go through `enter` and `reset`; the rest is asked of `client`.

    A **saving session** lasts from the moment in which the device enters a state that can be read from another, to the
    one in which it leaves such states. What was read of an earlier session is worth nothing beside a later one, so
    sessions have numbers, and a read says which one it is of.
    """

    def __init__(self, spec: DeviceSpec, client: VfioUserClient, process: subprocess.Popen[bytes] | None) -> None:
        self.spec = spec
        self.name = spec.name
        self.client = client
        self.process = process
        self.on_state: Callable[[str, DeviceState], None] = lambda _name, _state: None
        self.failure: OSError | None = None
        self._state = DeviceState.RUNNING
        self._sessions = 0
        self._read_session = 0  # of the last read
        # Held by changes of state and by what must not fall into two sessions.
        self._lock = threading.Lock()
        self.bar_sizes = {region.index: region.size for region in client.regions if region.index < 6 and region.size}
        vectors = next((irq.count for irq in client.irqs if irq.index == VFIO_PCI_MSIX_IRQ_INDEX), 0)
        self.interrupts = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(vectors)]
        self.doorbells = [area.fd for area in client.get_region_io_fds(0)] if 0 in self.bar_sizes else []
        if vectors:
            client.set_irqs(
                VFIO_PCI_MSIX_IRQ_INDEX, VFIO_IRQ_SET_DATA_EVENTFD_ACTION_TRIGGER, 0, vectors, fds=self.interrupts
            )

    @property
    def migration_flags(self) -> MigrationFlags:
        """What the device can do; no flag at all if it cannot migrate or was told not to."""
        return MigrationFlags(0) if self.spec.migration == "off" else MigrationFlags(self.client.migration_flags)

    @property
    def has_iommu_dirty(self) -> bool:
        """Whether there is an IOMMU in front of it whose dirty bits can be asked for."""
        return self.client.extension is not None and self.client.extension.iommu_dirty

    @property
    def state(self) -> DeviceState:
        """The migration state as we know it; as in QEMU it is never asked for."""
        return self._state

    @property
    def session(self) -> int:
        """The number of the saving session, 0 if there is none."""
        return self._sessions if self._state in SAVING_STATES else 0

    def enter(self, target: DeviceState, recover: DeviceState = DeviceState.ERROR) -> None:
        """Change the migration state, step by step as the device decides; do nothing if it is there already.

        On failure go to `recover` if that is not ERROR, else or if that fails too reset the device, and raise the first
        error, as it is or as `ResetInsteadError` (QEMU: vfio_migration_set_state; contract M2). ResetFailedError if
        nothing helps.
        """
        with self._lock:
            if self._state is target or not self.migration_flags:
                return
            try:
                self.client.set_state(target)
            except OSError as error:
                self._recover(recover, error)
                raise
            self._entered(target)

    def _recover(self, recover: DeviceState, cause: OSError) -> None:
        if recover is not DeviceState.ERROR:
            try:
                self.client.set_state(recover)
            except OSError:
                pass
            else:
                self._entered(recover)
                return
        self._reset(f"{cause.strerror}; ")
        raise ResetInsteadError(cause.errno, f"{cause.strerror}; it was reset") from cause

    def _entered(self, state: DeviceState) -> None:
        if state in SAVING_STATES and self._state not in SAVING_STATES:
            self._sessions += 1
        changed, self._state = self._state is not state, state
        _log.debug("vfio_migration_set_state", device=self.name, state=state.name)
        if changed:
            self.on_state(self.name, state)

    def reset(self) -> None:
        """Reset the device: it is in RUNNING, and its saving session and its log have ended. Else ResetFailedError."""
        with self._lock:
            self._reset("")

    def _reset(self, before: str) -> None:
        try:
            self.client.reset()
        except OSError as error:
            raise ResetFailedError(error.errno, f"{before}{error.strerror}") from error
        self._entered(DeviceState.RUNNING)

    def read_saved(self, size: int) -> tuple[int, Buffer]:
        """Return the saving session and what can be read of it, nothing if there is none.

        OSError from the device, or what has kept it out of a session that it should be in.
        """
        with self._lock:
            if self.failure is not None:
                raise self.failure
            session = self.session
            if not session:
                return 0, b""
            if self._read_session != session:
                self._read_session = session
                copy = self._state is DeviceState.STOP_COPY
                _log.debug("vfio_save_complete_precopy_start" if copy else "vfio_save_iterate_start", device=self.name)
            data = self.client.mig_data_read(size)
            name = "vfio_save_block" if data else "vfio_save_block_precopy_empty_hit"
            _log.debug(name, device=self.name, state=self._state.name, data_size=len(data), buffer_size=size)
            return session, data

    def sizes(self) -> Sizes:
        """Return how much there is to read. OSError from the device, but not of the length, which may be unknown."""
        with self._lock:
            precopy = self.client.precopy_info() if self._state in PRECOPY_STATES else None
            try:
                length, failed = self.client.stop_copy_length(), False
            except OSError:
                length, failed = None, True
            _log.debug("vfio_state_pending_exact", device=self.name, stop_copy_size=length, precopy=precopy)
            return Sizes(self.session, precopy, length, failed)

    def guest_enable(self) -> None:
        """Do what a guest does to use the device: memory decoding and bus mastering on, MSI-X on."""
        self._write_config(COMMAND, (COMMAND_MEMORY | COMMAND_BUS_MASTER).to_bytes(2, "little"))
        control = self._msix_control()
        if control is not None:
            value = int.from_bytes(self.client.region_read(CONFIG_REGION, control, 2), "little") | MSIX_ENABLE
            self._write_config(control, value.to_bytes(2, "little"))

    def _msix_control(self) -> int | None:
        config = self.config_space()
        offset = config[CAPABILITIES] & 0xFC
        for _ in range(48):  # as many capabilities as fit; a chain that loops ends here
            if not offset:
                return None
            if config[offset] == CAPABILITY_MSIX:
                return offset + 2
            offset = config[offset + 1] & 0xFC
        return None

    def config_space(self) -> bytes:
        """Read the whole PCI configuration space."""
        size = next(region.size for region in self.client.regions if region.index == CONFIG_REGION)
        return bytes(self.client.region_read(CONFIG_REGION, 0, size))

    def restore_config(self, config: bytes) -> None:
        """Write back what software may write: BARs, command register, MSI-X control (contract M7)."""
        for register in BAR_REGISTERS:
            self._write_config(register, config[register : register + 4])
        self._write_config(COMMAND, config[COMMAND : COMMAND + 2])
        control = self._msix_control()
        if control is not None:
            self._write_config(control, config[control : control + 2])

    def _write_config(self, offset: int, data: bytes) -> None:
        self.client.region_write(CONFIG_REGION, offset, data)

    def drain(self) -> Pending:
        """Take everything pending out of the eventfds; nobody else reads them while the machine stands still."""
        return Pending(_drain(self.interrupts), _drain(self.doorbells))

    def signal(self, pending: Pending) -> None:
        """Signal once what was pending; drivers and devices accept spurious signals."""
        for index in pending.vectors:
            os.eventfd_write(self.interrupts[index], 1)
        for index in pending.doorbells:
            os.eventfd_write(self.doorbells[index], 1)

    def digest(self) -> Digest:
        """Hash what can be read from outside in STOP: config space, readable BARs, and a dump where comparable."""
        bars = tuple(
            self._hash_bar(region.index, region.size)
            for region in self.client.regions
            if region.index < 6 and region.size and region.flags & VFIO_REGION_INFO_FLAG_READ
        )
        extension = self.client.extension
        dump = self._hash_dump() if extension is not None and extension.comparable_dump else 0
        return Digest(xxhash.xxh3_64_intdigest(self.config_space()), bars, dump, compared=bool(bars or dump))

    def _hash_bar(self, index: int, size: int) -> int:
        state = xxhash.xxh3_64()
        for offset in range(0, size, READ_SIZE):
            state.update(self.client.region_read(index, offset, min(READ_SIZE, size - offset)))
        return state.intdigest()

    def _hash_dump(self) -> int:
        state = xxhash.xxh3_64()
        self.enter(DeviceState.STOP_COPY, recover=DeviceState.STOP)
        while data := self.client.mig_data_read(READ_SIZE):
            state.update(data)
        self.enter(DeviceState.STOP, recover=DeviceState.STOP)
        return state.intdigest()

    def close(self) -> None:
        """Let go of the device; a device of ours ends with its connection."""
        self.client.close()
        for fd in (*self.interrupts, *self.doorbells):
            os.close(fd)
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def _drain(eventfds: Sequence[int]) -> tuple[int, ...]:
    signalled = []
    for index, fd in enumerate(eventfds):
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            continue
        signalled.append(index)
    return tuple(signalled)


def start_device(spec: DeviceSpec, directory: Path, *, trace: bool) -> tuple[Path, subprocess.Popen[bytes]]:
    """Start the process of an emulated device; return the socket that it will listen on."""
    knobs = {**spec.knobs, "trace": True} if trace else spec.knobs
    path = directory / f"{spec.name}.sock"
    with (directory / f"{spec.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "common.devices", spec.kind),
                *("--name", spec.name, "--socket", str(path), "--knobs", json.dumps(knobs)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    return path, process


def connect_device(
    spec: DeviceSpec, path: Path, process: subprocess.Popen[bytes], timeout: float = 20.0
) -> AttachedDevice:
    """Connect to a device that was started; raise OSError if it does not come up within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        if process.poll() is not None:
            raise OSError(f"{spec.name}: its process has ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{spec.name}: has not come up in {timeout:.0f} s")
        time.sleep(0.002)
    return AttachedDevice(spec, VfioUserClient.connect(path, name=spec.name, timeout=REQUEST_SECONDS), process)
