"""What the C library does with the memory of large messages."""

from __future__ import annotations

import ctypes

__all__ = ["tune_allocator"]


def tune_allocator() -> None:
    """Keep freed message buffers instead of handing them back to the kernel, and all of them in one place.

    glibc maps every block of a message's size afresh and unmaps it again, so that each message faults in all of its
    pages anew: a third of a gRPC stream's time, more than half of a REPORT's. And it keeps an arena for each thread, of
    which a server has many.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_arena_max = -1, -2, -3, -8
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 64 << 20)
        libc.mallopt(m_trim_threshold, 128 << 20)
        libc.mallopt(m_top_pad, 16 << 20)
        libc.mallopt(m_arena_max, 1)
    except (OSError, AttributeError):
        return
