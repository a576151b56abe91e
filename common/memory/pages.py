"""The page codec: what of RAM goes into a batch, and from a batch into RAM.

A batch names runs of pages, has a bit for each page that is zero, and the bytes of the others. Holes are zero pages:
they are found without being read, and a batch of holes may cover gibibytes. Pages that hold data are looked at once,
a sample first, and those that turn out to be zero cost a bit each too. At the other end a page that was never written
stays a hole when zeros come for it.

RAM changes while it is encoded. That is right as long as the dirty bits were taken before `encode` was called (and the
data runs after them, if they are passed): a page that changes from then on is in the next round.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import lz4.block
import numpy as np
import numpy.typing as npt

from common.ipc.channel import Buffer
from common.memory import runs
from common.memory.layout import CHUNK_PAGES, PAGE_SIZE
from common.memory.ram import GuestRam
from common.memory.runs import Runs

__all__ = [
    "BATCH_PAGES",
    "MAX_BATCH_PAGES",
    "MAX_PAGES",
    "MAX_PAYLOAD",
    "MAX_RUNS",
    "Applier",
    "Encoding",
    "PageBatch",
    "belongs",
    "check",
    "encode",
    "lane_of",
    "split_lanes",
]

BATCH_PAGES = 256  # pages with a payload: 1 MiB
MAX_BATCH_PAGES = 1024  # the most of them that are accepted
MAX_PAGES = 1 << 22  # pages of any kind: 16 GiB of holes, 512 KiB of zero bits
MAX_RUNS = 1 << 16  # 1 MiB of run numbers
MAX_PAYLOAD = MAX_BATCH_PAGES * PAGE_SIZE + MAX_BATCH_PAGES * PAGE_SIZE // 255 + 16  # packed: LZ4_COMPRESSBOUND
# Pages looked at together: 64 MiB, so that a batch that is not full is rare, and zero pages fill no batches at all.
_WINDOW_PAGES = 1 << 14
# One word of each eighth of a page tells most pages that are not zero.
_SAMPLE = 64
# From so many scattered pieces on, one gather (which releases the interpreter lock) beats slices.
_MAX_PARTS = 64


class Encoding(enum.IntEnum):
    """How a payload is packed; the numbers are those on the wire."""

    RAW = 1
    LZ4 = 2


@dataclass(slots=True)
class PageBatch:
    """One message of a page lane.

    `run_first` and `run_pages` are page numbers and counts; `zero` has a bit for each page in the order of the runs,
    least significant first; `payload` is the bytes of the other pages in parts, which may be views of RAM as it
    changes.
    """

    sequence: int
    round: int
    encoding: int
    run_first: npt.NDArray[np.uint64]
    run_pages: npt.NDArray[np.uint64]
    zero: bytes
    payload: Sequence[Buffer]

    @property
    def pages(self) -> int:
        """Number of pages, zero pages too."""
        return int(self.run_pages.sum())

    @property
    def zero_pages(self) -> int:
        """Number of pages without payload."""
        return int(np.bitwise_count(np.frombuffer(self.zero, np.uint8)).sum(dtype=np.int64))

    @property
    def payload_bytes(self) -> int:
        """Size of the payload as it is packed."""
        return sum(map(len, self.payload))


def lane_of(page: int, lanes: int) -> int:
    """Return the lane of a page: all pages of a 2 MiB chunk share one, so that versions of a page never race."""
    return page // CHUNK_PAGES % lanes


def belongs(batch: PageBatch, lane: int, lanes: int) -> bool:
    """Return whether all pages of a batch, checked or not, are of this lane."""
    first, last = batch.run_first // CHUNK_PAGES, (batch.run_first + batch.run_pages - np.uint64(1)) // CHUNK_PAGES
    return lanes == 1 or bool(((first == last) & (first % lanes == lane)).all())


def split_lanes(first: npt.NDArray[np.int64], count: npt.NDArray[np.int64], lanes: int) -> list[Runs]:
    """Return the runs of each lane."""
    if lanes == 1:
        return [(first, count)]
    first, count = runs.cut_at_chunks((first, count))
    lane = first // CHUNK_PAGES % lanes
    return [(first[lane == number], count[lane == number]) for number in range(lanes)]


def encode(
    ram: GuestRam,
    first: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    *,
    round: int,  # noqa: A002 - the name that the field has everywhere
    compress: bool,
    data: Runs | None = None,
    batch_pages: int = BATCH_PAGES,
) -> Iterator[PageBatch]:
    """Yield batches that carry the pages of ascending runs, each page once; their sequence is 0.

    A batch has up to `batch_pages` (at most `MAX_BATCH_PAGES`) pages with a payload, of 4096 bytes before compression.

    `data` are the runs of RAM that hold data, if the caller has asked already: `ram.data_runs()`, called after the
    dirty bits were taken. Pages outside them are not read. A batch's payload refers to RAM: it is to be
    serialized before the next one is asked for. With `compress`, a payload that lz4 does not shrink goes as it
    is.
    """
    wanted = (first, count)
    present = ram.data_runs(wanted) if data is None else runs.intersect(wanted, data)
    absent = runs.subtract(wanted, present)
    for start in range(0, absent[0].size, MAX_RUNS):
        for window in _windows((absent[0][start : start + MAX_RUNS], absent[1][start : start + MAX_RUNS]), MAX_PAGES):
            yield _batch(round, window, _ones(runs.total(window)))
    scratch = np.empty((batch_pages, PAGE_SIZE), np.uint8) if compress else None
    for window in _windows(present, _WINDOW_PAGES):
        pages = runs.expand(window)
        zero = _zero_pages(ram, pages)
        # Zero pages go with the batch before them.
        begins = [0, *np.flatnonzero(~zero)[batch_pages::batch_pages].tolist(), pages.size]
        for begin, end in itertools.pairwise(begins):
            bits = zero[begin:end]
            batch = _batch(round, runs.from_pages(pages[begin:end]), np.packbits(bits, bitorder="little").tobytes())
            _fill(batch, ram, pages[begin:end][~bits], scratch)
            yield batch


def _batch(number: int, covered: Runs, zero: bytes) -> PageBatch:
    return PageBatch(0, number, Encoding.RAW, covered[0].astype(np.uint64), covered[1].astype(np.uint64), zero, ())


def _ones(bits: int) -> bytes:
    return b"\xff" * (bits // 8) + (bytes([(1 << bits % 8) - 1]) if bits % 8 else b"")


def _windows(source: Runs, size: int) -> Iterator[Runs]:
    """Yield the pages of runs in order, `size` at a time."""
    first, count = source
    ends = np.cumsum(count)
    pages = int(ends[-1]) if ends.size else 0
    for begin in range(0, pages, size):
        end = min(begin + size, pages)
        low, high = np.searchsorted(ends, begin, "right"), np.searchsorted(ends, end, "left") + 1
        # Positions of the runs' ends among all pages, cut to the window.
        cut_end = np.minimum(ends[low:high], end)
        cut_begin = np.maximum(ends[low:high] - count[low:high], begin)
        yield first[low:high] + cut_begin - (ends[low:high] - count[low:high]), cut_end - cut_begin


def _zero_pages(ram: GuestRam, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which of the pages are zero; all of them hold data."""
    zero: npt.NDArray[np.bool_] = np.bitwise_or.reduce(ram.words[:, ::_SAMPLE][pages], axis=1) == 0
    candidates = np.flatnonzero(zero)
    for start in range(0, candidates.size, BATCH_PAGES):
        part = candidates[start : start + BATCH_PAGES]
        numbers = pages[part]
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == numbers.size:
            block = ram.words[first : last + 1]
        else:
            block = np.take(ram.words, numbers, axis=0, mode="clip")
        zero[part] = np.bitwise_or.reduce(block, axis=1) == 0
    return zero


def _fill(batch: PageBatch, ram: GuestRam, pages: npt.NDArray[np.int64], scratch: npt.NDArray[np.uint8] | None) -> None:
    """Give a batch its payload: the bytes of `pages`, through `scratch` (which is overwritten) if it is to be lz4."""
    if not pages.size:
        return
    if scratch is not None:
        # lz4 gets a copy: what it makes of bytes that change while it looks at them is nothing that was ever in RAM.
        block = scratch[: pages.size]
        np.take(ram.pages, pages, axis=0, out=block, mode="clip")
        packed = lz4.block.compress(block.reshape(-1).data, store_size=False)
        if len(packed) < block.nbytes:
            batch.encoding, batch.payload = Encoding.LZ4, (packed,)
            return
    first, count = runs.from_pages(pages)
    if first.size <= _MAX_PARTS:
        starts = (first * PAGE_SIZE).tolist()
        ends = ((first + count) * PAGE_SIZE).tolist()
        batch.payload = [ram.view[start:end] for start, end in zip(starts, ends, strict=True)]
    else:
        batch.payload = (np.take(ram.pages, pages, axis=0, mode="clip").reshape(-1).data,)


def check(batch: PageBatch, pages_in_ram: int) -> None:
    """Raise `ValueError`, saying what is wrong, unless a batch may be applied to RAM of that many pages.

    What an lz4 payload holds is known only when it is unpacked; here its size is checked against the most that as many
    pages can need.
    """
    first, count = batch.run_first, batch.run_pages
    if first.size != count.size:
        raise ValueError(f"a batch has {first.size} first pages but {count.size} run lengths")
    if not 1 <= first.size <= MAX_RUNS:
        raise ValueError(f"a batch has {first.size} runs, not 1 to {MAX_RUNS}")
    if int(count.min()) == 0:
        raise ValueError("a batch has an empty run")
    limit = np.uint64(pages_in_ram)
    if int(first.max()) >= pages_in_ram or bool((count > limit - first).any()):
        raise ValueError(f"a batch has a run outside RAM of {pages_in_ram} pages")
    if bool((first[1:] < first[:-1] + count[:-1]).any()):
        raise ValueError("the runs of a batch overlap or do not ascend")
    pages = batch.pages
    if pages > MAX_PAGES:
        raise ValueError(f"a batch has {pages} pages, more than {MAX_PAGES}")
    if len(batch.zero) != (pages + 7) // 8:
        raise ValueError(f"a batch of {pages} pages has {len(batch.zero)} bytes of zero bits, not {(pages + 7) // 8}")
    if pages % 8 and batch.zero[-1] >> pages % 8:
        raise ValueError(f"a batch of {pages} pages has a zero bit past the last one")
    _check_payload(batch, (pages - batch.zero_pages) * PAGE_SIZE)


def _check_payload(batch: PageBatch, expected: int) -> None:
    size = batch.payload_bytes
    if expected > MAX_BATCH_PAGES * PAGE_SIZE:
        raise ValueError(f"a batch has {expected // PAGE_SIZE} pages with a payload, more than {MAX_BATCH_PAGES}")
    if batch.encoding == Encoding.RAW:
        if size != expected:
            raise ValueError(f"a batch has {size} bytes of payload, not {expected}")
    elif batch.encoding == Encoding.LZ4:
        # LZ4_COMPRESSBOUND
        if not 1 <= size <= expected + expected // 255 + 16 or not expected:
            raise ValueError(f"a batch has {size} bytes of lz4 for {expected} bytes of pages")
    else:
        raise ValueError(f"a batch has the unknown encoding {batch.encoding}")


class Applier:
    """Puts batches into RAM that was all zero when it began.

    Several threads may apply at once as long as no two of them touch the same 2 MiB chunk (each lane has its own).
    `generation_of_chunk` (uint32) counts for each chunk the batches that changed it, each **after** its bytes were in
    place: a digest is right if the chunk's generation is still what it was before the chunk was read.
    """

    __slots__ = ("_ram", "_written", "generation_of_chunk")

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._written = np.zeros(ram.layout.pages, np.bool_)
        self.generation_of_chunk = np.zeros(ram.layout.pages // CHUNK_PAGES, np.uint32)

    def apply(self, batch: PageBatch, receive: Callable[[Sequence[memoryview]], None] | None = None) -> tuple[int, int]:
        """Put a batch into RAM; return (pages, zero pages among them).

        `ValueError`, with RAM unchanged, if the batch is not in order.

        With `receive` the payload has not come yet: `batch.payload` is one buffer of its size, which `receive` is told
        to fill, or better, for raw pages in not too many pieces, the places in RAM where they belong. If it fails
        there, those pages are half written, and count as written: they must be sent again, or the machine given up.
        """
        check(batch, self._ram.layout.pages)
        covered = batch.run_first.astype(np.int64), batch.run_pages.astype(np.int64)
        pages, zero_pages = batch.pages, batch.zero_pages
        if zero_pages == pages:
            self._clear(covered)
            return pages, zero_pages
        numbers = runs.expand(covered)
        cleared = None
        if zero_pages:
            zero = np.unpackbits(np.frombuffer(batch.zero, np.uint8), count=pages, bitorder="little").view(np.bool_)
            cleared, numbers = runs.from_pages(numbers[zero]), numbers[~zero]
        places = runs.from_pages(numbers)
        payload = None
        if receive is None or batch.encoding != Encoding.RAW or places[0].size > _MAX_PARTS:
            if receive is not None:
                receive([memoryview(part) for part in batch.payload])
            payload = self._unpack(batch, numbers.size)
        if cleared is not None:
            self._clear(cleared)
        self._written[numbers] = True
        try:
            if payload is not None:
                self._store(numbers, places, payload)
            elif receive is not None:
                receive(self._views(places))
        finally:
            self._changed(numbers)
        return pages, zero_pages

    def _views(self, places: Runs) -> list[memoryview]:
        starts = (places[0] * PAGE_SIZE).tolist()
        ends = ((places[0] + places[1]) * PAGE_SIZE).tolist()
        return [self._ram.view[start:end] for start, end in zip(starts, ends, strict=True)]

    def _unpack(self, batch: PageBatch, pages: int) -> npt.NDArray[np.uint8]:
        packed = batch.payload[0] if len(batch.payload) == 1 else b"".join(batch.payload)
        if batch.encoding == Encoding.LZ4:
            size = pages * PAGE_SIZE
            try:
                packed = lz4.block.decompress(packed, uncompressed_size=size)
            except lz4.block.LZ4BlockError as error:
                raise ValueError(f"a batch's payload is not lz4 of {size} bytes: {error}") from error
            if len(packed) != size:
                raise ValueError(f"a batch's payload unpacks to {len(packed)} bytes, not {size}")
        return np.frombuffer(packed, np.uint8).reshape(-1, PAGE_SIZE)

    def _store(self, numbers: npt.NDArray[np.int64], places: Runs, payload: npt.NDArray[np.uint8]) -> None:
        first, count = places
        if first.size <= _MAX_PARTS:
            done = 0
            for begin, pages in zip(first.tolist(), count.tolist(), strict=True):
                self._ram.pages[begin : begin + pages] = payload[done : done + pages]
                done += pages
        else:
            self._ram.pages[numbers] = payload

    def _clear(self, zero: Runs) -> None:
        """Clear those pages that something was written to; the others are zero, and most of them holes."""
        first, count = runs.cut_at_chunks(zero)
        known = self.generation_of_chunk[first // CHUNK_PAGES] > 0
        numbers = runs.expand((first[known], count[known]))
        numbers = numbers[self._written[numbers]]
        if numbers.size:
            self._ram.pages[numbers] = 0
            self._written[numbers] = False
            self._changed(numbers)

    def _changed(self, numbers: npt.NDArray[np.int64]) -> None:
        chunks = numbers // CHUNK_PAGES
        self.generation_of_chunk[chunks[:1]] += 1
        self.generation_of_chunk[chunks[1:][chunks[1:] != chunks[:-1]]] += 1
