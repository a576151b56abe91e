"""RAM as files in shared memory, which QEMU and plain sockets move; ours holds the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from common.memory.image import ImageReport, fill
from common.memory.layout import PAGE_SIZE
from common.memory.ram import GuestRam

__all__ = ["ZERO_FRACTION", "clear", "differing_pages", "write_files", "write_random"]

ZERO_FRACTION = 0.4
PART = 64 << 20


def write_random(path: Path, size: int) -> None:
    """Write a file of bytes that no codec makes smaller, the same ones each time."""
    random = np.random.Generator(np.random.SFC64(1))
    with path.open("wb") as file:
        for start in range(0, size, PART):
            file.write(random.bytes(min(PART, size - start)))


def write_files(path: Path, size: int, corpus: Path) -> ImageReport:
    """Write a file of other files' contents, `ZERO_FRACTION` of its pages zero; `ValueError` if they do not fill it."""
    with GuestRam.create(size) as ram:
        report = fill(ram, [corpus], start_page=0, zero_fraction=ZERO_FRACTION, seed=1)
        wanted = round(size * (1 - ZERO_FRACTION))
        if report.bytes < wanted * 0.99:
            raise ValueError(f"{corpus} has {report.bytes >> 20} MiB of distinct files, not {wanted >> 20}")
        with path.open("wb") as file:
            for start in range(0, size, PART):
                file.write(ram.view[start : start + PART])
    return report


def clear(path: Path, size: int) -> None:
    """Make a file of zeros, whose memory is allocated; that of an earlier one is kept."""
    if not path.exists():
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    np.memmap(path, np.uint8, "r+")[:] = 0


def differing_pages(one: Path, other: Path) -> int:
    """Return how many pages of two files of one size differ."""
    first, second = (np.memmap(path, "<u8", "r").reshape(-1, PAGE_SIZE // 8) for path in (one, other))
    step = PART // PAGE_SIZE
    parts = range(0, len(first), step)
    return sum(int((first[at : at + step] != second[at : at + step]).any(axis=1).sum()) for at in parts)
