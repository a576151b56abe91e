"""nic: receives the packets of a generator into posted buffers, at a steady rate (datasheets, nic)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

from common.datasheets import nic, pattern, pci
from common.devices.dma import DmaFault, DmaStalled
from common.devices.knobs import Knobs
from common.devices.ring_device import Entry, RingDevice
from common.vfio.migration import MigrationFlags

__all__ = ["Nic", "NicKnobs"]

_CLASS_ETHERNET = 0x020000
_FILLED, _REFUSED = 1, 2
_MIN_BUFFER, _MAX_BUFFER = 64, 64 << 10
_BURST = 0.01  # seconds of its rate that the generator makes up for after it could not send
_PEER_INTERVAL = 0.004  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class NicKnobs(Knobs):
    """Knobs of a nic: `rate` in bytes per second, `packet` its size in bytes (a smaller buffer gets a smaller one)."""

    KIND_FLAGS: ClassVar[MigrationFlags] = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY

    rate: float = 20e6
    packet: int = 1500

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)  # super() would find the class that slots have replaced
        if not 1 <= self.rate <= 1e11:
            raise ValueError(f"rate {self.rate} is not within 1 and 1e11 bytes per second")
        if not _MIN_BUFFER <= self.packet <= _MAX_BUFFER:
            raise ValueError(f"packet {self.packet} is not within {_MIN_BUFFER} and {_MAX_BUFFER} bytes")


class Nic(RingDevice):
    """The device; its generator's position is in its registers, so there is no other state."""

    ENTRY = nic.ENTRY
    COMPLETION = "done"
    CONTROL_MASK = pci.CONTROL_ENABLE | nic.CONTROL_PEER

    def __init__(self, name: str, knobs: NicKnobs) -> None:
        super().__init__(name, knobs, magic=nic.MAGIC, device_id=nic.DEVICE_ID, class_code=_CLASS_ETHERNET, geometry=0)
        self.registers.define(nic.SEQUENCE, 8)
        self.registers.define(nic.PEER_BASE, 8, mask=(1 << 64) - 1)
        self.registers.define(nic.PEER_SIZE, 4, mask=0xFFFF_FFFF)
        self.registers.define(nic.PEER_SEQUENCE, 8)
        self._rate = knobs.rate
        self._packet = knobs.packet
        self._credit = 0.0  # bytes that may be sent at once
        self._credited = 0.0  # when that was so
        self._peer_due = 0.0

    def allowance(self, posted: int, now: float) -> tuple[int, float]:
        """Return how many packets the rate has room for."""
        earned = self._credit + (now - self._credited) * self._rate
        self._credit = min(earned, max(self._rate * _BURST, float(self._packet)))
        self._credited = now
        packets = int(self._credit // self._packet)
        if not packets:
            return 0, (self._packet - self._credit) / self._rate
        return min(packets, posted), 0.0

    def execute(self, entry: Entry) -> Entry:
        """Fill one buffer with the next packet."""
        iova, size, *_ = entry
        if not _MIN_BUFFER <= size <= _MAX_BUFFER:
            return iova, size, _REFUSED, 0, 0, 0
        sequence = self.registers.get(nic.SEQUENCE, 8)
        packet = pattern.block(sequence, min(size, self._packet))
        try:
            self.dma.write(iova, packet)
        except DmaFault:
            self.fault()
            return iova, size, _REFUSED, 0, 0, 0
        self._credit -= len(packet)
        self.registers.put(nic.SEQUENCE, 8, sequence + 1)
        return iova, size, _FILLED, sequence, len(packet), zlib.crc32(packet)

    def background(self, now: float) -> float | None:
        """Write the next block to the peer, if there is one, and it is time."""
        if not self.registers.get(pci.CONTROL, 4) & nic.CONTROL_PEER:
            return None
        if now < self._peer_due:
            return self._peer_due - now
        base = self.registers.get(nic.PEER_BASE, 8)
        size = self.registers.get(nic.PEER_SIZE, 4)
        sequence = self.registers.get(nic.PEER_SEQUENCE, 8)
        try:
            if not size or size % nic.PEER_BLOCK:
                raise DmaFault(f"a peer's window of {size} bytes")
            self.dma.write(base + sequence * nic.PEER_BLOCK % size, pattern.block(sequence, nic.PEER_BLOCK))
        except DmaStalled:
            return None
        except DmaFault:
            # Nobody is there: write no more until the driver says so again.
            self.fault()
            self.registers.change(pci.CONTROL, 4, clear=nic.CONTROL_PEER)
            return None
        self.registers.put(nic.PEER_SEQUENCE, 8, sequence + 1)
        self._peer_due = now + _PEER_INTERVAL
        return _PEER_INTERVAL
