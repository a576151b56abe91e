"""A device on a thread behind a socketpair, its client, and RAM to do DMA to: what a machine is to a device."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from common.datasheets import pci
from common.devices.__main__ import build
from common.devices.base import EmulatedDevice
from common.vfio.migration import DeviceState
from common.vfio_user.client import VfioUserClient
from common.vfio_user.codec import DMA_READABLE, DMA_WRITABLE
from common.vfio_user.description import IrqFlags
from common.vfio_user.server import VfioUserServer

RAM_SIZE = 4 << 20
PATIENCE = 10.0  # seconds until a test that waits for something has failed


class Memory:
    """Guest RAM: a sealed memfd and a view of it."""

    def __init__(self, size: int = RAM_SIZE) -> None:
        self.size = size
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.mmap = mmap.mmap(self.fd, size)

    def close(self) -> None:
        self.mmap.close()
        os.close(self.fd)


class Rig:
    """A device and all that a machine does to make it work."""

    RING = 0x1000

    def __init__(self, kind: str, ram: Memory, knobs: dict[str, Any]) -> None:
        self.ram = ram
        self.device: EmulatedDevice = build(kind, f"{kind}0", knobs)
        ours, theirs = socket.socketpair()
        self.server = VfioUserServer(self.device, theirs)
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()
        self.client = VfioUserClient(ours, f"{kind}0", timeout=PATIENCE)
        self.irq = os.eventfd(0, os.EFD_NONBLOCK)
        self.tail = 0
        self.size = 0

    def close(self) -> None:
        self.client.close()
        self.thread.join()
        os.close(self.irq)

    # What a machine and a driver do.

    def map_ram(self, iova: int = 0, size: int | None = None, offset: int = 0) -> None:
        self.client.dma_map(iova, size or self.ram.size, DMA_READABLE | DMA_WRITABLE, self.ram.fd, offset)

    def set_up(self) -> None:
        """Map RAM, wire the interrupt, allow DMA."""
        self.map_ram()
        self.client.set_irqs(2, IrqFlags.DATA_EVENTFD | IrqFlags.ACTION_TRIGGER, 0, 1, fds=[self.irq])
        self.bus_master(on=True)

    def bus_master(self, *, on: bool) -> None:
        self.client.region_write(7, 0x04, (0x6 if on else 0x2).to_bytes(2, "little"))

    def read(self, register: int, width: int = 4) -> int:
        return int.from_bytes(self.client.region_read(0, register, width), "little")

    def write(self, register: int, value: int, width: int = 4) -> None:
        self.client.region_write(0, register, value.to_bytes(width, "little"))

    def enable(self, entries: int, control: int = pci.CONTROL_ENABLE, base: int = RING) -> None:
        """Start a ring of `entries`, none of them posted, and wait until the device works on it."""
        self.size, self.tail, self.base = entries, 0, base
        self.ram.mmap[base : base + 4] = bytes(4)
        self.write(pci.RING_BASE, base, 8)
        self.write(pci.RING_ENTRIES, entries)
        self.write(pci.CONTROL, control)
        self.wait(lambda: self.read(pci.STATUS) & pci.STATUS_ENABLED != 0)

    def ring(self) -> np.ndarray[Any, np.dtype[np.void]]:
        """Return a copy of the ring's entries."""
        dtype = self.device.ENTRY
        start = self.base + pci.RING_HEADER
        return np.frombuffer(self.ram.mmap[start : start + self.size * dtype.itemsize], dtype=dtype)

    def post(self, *entries: tuple[Any, ...], ring_doorbell: bool = True) -> None:
        dtype = self.device.ENTRY
        for entry in entries:
            at = self.base + pci.RING_HEADER + self.tail % self.size * dtype.itemsize
            self.ram.mmap[at : at + dtype.itemsize] = np.array([entry], dtype=dtype).tobytes()
            self.tail += 1
        self.ram.mmap[self.base : self.base + 4] = self.tail.to_bytes(4, "little")
        if ring_doorbell:
            self.write(pci.DOORBELL, 1)

    def wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "what was waited for has not come"
            time.sleep(0.001)

    def wait_head(self, head: int) -> None:
        self.wait(lambda: self.read(pci.HEAD) == head)

    def interrupted(self) -> bool:
        """Wait for an interrupt and take it."""
        ready, _, _ = select.select([self.irq], [], [], PATIENCE)
        return bool(ready) and os.eventfd_read(self.irq) > 0

    def dump(self) -> bytes:
        """Return a full dump of the stopped device, which is in STOP afterwards."""
        self.client.set_state(DeviceState.STOP_COPY)
        data = self.drain()
        self.client.set_state(DeviceState.STOP)
        return data

    def drain(self, size: int = 1 << 20) -> bytes:
        parts = []
        while part := bytes(self.client.mig_data_read(size)):
            parts.append(part)
        return b"".join(parts)

    def load(self, data: bytes) -> None:
        """Bring the device to STOP with a state."""
        self.client.set_state(DeviceState.RESUMING)
        self.client.mig_data_write(data)
        self.client.set_state(DeviceState.STOP)
