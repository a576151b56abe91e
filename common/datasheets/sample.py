"""sample: the device of libvfio-user's sample server: a timer, a memory, DMA when the timer fires, INTx.

BAR 0 is one register of 8 bytes, TIMER. Written, it is a time in whole seconds since 1970 (CLOCK_REALTIME), and when
that has come, at once if it has gone by, the device asserts INTx and then writes DMA_CONTENT to the first page of two
of its mappings, and reads it back: of the second one directly, and of the first one by message, although it is mapped.
Read, it is the seconds that have passed since that time (negative: that are left).
BAR 1 is memory.

Ours, where theirs is not as exact: an access to TIMER takes INTx back; 0 disarms the timer, and only 8 bytes without
the highest bit can be written. First and second are by IOVA, among the mappings that can be read and written; without
two of them there is less DMA. The clock of a device that is stopped stands at 0. BARs are powers of two, the rest of
them reads as zero and ignores writes. Bus mastering is on after power-on: the clients that the device is made for never
switch it on.
The state is that of theirs, so it moves between ours and theirs: the memory, and TIMER, negated if it is not armed.
PRE_COPY brings the memory, and STOP_COPY begins again with it; so of what is loaded, what counts is the end. Where ours
has begun to bring the memory in PRE_COPY and was stopped, STOP_COPY brings the rest of it first: a whole stream has one
of two lengths, and every other is refused. Nothing in it tells more: one that is cut off 8 bytes after the end of
PRE_COPY has the length of a whole one without PRE_COPY, and is taken for it.
"""

from __future__ import annotations

VENDOR_ID = 0xDEAD
DEVICE_ID = 0xBEEF
SUBSYSTEM = (0xCAFE, 0xBABE)  # its vendor and ID

TIMER_BAR = 0
TIMER_BAR_SIZE = 0x1000  # of ours; theirs are as large as what is in them
TIMER = 0x00
TIMER_SIZE = 8
MEMORY_BAR = 1
MEMORY_BAR_SIZE = 0x4000
MEMORY_SIZE = 0x3000
DMA_CONTENT = b"".join(bytes([letter]) * 1024 for letter in b"ABCD")
