"""The sample device of libvfio-user as its driver sees it: a timer, a memory, DMA when the timer fires, INTx.

BAR 0 is one register of 8 bytes: writing it sets the timer to a time in whole seconds since 1970, reading it gives the
seconds that have passed since that time. BAR 1 is memory. When the timer fires, the device raises INTx and writes
`DMA_CONTENT` to the first page of what was mapped for it first, by message, and second, directly.
"""

from __future__ import annotations

TIMER = 0x00
TIMER_SIZE = 8
MEMORY_BAR = 1
MEMORY_SIZE = 0x3000
DMA_CONTENT = b"".join(bytes([letter]) * 1024 for letter in b"ABCD")
