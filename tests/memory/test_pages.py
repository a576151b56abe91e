from __future__ import annotations

from collections.abc import Iterator, Sequence

import lz4.block
import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.memory import pages as codec
from common.memory import runs
from common.memory.compression import MAX_UNIT_PAGES, METHODS, NONE, ZSTD, Method
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE
from common.memory.pages import Applier, Encoding, PageBatch, check, encode, lane_of, pack, split_lanes
from common.memory.ram import GuestRam
from common.memory.runs import Runs
from common.rpc.page_batch import parse, serialize

CHUNKS = 4
PAGES = CHUNKS * CHUNK_PAGES


@pytest.fixture
def source() -> Iterator[GuestRam]:
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as ram:
        yield ram


@pytest.fixture
def target() -> Iterator[GuestRam]:
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as ram:
        yield ram


def noise(seed: int, size: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def everything(ram: GuestRam) -> Runs:
    return runs.one(0, ram.layout.pages)


def send(source: GuestRam, applier: Applier, wanted: Runs, method: Method = NONE) -> list[PageBatch]:
    batches = []
    for batch in encode(source, *wanted, round=3, copied=lambda: 0 if method is NONE else method.unit_pages):
        if method is not NONE and batch.payload:
            pack(batch, method)
        sent = parse(serialize(batch))
        check(sent, source.layout.pages)
        assert applier.apply(sent) == (sent.pages, sent.zero_pages)
        batches.append(sent)
    return batches


def covered(batches: list[PageBatch]) -> list[int]:
    parts = [runs.expand((b.run_first.astype(np.int64), b.run_pages.astype(np.int64))) for b in batches]
    return sorted(np.concatenate([np.empty(0, np.int64), *parts]).tolist())


def batch_of(
    first: list[int],
    count: list[int],
    zero: bytes,
    payload: bytes = b"",
    encoding: int = Encoding.RAW,
    *,
    equal_to: Sequence[int] = (),
    **bits: bytes,
) -> PageBatch:
    numbers = (np.array(words, np.uint64) for words in (first, count))
    return PageBatch(1, 0, encoding, *numbers, zero, (payload,), equal_to=np.array(equal_to, np.uint64), **bits)


# What a page of the source is in a step: untouched, zeros written, text, noise, or one byte at some place.
contents = st.sampled_from(["zero", "text", "noise", "byte"])
writes = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 700), st.integers(1, 3), contents), min_size=1, max_size=4
)


def write(ram: GuestRam, seed: int, edits: list[tuple[int, int, int, str]]) -> set[int]:
    """Write pages; return which: `count` of them from `first`, `stride` apart."""
    touched: set[int] = set()
    for first, count, stride, kind in edits:
        numbers = np.arange(first, PAGES, stride)[:count]
        touched |= set(numbers.tolist())
        if kind == "noise":
            ram.pages[numbers] = noise(seed, numbers.size * PAGE_SIZE).reshape(-1, PAGE_SIZE)
        elif kind == "text":
            ram.pages[numbers] = np.resize(np.frombuffer(b"the same words again ", np.uint8), PAGE_SIZE)
        else:
            ram.pages[numbers] = 0
            if kind == "byte":
                ram.pages[numbers, numbers * 37 % PAGE_SIZE] = 1
    return touched


@settings(max_examples=40, deadline=None)
@given(st.lists(writes, min_size=1, max_size=3), st.sampled_from(METHODS), st.integers(1, 3))
def test_rounds_make_the_target_equal_to_the_source(
    steps: list[list[tuple[int, int, int, str]]], method: Method, lanes: int
) -> None:
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as source, GuestRam.create(CHUNKS * CHUNK_SIZE) as target:
        applier = Applier(target)
        nonzero_once: set[int] = set()
        for number, edits in enumerate(steps):
            touched = write(source, number, edits)
            wanted = everything(source) if number == 0 else runs.from_pages(np.array(sorted(touched), np.int64))
            allocated = source.allocated_bytes
            batches = [b for part in split_lanes(*wanted, lanes) for b in send(source, applier, part, method)]
            assert covered(batches) == runs.expand(wanted).tolist()
            assert source.allocated_bytes == allocated
            nonzero_once |= set(np.flatnonzero(source.pages[sorted(touched)].any(axis=1)).tolist())
            nonzero_once |= {page for page in touched if source.pages[page].any()}
        # Only what was not zero at some time takes memory at the target.
        assert runs.total(target.data_runs()) <= len(nonzero_once)
        assert np.array_equal(source.pages, target.pages)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_pages_are_looked_at_a_window_at_a_time(
    source: GuestRam, target: GuestRam, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(codec, "_WINDOW_PAGES", window)
    source.pages[10:300] = noise(1, 290 * PAGE_SIZE).reshape(-1, PAGE_SIZE)
    source.pages[400:800:3] = 5
    wanted = runs.one(5, 900)
    assert covered(send(source, Applier(target), wanted)) == runs.expand(wanted).tolist()
    assert np.array_equal(source.pages, target.pages)


def test_holes_are_never_read_and_stay_holes() -> None:
    with GuestRam.create(1 << 40) as source, GuestRam.create(1 << 40) as target:
        source.pages[1 << 20] = 5
        applier = Applier(target)
        batches = send(source, applier, everything(source))
        assert sum(batch.pages for batch in batches) == 1 << 28
        joined = runs.one(0, 0)
        for batch in batches:
            joined = runs.union(joined, (batch.run_first.astype(np.int64), batch.run_pages.astype(np.int64)))
        assert [part.tolist() for part in joined] == [[0], [1 << 28]]
        assert max(batch.pages for batch in batches) == codec.MAX_PAGES
        assert len(batches) == (1 << 28) // codec.MAX_PAGES + 1
        assert source.allocated_bytes == target.allocated_bytes == PAGE_SIZE
        assert (target.pages[1 << 20] == 5).all()


def test_pages_outside_the_given_data_runs_are_not_read(source: GuestRam) -> None:
    source.pages[7] = 1
    source.pages[9] = 2
    (first, second) = encode(source, *runs.one(6, 5), round=0, data=runs.one(9, 1))
    assert covered([first]) == [6, 7, 8, 10] and first.zero == b"\x0f"
    assert covered([second]) == [9] and b"".join(second.payload) == b"\x02" * PAGE_SIZE


def test_contiguous_pages_are_slices_of_ram(source: GuestRam) -> None:
    source.pages[:1300] = 1
    first, second = encode(source, *runs.one(0, 1300), round=0)
    assert [len(part) for part in first.payload] == [MAX_UNIT_PAGES * PAGE_SIZE]
    assert first.payload_bytes == MAX_UNIT_PAGES * PAGE_SIZE and first.pages == MAX_UNIT_PAGES
    assert second.pages == 1300 - MAX_UNIT_PAGES
    source.pages[5] = 9
    assert bytes(first.payload[0][5 * PAGE_SIZE : 6 * PAGE_SIZE]) == b"\x09" * PAGE_SIZE


def test_a_batch_is_long_where_it_is_plain(source: GuestRam, target: GuestRam) -> None:
    def sizes(wanted: Runs) -> list[int]:
        batches = encode(source, *wanted, round=0, unit_pages=lambda: PAGES)
        return [batch.payload_pages for batch in batches]

    source.pages[:PAGES] = 1
    (batch,) = encode(source, *everything(source), round=0, unit_pages=lambda: PAGES)
    assert batch.pages == PAGES and len(batch.payload) == 1
    Applier(target).apply(parse(serialize(batch)))
    assert np.array_equal(source.pages, target.pages)
    # Many pieces, or zeros among them: that takes a copy at one end or the other.
    assert sizes(runs.from_pages(np.flatnonzero(np.arange(PAGES) % 16))) == [MAX_UNIT_PAGES, 896]
    source.pages[5] = 0
    assert sizes(everything(source)) == [MAX_UNIT_PAGES, PAGES - 1 - MAX_UNIT_PAGES]
    # Only zeros in the batch itself do, and those behind it go with the next one.
    source.pages[5] = 1
    source.pages[PAGES - 3 :] = 0
    batches = encode(source, *everything(source), round=0, unit_pages=lambda: PAGES - 3)
    assert [(batch.pages, batch.zero_pages) for batch in batches] == [(PAGES - 3, 0), (3, 3)]


@pytest.mark.parametrize("pieces", [65, codec.MAX_PIECES, codec.MAX_PIECES + 1])
def test_scattered_pages_leave_ram_and_come_into_it_where_they_are_unless_they_are_too_many(
    source: GuestRam, target: GuestRam, pieces: int
) -> None:
    source.pages[: 2 * pieces : 2] = (np.arange(pieces) % 251 + 1)[:, None]
    (batch,) = encode(source, *runs.from_pages(np.arange(0, 2 * pieces, 2)), round=0)
    assert len(batch.payload) == (pieces if pieces <= codec.MAX_PIECES else 1)
    payload = b"".join(batch.payload)
    buffers: list[int] = []

    def receive(parts: Sequence[memoryview]) -> None:
        done = 0
        for part in parts:
            buffers.append(len(part))
            part[:] = payload[done : done + len(part)]
            done += len(part)

    batch.payload = (memoryview(bytearray(len(payload))),)
    Applier(target).apply(batch, receive)
    assert buffers == ([PAGE_SIZE] * pieces if pieces <= codec.MAX_PIECES else [pieces * PAGE_SIZE])
    assert np.array_equal(source.pages, target.pages)


def test_a_plain_batch_has_a_limit_too() -> None:
    most = codec.MAX_PLAIN_PAGES
    check(batch_of([0], [most], bytes(most // 8), bytes(most * PAGE_SIZE)), 1 << 28)
    with pytest.raises(ValueError, match="4097 pages to be written, more than 4096"):
        check(batch_of([0], [most + 1], bytes(most // 8 + 1), bytes((most + 1) * PAGE_SIZE)), 1 << 28)


def test_zero_pages_fill_no_batches(source: GuestRam) -> None:
    source.populate(0, PAGES)
    source.pages[PAGES - 1, 100] = 1
    (batch,) = encode(source, *everything(source), round=0)
    assert (batch.pages, batch.zero_pages, batch.payload_bytes) == (PAGES, PAGES - 1, PAGE_SIZE)


@pytest.mark.parametrize("word", [0, 1, 63, 64, 65, 511])
def test_a_single_bit_anywhere_makes_a_page_not_zero(source: GuestRam, word: int) -> None:
    source.populate(0, 4)
    source.words[2, word] = 1 << 63
    (batch,) = encode(source, *runs.one(0, 4), round=0)
    assert batch.zero == bytes([0b1011])


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)
def test_pages_are_packed_where_it_helps(source: GuestRam, target: GuestRam, method: Method) -> None:
    unit = method.unit_pages
    source.pages[:unit] = 7
    source.bytes[unit * PAGE_SIZE : 2 * unit * PAGE_SIZE] = noise(1, unit * PAGE_SIZE)
    first, second = send(source, Applier(target), runs.one(0, 2 * unit), method)
    assert first.encoding == method.encoding and first.payload_bytes < unit * PAGE_SIZE // 100
    assert second.encoding == Encoding.RAW and second.payload_bytes == unit * PAGE_SIZE
    assert np.array_equal(source.pages[: 2 * unit], target.pages[: 2 * unit])


def test_what_is_packed_is_a_copy(source: GuestRam, target: GuestRam) -> None:
    source.pages[:1300] = 1
    sizes = iter([256, 0, 0])
    first, second = encode(source, *runs.one(0, 300), round=0, copied=lambda: next(sizes))
    source.pages[:300] = 2
    pack(first, ZSTD)
    for batch in (first, second):
        Applier(target).apply(parse(serialize(batch)))
    assert (target.pages[:256] == 1).all() and (target.pages[256:300] == 2).all()


def test_every_batch_knows_its_round(source: GuestRam) -> None:
    source.pages[3] = 1
    batches = list(encode(source, *everything(source), round=4, copied=lambda: 1))
    assert [(batch.round, batch.sequence) for batch in batches] == [(4, 0), (4, 0)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 2000)), max_size=6), st.integers(1, 5))
def test_a_chunk_never_spans_two_lanes(pieces: list[tuple[int, int]], lanes: int) -> None:
    wanted = runs.one(0, 0)
    for first, count in pieces:
        wanted = runs.union(wanted, runs.one(first, count))
    parts = split_lanes(*wanted, lanes)
    assert len(parts) == lanes
    numbers = [runs.expand(part) for part in parts]
    for lane, pages in enumerate(numbers):
        assert {lane_of(page, lanes) for page in pages.tolist()} <= {lane}
    assert np.array_equal(np.sort(np.concatenate(numbers)), runs.expand(wanted))


def test_zeros_clear_what_was_written_and_nothing_else(target: GuestRam) -> None:
    applier = Applier(target)
    applier.apply(batch_of([5, 600], [1, 1], b"\0", b"\x01" * 2 * PAGE_SIZE))
    assert applier.apply(batch_of([0], [PAGES], b"\xff" * (PAGES // 8))) == (PAGES, PAGES)
    assert not target.pages[[5, 600]].any()
    assert runs.expand(target.data_runs()).tolist() == [5, 600]
    applier.apply(batch_of([5], [2], b"\x02", b"\x08" * PAGE_SIZE))
    assert (target.pages[5] == 8).all() and runs.expand(target.data_runs()).tolist() == [5, 600]


def test_generations_count_the_batches_that_changed_a_chunk(target: GuestRam) -> None:
    applier = Applier(target)
    applier.apply(batch_of([511], [2], b"\0", b"\x01" * 2 * PAGE_SIZE))
    assert applier.generation_of_chunk.tolist() == [1, 1, 0, 0]
    applier.apply(batch_of([0, 3], [1, 2], b"\0", b"\x01" * 3 * PAGE_SIZE))
    assert applier.generation_of_chunk.tolist() == [2, 1, 0, 0]
    applier.apply(batch_of([512, 1024], [4, 1], b"\x1f"))
    assert applier.generation_of_chunk.tolist() == [2, 2, 0, 0]
    applier.apply(batch_of([512], [4], b"\x0f"))
    assert applier.generation_of_chunk.tolist() == [2, 2, 0, 0]


PAGE = b"\x01" * PAGE_SIZE
OVER = MAX_UNIT_PAGES + 1
NONE_SET, ALL_SET = bytes(OVER // 8 + 1), b"\xff" * (OVER // 8) + b"\x01"


def zstd(data: bytes, **parameters: int) -> bytes:
    made = zstandard.ZstdCompressionParameters(**{"compression_level": 1, "write_content_size": 1, **parameters})
    return zstandard.ZstdCompressor(compression_params=made).compress(data)


FRAME = zstd(PAGE)
BOMB = zstd(bytes(64 << 20))
# A frame that holds 2048 bytes for other programs, and no pages.
SKIPPABLE = b"\x50\x2a\x4d\x18" + PAGE_SIZE.to_bytes(4, "little")[:2] + b"\0\0" + bytes(2048)
# A window of 8 MiB, a content of 4096 bytes, and in its block one byte so often.
LONG_WINDOW = bytes.fromhex("28b52ffd 40 68 000f 038000 01")
WRONG = {
    "runs": batch_of([], [], b""),
    "first pages but": batch_of([1, 2], [1], b"\0", PAGE),
    "empty run": batch_of([1], [0], b""),
    "empty run, or a run outside": batch_of([8], [2**64 - 4], b"\x0f"),
    "outside RAM of": batch_of([PAGES - 1], [2], b"\x03"),
    "outside RAM": batch_of([PAGES], [1], b"\x01"),
    "run outside": batch_of([1], [2**64 - 1], b"\x01"),
    "a run outside": batch_of([2**64 - 1], [1], b"\x01"),
    "overlap": batch_of([1, 2], [2, 1], b"\x07"),
    "ascend": batch_of([5, 1], [1, 1], b"\x03"),
    "bytes of zero bits, not 1": batch_of([1], [8], b"\xff\x00"),
    "bytes of zero bits, not 2": batch_of([1], [9], b"\xff"),
    "past the last": batch_of([1], [1], b"\x03"),
    "4095 bytes of payload": batch_of([1], [1], b"\0", PAGE[1:]),
    "bytes of payload, not 0": batch_of([1], [1], b"\x01", PAGE),
    "8192 bytes of payload, not 4096": batch_of([1], [1], b"\0", PAGE * 2),
    "1025 pages to be written, more than 1024": batch_of([0], [OVER + 1], NONE_SET[:-1] + b"\x02", PAGE * OVER),
    "more than 1024": batch_of([0, *range(1000, 1260, 4)], [960, *[1] * 65], NONE_SET, PAGE * OVER),
    "unknown encoding 0": batch_of([1], [1], b"\0", PAGE, 0),
    "unknown encoding -1": batch_of([1], [1], b"\0", PAGE, -1),
    "lz4 for 4096": batch_of([1], [1], b"\0", PAGE * 2, Encoding.LZ4),
    "0 bytes of lz4": batch_of([1], [1], b"\0", b"", Encoding.LZ4),
    "lz4 for 0": batch_of([1], [1], b"\x01", b"\0", Encoding.LZ4),
    "not lz4": batch_of([1], [1], b"\0", b"\xff\xff\xff", Encoding.LZ4),
    "unpacks to 4095": batch_of([1], [1], b"\0", lz4.block.compress(PAGE[1:], store_size=False), Encoding.LZ4),
    "is not lz4 of": batch_of([1], [1], b"\0", lz4.block.compress(PAGE * 2, store_size=False), Encoding.LZ4),
    "0 bytes of zstd": batch_of([1], [1], b"\0", b"", Encoding.ZSTD),
    "zstd for 0": batch_of([1], [1], b"\x01", FRAME, Encoding.ZSTD),
    "4096 bytes of zstd": batch_of([1], [1], b"\0", PAGE, Encoding.ZSTD),
    "payload is not zstd:": batch_of([1], [1], b"\0", PAGE[1:], Encoding.ZSTD),
    "unpacks to 67108864 bytes, not 4096": batch_of([1], [1], b"\0", BOMB, Encoding.ZSTD),
    "unpacks to 8192 bytes, not 4096": batch_of([1], [1], b"\0", zstd(PAGE * 2), Encoding.ZSTD),
    "is not zstd of 4096 bytes": batch_of([1], [1], b"\0", SKIPPABLE, Encoding.ZSTD),
    "unpacks to 18446744073709551615": batch_of([1], [1], b"\0", zstd(PAGE, write_content_size=0), Encoding.ZSTD),
    "not zstd of": batch_of([1], [1], b"\0", FRAME[:-1], Encoding.ZSTD),
    "unused data": batch_of([1], [1], b"\0", FRAME + b"\0", Encoding.ZSTD),
    "2 bytes of unchanged bits, not 1": batch_of([1], [1], b"\0", PAGE, unchanged=b"\0\0"),
    "bit of equal past": batch_of([1], [1], b"\0", PAGE, equal=b"\x02"),
    "bit of delta past": batch_of([1], [1], b"\0", PAGE, delta=b"\x02"),
    "unchanged and something else": batch_of([1], [1], b"\x01", unchanged=b"\x01"),
    "delta and something else": batch_of([1], [1], b"\0", unchanged=b"\x01", delta=b"\x01"),
    "equal none": batch_of([1], [1], b"\0", equal=b"\x01"),
    "equal none, or": batch_of([1], [1], b"\0", PAGE, equal_to=[1]),
    "or one outside RAM": batch_of([1], [1], b"\0", equal=b"\x01", equal_to=[PAGES]),
    "1025 pages to be written, more": batch_of([0], [OVER], NONE_SET, equal=ALL_SET, equal_to=[1] * OVER),
    "refers to a page that is zero": batch_of([1], [1], b"\0", unchanged=b"\x01"),
    "or was never sent": batch_of([1], [1], b"\0", equal=b"\x01", equal_to=[2]),
    "refers to a page": batch_of([1], [1], b"\0", PAGE, delta=b"\x01"),
    "wants a window": batch_of([1], [1], b"\0", LONG_WINDOW, Encoding.ZSTD),
}


@pytest.mark.parametrize("complaint", list(WRONG))
def test_a_wrong_batch_is_refused_and_changes_nothing(target: GuestRam, complaint: str) -> None:
    applier = Applier(target)
    with pytest.raises(ValueError, match=complaint):
        applier.apply(WRONG[complaint])
    assert target.allocated_bytes == 0 and not applier.generation_of_chunk.any()


def test_a_batch_may_not_cover_more_than_the_limit() -> None:
    check(batch_of([0], [codec.MAX_PAGES], b"\xff" * (codec.MAX_PAGES // 8)), 1 << 28)
    with pytest.raises(ValueError, match="more than 4194304"):
        check(batch_of([0], [codec.MAX_PAGES + 1], b"\xff" * (codec.MAX_PAGES // 8) + b"\x01"), 1 << 28)
    firsts = list(range(0, 2 * codec.MAX_RUNS + 2, 2))
    with pytest.raises(ValueError, match="runs, not 1 to"):
        check(batch_of(firsts, [1] * len(firsts), b"\xff" * (len(firsts) // 8) + b"\x01"), 1 << 28)


def test_many_scattered_holes_are_many_batches() -> None:
    with GuestRam.create(1 << 40) as ram:
        first = np.arange(0, 4 * codec.MAX_RUNS, 2, dtype=np.int64)
        batches = list(encode(ram, first, np.ones_like(first), round=0))
        assert [batch.run_first.size for batch in batches] == [codec.MAX_RUNS, codec.MAX_RUNS]
        for batch in batches:
            check(batch, ram.layout.pages)
        assert ram.allocated_bytes == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, PAGES + 1), max_size=4),
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=4),
    st.binary(max_size=3),
    st.binary(max_size=20) | st.integers(0, 8).map(lambda n: PAGE * n),
    st.integers(-1, 3),
)
def test_no_input_does_anything_but_apply_or_be_refused(
    first: list[int], count: list[int], zero: bytes, payload: bytes, encoding: int
) -> None:
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as ram:
        applier = Applier(ram)
        try:
            applier.apply(batch_of(first, count, zero, payload, encoding))
        except ValueError:
            assert ram.allocated_bytes == 0


def with_gaps(lengths: Sequence[int]) -> list[int]:
    pages, start = [], 3
    for length in lengths:
        pages += range(start, start + length)
        start += length + 2
    return pages


@pytest.mark.parametrize(
    "pages",
    [range(3, 1200), range(3, 1200, 2), range(3, 1200, 5), with_gaps([1, 7, 40, 8, 2, 9, 300, 3, 64, 1, 7, 8, 9])],
    ids=["side by side", "every second", "every fifth", "some of all"],
)
def test_one_byte_anywhere_makes_a_page_that_is_not_zero(source: GuestRam, pages: Sequence[int]) -> None:
    wanted = np.array(pages)
    source.pages[wanted] = 0  # no hole
    byte = wanted[::7]
    source.pages[byte, byte * 509 % PAGE_SIZE] = 1
    zero = [codec.flags(batch.zero, batch.pages) for batch in encode(source, *runs.from_pages(wanted), round=0)]
    assert wanted[~np.concatenate(zero)].tolist() == byte.tolist()
