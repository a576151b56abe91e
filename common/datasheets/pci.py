"""What our devices with a ring have in common as PCI functions.

BAR 0 holds registers (trapped), BAR 2 device memory where a device has some (trapped), BAR 4 the MSI-X table. Registers
are little-endian, 4 or 8 bytes wide, naturally aligned. The doorbell is an ioeventfd in BAR 0: writing it carries no
value, it only says "look at the ring".
"""

from __future__ import annotations

VENDOR_ID = 0x5357
REGISTERS_BAR = 0
REGISTERS_SIZE = 0x1000
MEMORY_BAR = 2
MSIX_BAR = 4
MSIX_BAR_SIZE = 0x1000
DOORBELL = 0x800

# Registers that every device has at the same place.
ID = 0x00  # u32, read-only: the device's magic
STATUS = 0x04  # u32, read-only: STATUS_*
CONTROL = 0x08  # u32: CONTROL_*
RING_BASE = 0x10  # u64: IOVA of the ring; takes effect when CONTROL_ENABLE is set
RING_ENTRIES = 0x18  # u32: a power of two
HEAD = 0x1C  # u32, read-only: free-running count of ring entries that the device has finished
FAULTS = 0x20  # u32, read-only: DMA accesses that were refused
INTERRUPT = 0x24  # u32: INTERRUPT_*, why INTx is asserted; a 1 that is written clears the bit. Unused with MSI-X

STATUS_ENABLED = 1 << 0
STATUS_FAULT = 1 << 1
CONTROL_ENABLE = 1 << 0
INTERRUPT_RING = 1 << 0  # ring entries were finished

# A ring starts with 64 bytes of which the first 4 are its tail (u32, free-running: entries posted by the driver); the
# entries follow. Entry n lies at RING_BASE + RING_HEADER + (n % entries) * entry size.
# The ring begins at RING_BASE, which is a multiple of 64, and has at most 32768 entries. The device follows
# CONTROL_ENABLE after its present step, and STATUS_ENABLED says that it has: setting it starts at entry 0 and clears
# STATUS_FAULT. A ring that is impossible or cannot be reached sets STATUS_FAULT and clears STATUS_ENABLED;
# CONTROL_ENABLE must then be cleared and set again.
# An entry's `done` or `status` is written last, after the rest of it and after HEAD; the interrupt follows.
RING_HEADER = 64
VECTOR = 0  # the MSI-X vector that devices with a ring signal when they have finished entries; without MSI-X: INTx
