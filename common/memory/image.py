"""Fill guest RAM from real files, so that a machine without a guest operating system has memory like one that has.

Random bytes do not compress and zeros compress too well; page caches, programs and libraries are most of what a guest's
RAM holds, and a host has them at hand. No byte is used twice, for memory that repeats itself flatters every codec.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from common.memory import runs
from common.memory.layout import PAGE_SIZE
from common.memory.ram import GuestRam
from common.memory.runs import Runs

__all__ = ["MAX_EXTENT", "MIN_EXTENT", "ImageReport", "fill", "plan"]

# Pages that files fill without a gap.
MIN_EXTENT = 16
MAX_EXTENT = 512
_BUFFER_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class ImageReport:
    """What RAM was filled with: files and their bytes, pages that hold zeros, pages that hold nothing."""

    files: int
    bytes: int
    zero_pages: int
    hole_pages: int


def plan(pages: int, zero_fraction: float, seed: int) -> tuple[Runs, Runs]:
    """Return the runs for files and the runs for zeros among `pages` pages; all else stays holes.

    Runs for files have `MIN_EXTENT` to `MAX_EXTENT` pages (the last one what is left), and gaps after them that come to
    `zero_fraction` of the pages. Half of each gap is zeros, at its beginning or its end. `ValueError` unless
    0 ≤ `zero_fraction` ≤ 1.
    """
    if not 0 <= zero_fraction <= 1:
        raise ValueError(f"the fraction of zero pages must be from 0 to 1, not {zero_fraction}")
    gap_pages = round(pages * zero_fraction)
    data_pages = pages - gap_pages
    random = np.random.Generator(np.random.Philox(seed))
    sizes = random.integers(MIN_EXTENT, MAX_EXTENT, -(-data_pages // MIN_EXTENT), endpoint=True)
    data_end = np.minimum(np.cumsum(sizes), data_pages)
    data_count = np.diff(data_end, prepend=0)
    data_count = data_count[data_count > 0]
    if not data_count.size:
        return runs.one(0, 0), runs.one(0, gap_pages // 2)
    shares = np.cumsum(random.random(data_count.size) + 0.1)
    gap_end = np.rint(shares / shares[-1] * gap_pages).astype(np.int64)
    gap_count = np.diff(gap_end, prepend=0)
    zero_count = np.diff(gap_end // 2, prepend=0)
    data_first = np.cumsum(data_count + gap_count) - data_count - gap_count
    at_end = random.random(data_count.size) < 0.5
    zero_first = data_first + data_count + np.where(at_end, gap_count - zero_count, 0)
    filled = zero_count > 0
    return (data_first, data_count), (zero_first[filled], zero_count[filled])


def fill(
    ram: GuestRam, paths: Sequence[Path], *, start_page: int, zero_fraction: float = 0.4, seed: int
) -> ImageReport:
    """Fill new RAM from `start_page` on with the contents of files, and of files in directories.

    Directories are read in sorted order. What is not a regular file, cannot be read, or has been used already (the same
    inode, or the same contents) is left out without a word. When the files run out the rest stays holes.
    """
    if not 0 <= start_page <= ram.layout.pages:
        raise ValueError(f"page {start_page} is not in RAM of {ram.layout.pages} pages")
    pages = ram.layout.pages - start_page
    (data_first, data_count), (zero_first, zero_count) = plan(pages, zero_fraction, seed)
    source = _Source(paths)
    used_pages = 0
    end = start_page
    for first, count in zip((data_first + start_page).tolist(), data_count.tolist(), strict=True):
        got = source.read(ram, first, count)
        used_pages += -(-got // PAGE_SIZE)
        end = first + count
        if got < count * PAGE_SIZE:
            break
    else:
        end = ram.layout.pages
    source.close()
    zero_pages = 0
    for first, count in zip((zero_first + start_page).tolist(), zero_count.tolist(), strict=True):
        if first < end:
            # A page that was allocated and never written is zero.
            ram.populate(first, count)
            zero_pages += count
    return ImageReport(source.files, source.bytes, zero_pages, pages - used_pages - zero_pages)


class _Source:
    """The contents of files, one after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = 0
        self.bytes = 0
        self._rest = _contents(paths)
        self._file: io.FileIO | None = None
        self._left = 0

    def read(self, ram: GuestRam, first: int, pages: int) -> int:
        """Read into pages of RAM; return the bytes that there were."""
        done, size = 0, pages * PAGE_SIZE
        while done < size:
            if self._file is None:
                self._file = next(self._rest, None)
                if self._file is None:
                    break
                self._left = os.fstat(self._file.fileno()).st_size
                self.files += 1
            begin = first * PAGE_SIZE + done
            end = begin + min(self._left, size - done)
            # Allocating what is about to be read costs a fraction of faulting it in page by page.
            ram.populate(begin // PAGE_SIZE, -(-end // PAGE_SIZE) - begin // PAGE_SIZE)
            try:
                got = self._file.readinto(ram.view[begin:end])
            except OSError:
                got = 0
            done += got
            self.bytes += got
            self._left -= got
            if not got or not self._left:
                self._file.close()
                self._file = None
        return done

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _contents(paths: Sequence[Path]) -> Iterator[io.FileIO]:
    """Yield files with contents that no file before them had, at their beginning."""
    inodes: set[tuple[int, int]] = set()
    digests: set[bytes] = set()
    buffer = memoryview(bytearray(_BUFFER_SIZE))
    for path in _walk(paths):
        try:
            status = path.lstat()
            inode = status.st_dev, status.st_ino
            if not stat.S_ISREG(status.st_mode) or not status.st_size or inode in inodes:
                continue
            inodes.add(inode)
            file = io.FileIO(path)
        except OSError:
            continue
        try:
            digest = xxhash.xxh3_128()
            while got := file.readinto(buffer):
                digest.update(buffer[:got])
            file.seek(0)
        except OSError:
            file.close()
            continue
        if digest.digest() in digests:
            file.close()
            continue
        digests.add(digest.digest())
        yield file


def _walk(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for directory, directories, files in os.walk(path):
            directories.sort()
            for name in sorted(files):
                yield Path(directory, name)
