"""sample: a timer that interrupts and then does a little DMA, and RAM: the device of libvfio-user's sample server.

BAR 0 is one register, TIMER. Written, it is armed: when the clock (CLOCK_REALTIME) has reached that second, at once if
it has already, the device asserts INTx, which an access to TIMER acknowledges, and then does its exercise: it writes
EXERCISE to the second of its mappings (in order of IOVA, of those that it may read and write), reads it back, and does
the same to the first one by messages, even though that is mapped. Without such mappings, or without bus mastering, it
does none. Read, TIMER says how many seconds ago it was due (negative: how many are left); the clock of a device that is
stopped stands at 0. Only 8 bytes at once can be written, 0 disarms it, and numbers with the highest bit are refused.

BAR 1 is RAM. The rest of both BARs reads as zero and ignores writes. The interrupt is INTx; there is no MSI-X. Bus
mastering is on after power-on, for the clients that this device is made for never switch it on.

Its state is that of libvfio-user's sample too: the RAM and then TIMER, negated once it has fired. Nothing else is in
it, so it moves between implementations. PRE_COPY brings the RAM, and STOP_COPY begins again with it; so of what is
loaded, what counts is the end.
"""

from __future__ import annotations

VENDOR_ID = 0xDEAD
DEVICE_ID = 0xBEEF
SUBSYSTEM = (0xCAFE, 0xBABE)

TIMER_BAR = 0
TIMER_BAR_SIZE = 0x1000
TIMER = 0x0  # i64: seconds since the epoch; read: seconds since then
RAM_BAR = 1
RAM_BAR_SIZE = 0x4000  # a BAR is a power of two
RAM_SIZE = 0x3000

EXERCISE = b"".join(letter * 1024 for letter in (b"A", b"B", b"C", b"D"))
