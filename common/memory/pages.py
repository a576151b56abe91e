"""The page codec: what of RAM goes into a batch, and from a batch into RAM.

A batch names runs of pages, has a bit for each page that is zero, and the bytes of the others. Holes are zero pages:
they are found without being read, and a batch of holes may cover gibibytes. Pages that hold data are looked at once,
a sample first, and those that turn out to be zero cost a bit each too. At the other end a page that was never written
stays a hole when zeros come for it.

RAM changes while it is encoded. That is right as long as the dirty bits were taken before `encode` was called (and the
data runs after them, if they are passed): a page that changes from then on is in the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.ipc.channel import Buffer
from common.memory import compression, runs
from common.memory.compression import MAX_UNIT_PAGES, Encoding, Method, check_packed, unpack
from common.memory.layout import CHUNK_PAGES, PAGE_SIZE
from common.memory.ram import GuestRam
from common.memory.runs import Runs

__all__ = [
    "MAX_PAGES",
    "MAX_PAYLOAD",
    "MAX_PIECES",
    "MAX_PLAIN_PAGES",
    "MAX_RUNS",
    "Applier",
    "Encoding",
    "PageBatch",
    "Receive",
    "belongs",
    "check",
    "encode",
    "flags",
    "lane_of",
    "pack",
    "split_lanes",
    "to_bits",
]

MAX_PAGES = 1 << 22  # pages of any kind: 16 GiB of holes, 512 KiB of zero bits
MAX_RUNS = 1 << 16  # 1 MiB of run numbers
MAX_PLAIN_PAGES = 1 << 12  # of a batch of which nobody needs a copy: 16 MiB
MAX_PAYLOAD = MAX_PLAIN_PAGES * PAGE_SIZE
# Pages looked at together: 64 MiB, so that a batch that is not full is rare, and zero pages fill no batches at all.
_WINDOW_PAGES = 1 << 14
# The first word tells most pages that are not zero, one of each eighth nearly all others; so many pages fit a cache.
_SAMPLE = 64
_CACHED_PAGES = 256
# So many side by side are looked at where they are; fewer are gathered first.
_MANY = 8
# A batch that is nothing but so few runs of whole pages is plain.
_MAX_PLAIN_RUNS = 64
# So many scattered pieces leave RAM, and come into it, each where it is (the kernel takes 1024 in one call); it takes
# longer to cut more of them than to gather them.
MAX_PIECES = 512
# With more runs than this it takes longer to copy each into RAM than to scatter their pages.
_FEW_RUNS = 64

Numbers = npt.NDArray[np.int64]
Block = npt.NDArray[np.uint8]
# Fills buffers with a batch's payload, as it comes.
Receive = Callable[[Sequence[memoryview]], None]


@dataclass(slots=True)
class PageBatch:
    """One message of a page lane.

    `run_first` and `run_pages` are page numbers and counts. `zero`, `unchanged`, `equal` and `delta` have a bit for
    each page in the order of the runs, least significant first; all but `zero` may be empty. A page is zero, is what it
    was before the batch, equals another as that was before the batch (the next one of `equal_to`), or has its bytes in
    `payload`: those to be XORed with what it was, if its bit in `delta` is set, else its own. `payload` is in parts,
    which may be views of RAM as it changes.
    """

    sequence: int
    round: int
    encoding: int
    run_first: npt.NDArray[np.uint64]
    run_pages: npt.NDArray[np.uint64]
    zero: bytes
    payload: Sequence[Buffer]
    unchanged: bytes = b""
    equal: bytes = b""
    delta: bytes = b""
    equal_to: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    more: bool = False
    """Another batch follows at once: the ack of that one will do for this one too."""
    pages: int = field(init=False)
    """Number of pages, zero pages too."""

    def __post_init__(self) -> None:
        self.pages = int(np.add.reduce(self.run_pages))

    @property
    def zero_pages(self) -> int:
        """Number of pages that are zero."""
        return _count(self.zero)

    @property
    def unchanged_pages(self) -> int:
        """Number of pages that are as they were."""
        return _count(self.unchanged)

    @property
    def equal_pages(self) -> int:
        """Number of pages that equal others."""
        return _count(self.equal)

    @property
    def delta_pages(self) -> int:
        """Number of pages of which the payload has the difference."""
        return _count(self.delta)

    @property
    def payload_pages(self) -> int:
        """Number of pages with a payload."""
        return self.pages - self.zero_pages - self.unchanged_pages - self.equal_pages

    @property
    def payload_bytes(self) -> int:
        """Size of the payload as it is packed."""
        return sum(map(len, self.payload))

    def numbers(self) -> npt.NDArray[np.int64]:
        """Return the numbers of all pages."""
        return runs.expand((self.run_first.astype(np.int64), self.run_pages.astype(np.int64)))


def to_bits(found: npt.NDArray[np.bool_]) -> bytes:
    """Return flags as bits, least significant first."""
    return np.packbits(found, bitorder="little").tobytes()


def flags(bits: bytes, count: int) -> npt.NDArray[np.bool_]:
    """Return bits as `count` flags; no bits are none that is set."""
    if not bits:
        return np.zeros(count, np.bool_)
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=count, bitorder="little").view(np.bool_)


def _count(bits: bytes) -> int:
    return int.from_bytes(bits, "little").bit_count()


def lane_of(page: int, lanes: int) -> int:
    """Return the lane of a page: all pages of a 2 MiB chunk share one, so that versions of a page never race."""
    return page // CHUNK_PAGES % lanes


def belongs(batch: PageBatch, lane: int, lanes: int) -> bool:
    """Return whether all pages of a batch, checked or not, and all that it refers to, are of this lane."""
    if lanes == 1:
        return True
    first, last = batch.run_first // CHUNK_PAGES, (batch.run_first + batch.run_pages - np.uint64(1)) // CHUNK_PAGES
    if (first != last).any() or (first % lanes != lane).any():
        return False
    return not batch.equal_to.size or bool((batch.equal_to // CHUNK_PAGES % lanes == lane).all())


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
    data: Runs | None = None,
    copied: Callable[[], int] | None = None,
    unit_pages: Callable[[], int] = lambda: MAX_UNIT_PAGES,
) -> Iterator[PageBatch]:
    """Yield raw batches that carry the pages of ascending runs, each page once; their sequence is 0.

    A batch that may not be copied (below) has up to `unit_pages()` pages with a payload, but more than `MAX_UNIT_PAGES`
    only if it is plain: see `check`.

    `data` are the runs of RAM that hold data, if the caller has asked already: `ram.data_runs()`, called after the
    dirty bits were taken. Pages outside them are not read. A batch's payload refers to RAM, as it will be when it is
    read. `copied` is asked before each batch how many pages it may copy: unless that is 0, the payload is one piece of
    at most so many pages that no longer change, and may be packed.
    """
    wanted = (first, count)
    present = ram.data_runs(wanted) if data is None else runs.intersect(wanted, data)
    absent = runs.subtract(wanted, present)
    for start in range(0, absent[0].size, MAX_RUNS):
        for window in _windows((absent[0][start : start + MAX_RUNS], absent[1][start : start + MAX_RUNS]), MAX_PAGES):
            yield _batch(round, window, _ones(runs.total(window)))
    for window in _windows(present, _WINDOW_PAGES):
        pages = runs.expand(window)
        zero = _zero_pages(ram, pages)
        filled = np.flatnonzero(~zero)
        begin = full = 0
        while begin < pages.size:
            # A batch ends where the next page with a payload would be too many; zero pages go with the batch before.
            copy = copied() if copied is not None else 0
            unit = copy or unit_pages()
            if unit > MAX_UNIT_PAGES and (
                zero[begin : begin + unit].any() or _pieces(pages[begin : begin + unit]) > _MAX_PLAIN_RUNS
            ):
                unit = MAX_UNIT_PAGES
            full += unit
            end = int(filled[full]) if full < filled.size else pages.size
            if unit > MAX_UNIT_PAGES:
                end = min(end, begin + unit)  # zero pages behind it would make it one that is not plain
            covered = places = runs.from_pages(pages[begin:end])
            bits = bytes((end - begin + 7) // 8)
            if zero[begin:end].any():
                bits = to_bits(zero[begin:end])
                places = runs.from_pages(pages[begin:end][~zero[begin:end]])
            batch = _batch(round, covered, bits)
            _fill(batch, ram, places, copied=copy > 0)
            yield batch
            begin = end


def pack(batch: PageBatch, method: Method) -> bool:
    """Pack the payload of a batch that was copied; return False and leave it if that makes it no smaller."""
    packed = compression.pack(memoryview(batch.payload[0]), method)
    if packed is None:
        return False
    batch.encoding, batch.payload = method.encoding, (packed,)
    return True


def _batch(number: int, covered: Runs, zero: bytes) -> PageBatch:
    return PageBatch(0, number, Encoding.RAW, covered[0].astype(np.uint64), covered[1].astype(np.uint64), zero, ())


def _pieces(pages: Numbers) -> int:
    return 1 + int(np.count_nonzero(pages[1:] - pages[:-1] != 1))


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
    first, last = int(pages[0]), int(pages[-1])
    # Side by side they are a view; to gather even one word of each takes as long as to look at it.
    words = ram.words[first : last + 1, 0] if last - first + 1 == pages.size else ram.words[:, 0][pages]
    zero: npt.NDArray[np.bool_] = words == 0
    candidates = np.flatnonzero(zero)
    zero[candidates] = np.bitwise_or.reduce(ram.words[:, ::_SAMPLE][pages[candidates]], axis=1) == 0
    candidates = np.flatnonzero(zero)
    first_page, count = runs.from_pages(pages[candidates])
    side_by_side = count >= _MANY
    places = candidates[np.cumsum(count) - count]
    for place, page, many in zip(*(each[side_by_side].tolist() for each in (places, first_page, count)), strict=True):
        zero[place : place + many] = np.bitwise_or.reduce(ram.words[page : page + many], axis=1) == 0
    candidates = candidates[np.repeat(~side_by_side, count)]
    for start in range(0, candidates.size, _CACHED_PAGES):
        part = candidates[start : start + _CACHED_PAGES]
        block = np.take(ram.words, pages[part], axis=0, mode="clip")
        zero[part] = np.bitwise_or.reduce(block, axis=1) == 0
    return zero


def _fill(batch: PageBatch, ram: GuestRam, places: Runs, *, copied: bool) -> None:
    """Give a batch its payload: the bytes of the pages in these places."""
    first = places[0]
    if not first.size:
        return
    if first.size <= MAX_PIECES and not copied:
        batch.payload = _pieces_of(ram, places)
    else:
        batch.payload = (np.take(ram.pages, runs.expand(places), axis=0, mode="clip").reshape(-1).data,)


def _pieces_of(ram: GuestRam, places: Runs) -> list[memoryview]:
    first, count = places
    starts = (first * PAGE_SIZE).tolist()
    ends = ((first + count) * PAGE_SIZE).tolist()
    return [ram.view[start:end] for start, end in zip(starts, ends, strict=True)]


def check(batch: PageBatch, pages_in_ram: int) -> None:
    """Raise `ValueError`, saying what is wrong, unless a batch may be applied to RAM of that many pages.

    A plain batch, of raw pages in a few runs and nothing else, may be long: it goes into RAM as it comes.
    The payload itself is not looked at, only its size: it may be yet to come.
    """
    first, count = batch.run_first, batch.run_pages
    if first.size != count.size:
        raise ValueError(f"a batch has {first.size} first pages but {count.size} run lengths")
    if not 1 <= first.size <= MAX_RUNS:
        raise ValueError(f"a batch has {first.size} runs, not 1 to {MAX_RUNS}")
    end = first + count
    if (end <= first).any():  # past 2^64 a run would end before it begins
        raise ValueError(f"a batch has an empty run, or a run outside RAM of {pages_in_ram} pages")
    if first.size > 1 and (first[1:] < end[:-1]).any():
        raise ValueError("the runs of a batch overlap or do not ascend")
    if end[-1] > pages_in_ram:
        raise ValueError(f"a batch has a run outside RAM of {pages_in_ram} pages")
    pages = batch.pages
    if pages > MAX_PAGES:
        raise ValueError(f"a batch has {pages} pages, more than {MAX_PAGES}")
    _check_bits(batch, pages)
    if batch.equal_to.size != batch.equal_pages or (batch.equal_to >= pages_in_ram).any():
        raise ValueError("a batch has pages that equal none, or one outside RAM")
    full = batch.payload_pages
    plain = full == pages and first.size <= _MAX_PLAIN_RUNS and _goes_as_it_comes(batch, first.size)
    most = MAX_PLAIN_PAGES if plain else MAX_UNIT_PAGES
    if full + batch.equal_pages > most:
        raise ValueError(f"a batch has {full + batch.equal_pages} pages to be written, more than {most}")
    check_packed(batch.encoding, batch.payload_bytes, full * PAGE_SIZE)


def _goes_as_it_comes(batch: PageBatch, places: int) -> bool:
    """Return whether a batch's payload may go into RAM piece by piece, without a copy that is looked at before."""
    return batch.encoding == Encoding.RAW and not batch.delta and places <= MAX_PIECES


def _check_bits(batch: PageBatch, pages: int) -> None:
    size = (pages + 7) // 8
    taken = 0
    for name, bits in (
        ("zero", batch.zero),
        ("unchanged", batch.unchanged),
        ("equal", batch.equal),
        ("delta", batch.delta),
    ):
        if len(bits) != size and (bits or name == "zero"):
            raise ValueError(f"a batch of {pages} pages has {len(bits)} bytes of {name} bits, not {size}")
        if bits and pages % 8 and bits[-1] >> pages % 8:
            raise ValueError(f"a batch of {pages} pages has a bit of {name} past the last one")
        its = int.from_bytes(bits, "little")
        if taken & its:
            raise ValueError(f"a batch has a page that is {name} and something else")
        taken |= its


def _joined(payload: Sequence[Buffer]) -> Buffer:
    return payload[0] if len(payload) == 1 else b"".join(payload)


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

    def apply(self, batch: PageBatch, receive: Receive | None = None) -> tuple[int, int]:
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
        if batch.payload_pages == pages and not batch.delta:
            # Most of round 0, and no page is looked at by itself.
            self._write(covered, self._payload(batch, covered, receive), receive)
            return pages, zero_pages
        numbers = runs.expand(covered)
        zero, unchanged, equal, delta = (
            flags(bits, pages) for bits in (batch.zero, batch.unchanged, batch.equal, batch.delta)
        )
        equal_to = batch.equal_to.astype(np.int64)
        if not (self._written[numbers[unchanged | delta]].all() and self._written[equal_to].all()):
            raise ValueError("a batch refers to a page that is zero, or was never sent")
        whole = ~(zero | unchanged | equal)
        places = runs.from_pages(numbers[whole])
        payload = self._payload(batch, places, receive)
        # All that is referred to is read before anything is written.
        others = self._ram.pages[equal_to]
        if payload is not None and batch.delta:
            payload = payload.copy()
            payload[delta[whole]] ^= self._ram.pages[numbers[delta]]
        if zero_pages:
            self._clear(runs.from_pages(numbers[zero]))
        self._write(places, payload, receive)
        self._write(runs.from_pages(numbers[equal]), others)
        return pages, zero_pages

    def _payload(self, batch: PageBatch, places: Runs, receive: Receive | None) -> Block | None:
        """Return the pages of a payload, received and unpacked; None if `receive` is to put them into RAM itself."""
        if receive is not None:
            if _goes_as_it_comes(batch, places[0].size):
                return None
            receive([memoryview(part) for part in batch.payload])
        size = runs.total(places) * PAGE_SIZE
        return np.frombuffer(unpack(batch.encoding, _joined(batch.payload), size), np.uint8).reshape(-1, PAGE_SIZE)

    def _write(self, places: Runs, payload: Block | None, receive: Receive | None = None) -> None:
        """Write pages to these places: those of `payload`, or as `receive` brings them."""
        first, count = places
        if not first.size:
            return
        numbers = runs.expand(places)
        self._written[numbers] = True
        try:
            if payload is None:
                assert receive is not None  # see `_payload`
                receive(_pieces_of(self._ram, places))
            elif first.size > _FEW_RUNS:
                self._ram.pages[numbers] = payload
            else:
                done = 0
                for start, pages in zip(first.tolist(), count.tolist(), strict=True):
                    self._ram.pages[start : start + pages] = payload[done : done + pages]
                    done += pages
        finally:
            self._changed(places)

    def _clear(self, zero: Runs) -> None:
        """Clear those pages that something was written to; the others are zero, and most of them holes."""
        first, count = runs.cut_at_chunks(zero)
        known = self.generation_of_chunk[first // CHUNK_PAGES] > 0
        numbers = runs.expand((first[known], count[known]))
        numbers = numbers[self._written[numbers]]
        if numbers.size:
            self._ram.pages[numbers] = 0
            self._written[numbers] = False
            self._changed(runs.from_pages(numbers))

    def _changed(self, places: Runs) -> None:
        """Count a change of each chunk that has some of the pages; several runs of one count once."""
        first, count = places
        begin = first // CHUNK_PAGES
        self.generation_of_chunk[runs.expand((begin, (first + count - 1) // CHUNK_PAGES + 1 - begin))] += 1
