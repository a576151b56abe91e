"""A device of the machine: its process, its connection, its interrupts and doorbell, its migration state."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import xxhash

from common.machine import pci_config
from common.machine.device_config import DeviceSpec
from common.machine.device_process import StartedDevice
from common.vfio.feature import Buffer, PrecopyInfo
from common.vfio.migration import PRECOPY_STATES, SAVING_STATES, DeviceState, MigrationFlags
from common.vfio_user.client import DeviceError, VfioUserClient
from common.vfio_user.description import IrqInfo

__all__ = [
    "DEFERRED_BYTES",
    "AttachedDevice",
    "Digest",
    "Pending",
    "ResetFailedError",
    "ResetInsteadError",
    "Saved",
    "Sizes",
]

_log = structlog.get_logger()

CONFIG_REGION = 7
# Kinds of interrupts, best first (kernel: VFIO_PCI_*_IRQ_INDEX).
VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX = 0, 1, 2
INTERRUPTS = (VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX)
VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
VFIO_IRQ_SET_DATA_NONE_ACTION_UNMASK = 0x11
VFIO_IRQ_SET_DATA_EVENTFD_ACTION_TRIGGER = 0x24
VFIO_REGION_INFO_FLAG_READ = 1
# Most of a device that is read for a deferred verdict: the destination reads in the blackout, which is to be short.
DEFERRED_BYTES = 64 << 20
MAX_VECTORS = 32  # that are given to the guest
READ_SIZE = 1 << 20
EVENTFD = "anon_inode:[eventfd]"
_NOT_THERE = frozenset({errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS})


@dataclass(frozen=True, slots=True)
class Pending:
    """What was signalled and not yet seen: interrupt vectors by the guest, doorbells by the device."""

    vectors: tuple[int, ...] = ()
    doorbells: tuple[int, ...] = ()

    def __or__(self, other: Pending) -> Pending:
        return Pending(
            tuple(sorted({*self.vectors, *other.vectors})), tuple(sorted({*self.doorbells, *other.doorbells}))
        )


@dataclass(frozen=True, slots=True)
class Digest:
    """xxh3_64 of everything that can be read of a stopped device; `dump` is 0 where no dump can be compared.

    `compared`: there is more than its config space, so that what it holds is compared too.
    """

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


@dataclass(frozen=True, slots=True)
class Saved:
    """What was read of saving session `session`, 0: there is none. `ended`: in STOP_COPY, and there is no more."""

    session: int
    data: Buffer
    ended: bool


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

    def __init__(self, spec: DeviceSpec, client: VfioUserClient, started: StartedDevice) -> None:
        self.spec = spec
        self.name = spec.name
        self.client = client
        self.on_state: Callable[[str, DeviceState], None] = lambda _name, _state: None
        self.failure: OSError | None = None
        self._started = started
        self._state = DeviceState.RUNNING
        self._sessions = 0
        self._read_session = 0  # of the last read
        # Held by changes of state and by what must not fall into two sessions.
        self._lock = threading.Lock()
        self.config_size = next((region.size for region in client.regions if region.index == CONFIG_REGION), 0)
        if not pci_config.MIN_SIZE <= self.config_size <= pci_config.MAX_SIZE:
            raise DeviceError(
                errno.EPROTO,
                f"{self.name}: its configuration space has {self.config_size} bytes, that of a PCI device has from "
                f"{pci_config.MIN_SIZE} to {pci_config.MAX_SIZE}",
            )
        self.bar_sizes = {region.index: region.size for region in client.regions if region.index < 6 and region.size}
        kinds = {irq.index: irq for irq in client.irqs if irq.count}
        irq = next((kinds[index] for index in INTERRUPTS if index in kinds), IrqInfo(VFIO_PCI_INTX_IRQ_INDEX))
        self._irq_index = irq.index
        self.masks_itself = bool(irq.flags & VFIO_IRQ_INFO_AUTOMASKED)
        vectors = min(irq.count, MAX_VECTORS)
        self.interrupts = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(vectors)]
        self.doorbells = self._find_doorbells() if 0 in self.bar_sizes else []
        if vectors:
            client.set_irqs(irq.index, VFIO_IRQ_SET_DATA_EVENTFD_ACTION_TRIGGER, 0, vectors, fds=self.interrupts)

    def _find_doorbells(self) -> list[int]:
        try:
            found = [area.fd for area in self.client.get_region_io_fds(0)]
        except OSError as error:
            if error.errno in _NOT_THERE:
                return []
            raise
        if any(os.readlink(f"/proc/self/fd/{fd}") != EVENTFD for fd in found):
            for fd in set(found):
                os.close(fd)
            raise DeviceError(errno.EPROTO, f"{self.name}: a descriptor that it gives as a doorbell is no eventfd")
        return found

    @property
    def migration_flags(self) -> MigrationFlags:
        """What a migration may use of what the device can do: nothing if it was told not to migrate.

        A device that does not tell how much there is to read in PRE_COPY (no PRECOPY_INFO, as everybody's but ours) is
        not taken there unless `pre_copy = "on"`: with some, what they give in STOP_COPY goes on where PRE_COPY ended,
        with others it begins again, and nothing tells which. A device that never was in PRE_COPY gives all of it.
        """
        flags = MigrationFlags(0) if self.spec.migration == "off" else MigrationFlags(self.client.migration_flags)
        tells = self.client.extension is not None and self.client.extension.precopy_info
        use = tells if self.spec.pre_copy == "auto" else self.spec.pre_copy == "on"
        return flags if use else flags & ~MigrationFlags.PRE_COPY

    @property
    def notes(self) -> list[str]:
        """What is not known of the device, and which rule is followed for that, in sentences."""
        extension = self.client.extension
        found = []
        if self.client.migration_flags & MigrationFlags.PRE_COPY and not self.migration_flags & MigrationFlags.PRE_COPY:
            found.append(
                "PRE_COPY is not used: "
                + (
                    "the machine file says so"
                    if self.spec.pre_copy == "off" or self.spec.migration == "off"
                    else "it does not tell how much there is to read in it, so nobody can know whether STOP_COPY goes "
                    'on after it or begins again; pre_copy = "on" if it goes on'
                )
            )
        if self.migration_flags and not (extension is not None and extension.data_size):
            found.append(
                "how much state it has is not known before it is read: the expected downtime does not contain it"
            )
        if self.client.dma_logging and not (extension is not None and extension.report_ranges):
            found.append("its log of DMA is asked mapping by mapping: it does not promise to answer other ranges")
        return found

    @property
    def reports_ranges(self) -> bool:
        """Whether its log can be asked for any range, of unmapped IOVAs too (docs/vfio-user-extensions.md)."""
        return self.client.extension is not None and self.client.extension.report_ranges

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

    def enter(
        self,
        target: DeviceState,
        recover: DeviceState = DeviceState.ERROR,
        *,
        only_from: DeviceState | None = None,
    ) -> None:
        """Change the migration state, step by step as the device decides; do nothing if it is there already.

        `only_from`: for who knows it in that state and may be late; OSError EINVAL if it is in another.

        On failure go to `recover` if that is not ERROR, else or if that fails too reset the device, and raise the first
        error, as it is or as `ResetInsteadError` (QEMU: vfio_migration_set_state; contract M2). ResetFailedError if
        nothing helps.
        """
        with self._lock:
            if self._state is target or not self.migration_flags:
                return
            if only_from is not None and only_from is not self._state:
                raise OSError(errno.EINVAL, f"{self.name}: is in {self._state.name}, not in {only_from.name}")
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

    def read_saved(self, size: int) -> Saved:
        """Read up to `size` bytes; no data, if that is not the end: there are none now.

        What is short in STOP_COPY is likely to be all, so the device is asked for more at once: a machine stands still.
        OSError from the device, or what has kept it out of a session that it should be in.
        """
        with self._lock:
            if self.failure is not None:
                raise self.failure
            session = self.session
            if not session:
                return Saved(0, b"", ended=True)
            copy = self._state is DeviceState.STOP_COPY
            if self._read_session != session:
                self._read_session = session
                _log.debug("vfio_save_complete_precopy_start" if copy else "vfio_save_iterate_start", device=self.name)
            data: Buffer = self.client.mig_data_read(size)
            ended = copy and not data
            if copy and 0 < len(data) < size:
                data, more = bytes(data), self.client.mig_data_read(size - len(data))
                data, ended = data + bytes(more), not more
            name = "vfio_save_block" if data else "vfio_save_block_precopy_empty_hit"
            _log.debug(name, device=self.name, state=self._state.name, data_size=len(data), buffer_size=size)
            return Saved(session, data, ended)

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
        """Do what a guest does to use the device: its kind of interrupts on, memory decoding and bus mastering on."""
        config = self.config_space()
        for irq, number, enable in (
            (VFIO_PCI_MSIX_IRQ_INDEX, pci_config.MSIX, pci_config.MSIX_ENABLE),
            (VFIO_PCI_MSI_IRQ_INDEX, pci_config.MSI, pci_config.MSI_ENABLE),
        ):
            offset = pci_config.capability(config, number)
            if irq == self._irq_index and offset is not None:
                control = int.from_bytes(config[offset + 2 : offset + 4], "little") | enable
                self._write_config(offset + 2, control.to_bytes(2, "little"))
        command = pci_config.COMMAND_MEMORY | pci_config.COMMAND_BUS_MASTER
        self._write_config(pci_config.COMMAND, command.to_bytes(2, "little"))

    def unmask(self) -> None:
        """Let a level-triggered interrupt come again that has masked itself when it came (kernel: automasked INTx)."""
        if self.masks_itself:
            self.client.set_irqs(self._irq_index, VFIO_IRQ_SET_DATA_NONE_ACTION_UNMASK, 0, 1)

    def config_space(self) -> bytes:
        """Read the whole PCI configuration space."""
        return bytes(self.client.region_read(CONFIG_REGION, 0, self.config_size))

    def restore_config(self, config: bytes) -> None:
        """Write back what a guest had written and what is not there yet (contract M7)."""
        ours = self.config_space()
        for offset, size in pci_config.guest_registers(config):
            if config[offset : offset + size] != ours[offset : offset + size]:
                self._write_config(offset, config[offset : offset + size])

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

    def digest(self, most: int | None = None) -> Digest:
        """Hash what can be read from outside in STOP: config space, readable BARs, and a dump where comparable.

        If BARs and dump are more than `most` bytes, only the config space: reading takes as long as moving.
        """
        config = xxhash.xxh3_64_intdigest(self.config_space())
        regions = [
            region
            for region in self.client.regions
            if region.index < 6
            and region.size
            and region.flags & VFIO_REGION_INFO_FLAG_READ
            and (self.spec.compare_bars is None or region.index in self.spec.compare_bars)
        ]
        extension = self.client.extension
        dumps = extension is not None and extension.comparable_dump
        if most is not None:
            size = sum(region.size for region in regions)
            if size > most or (dumps and size + (self.client.stop_copy_length() or 0) > most):
                return Digest(config, (), 0, compared=False)
        bars = tuple(self._hash_bar(region.index, region.size) for region in regions)
        dump = self._hash_dump() if dumps else 0
        return Digest(config, bars, dump, compared=bool(bars or dump))

    def _hash_bar(self, index: int, size: int) -> int:
        state = xxhash.xxh3_64()
        for offset in range(0, size, READ_SIZE):
            state.update(self.client.region_read(index, offset, min(READ_SIZE, size - offset)))
        return state.intdigest()

    def _hash_dump(self) -> int:
        state = xxhash.xxh3_64()
        # The migration may end while this is read: then somebody else has taken the device away.
        self.enter(DeviceState.STOP_COPY, recover=DeviceState.STOP, only_from=DeviceState.STOP)
        while data := self.client.mig_data_read(READ_SIZE):
            state.update(data)
        self.enter(DeviceState.STOP, recover=DeviceState.STOP, only_from=DeviceState.STOP_COPY)
        return state.intdigest()

    def close(self) -> None:
        """Let go of the device, and end it if we have started it."""
        self.client.close()
        for fd in {*self.interrupts, *self.doorbells}:
            os.close(fd)
        self._started.close()


def _drain(eventfds: Sequence[int]) -> tuple[int, ...]:
    signalled = []
    count = bytearray(8)
    for index, fd in enumerate(eventfds):
        try:
            # A device that made it may have made it blocking, and may read it too: no poll could promise that this
            # read does not wait.
            os.preadv(fd, [count], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        signalled.append(index)
    return tuple(signalled)
