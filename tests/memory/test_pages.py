from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import lz4.block
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.memory import pages as codec
from common.memory import runs
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE
from common.memory.pages import (
    BATCH_PAGES,
    MAX_BATCH_PAGES,
    Applier,
    Encoding,
    PageBatch,
    check,
    encode,
    lane_of,
    split_lanes,
)
from common.memory.ram import GuestRam
from common.memory.runs import Runs

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


def snapshot(batch: PageBatch) -> PageBatch:
    """A batch as it is after the wire: its payload in one piece that no longer changes."""
    payload = b"".join(batch.payload)
    return replace(batch, payload=(payload,) if payload else ())


def send(source: GuestRam, applier: Applier, wanted: Runs, *, compress: bool = False) -> list[PageBatch]:
    batches = []
    for batch in encode(source, *wanted, round=3, compress=compress):
        sent = snapshot(batch)
        check(sent, source.layout.pages)
        assert applier.apply(sent) == (sent.pages, sent.zero_pages)
        batches.append(sent)
    return batches


def covered(batches: list[PageBatch]) -> list[int]:
    parts = [runs.expand((b.run_first.astype(np.int64), b.run_pages.astype(np.int64))) for b in batches]
    return sorted(np.concatenate([np.empty(0, np.int64), *parts]).tolist())


def batch_of(
    first: list[int], count: list[int], zero: bytes, payload: bytes = b"", encoding: int = Encoding.RAW
) -> PageBatch:
    return PageBatch(1, 0, encoding, np.array(first, np.uint64), np.array(count, np.uint64), zero, (payload,))


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
@given(st.lists(writes, min_size=1, max_size=3), st.booleans(), st.integers(1, 3))
def test_rounds_make_the_target_equal_to_the_source(
    steps: list[list[tuple[int, int, int, str]]], compress: bool, lanes: int
) -> None:
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as source, GuestRam.create(CHUNKS * CHUNK_SIZE) as target:
        applier = Applier(target)
        nonzero_once: set[int] = set()
        for number, edits in enumerate(steps):
            touched = write(source, number, edits)
            wanted = everything(source) if number == 0 else runs.from_pages(np.array(sorted(touched), np.int64))
            allocated = source.allocated_bytes
            batches = [
                b for part in split_lanes(*wanted, lanes) for b in send(source, applier, part, compress=compress)
            ]
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
    (first, second) = encode(source, *runs.one(6, 5), round=0, compress=False, data=runs.one(9, 1))
    assert covered([first]) == [6, 7, 8, 10] and first.zero == b"\x0f"
    assert covered([second]) == [9] and b"".join(second.payload) == b"\x02" * PAGE_SIZE


def test_contiguous_pages_are_slices_of_ram(source: GuestRam) -> None:
    source.pages[:300] = 1
    first, second = encode(source, *runs.one(0, 300), round=0, compress=False)
    assert [len(part) for part in first.payload] == [BATCH_PAGES * PAGE_SIZE]
    assert first.payload_bytes == BATCH_PAGES * PAGE_SIZE and first.pages == BATCH_PAGES
    assert second.pages == 300 - BATCH_PAGES
    source.pages[5] = 9
    assert bytes(first.payload[0][5 * PAGE_SIZE : 6 * PAGE_SIZE]) == b"\x09" * PAGE_SIZE


def test_zero_pages_fill_no_batches(source: GuestRam) -> None:
    source.populate(0, PAGES)
    source.pages[PAGES - 1, 100] = 1
    (batch,) = encode(source, *everything(source), round=0, compress=False)
    assert (batch.pages, batch.zero_pages, batch.payload_bytes) == (PAGES, PAGES - 1, PAGE_SIZE)


@pytest.mark.parametrize("word", [0, 1, 63, 64, 65, 511])
def test_a_single_bit_anywhere_makes_a_page_not_zero(source: GuestRam, word: int) -> None:
    source.populate(0, 4)
    source.words[2, word] = 1 << 63
    (batch,) = encode(source, *runs.one(0, 4), round=0, compress=False)
    assert batch.zero == bytes([0b1011])


def test_lz4_is_used_where_it_helps(source: GuestRam, target: GuestRam) -> None:
    source.pages[:BATCH_PAGES] = 7
    source.bytes[BATCH_PAGES * PAGE_SIZE : 2 * BATCH_PAGES * PAGE_SIZE] = noise(1, BATCH_PAGES * PAGE_SIZE)
    first, second = send(source, Applier(target), runs.one(0, 2 * BATCH_PAGES), compress=True)
    assert first.encoding == Encoding.LZ4 and first.payload_bytes < PAGE_SIZE * 2
    assert second.encoding == Encoding.RAW and second.payload_bytes == BATCH_PAGES * PAGE_SIZE
    assert np.array_equal(source.pages[: 2 * BATCH_PAGES], target.pages[: 2 * BATCH_PAGES])


def test_every_batch_knows_its_round(source: GuestRam) -> None:
    source.pages[3] = 1
    assert [(batch.round, batch.sequence) for batch in encode(source, *everything(source), round=4, compress=True)] == [
        (4, 0),
        (4, 0),
    ]


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
OVER = MAX_BATCH_PAGES + 1
WRONG = {
    "runs": batch_of([], [], b""),
    "first pages but": batch_of([1, 2], [1], b"\0", PAGE),
    "empty run": batch_of([1], [0], b""),
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
    "more than 1024": batch_of([0], [OVER], b"\0" * (OVER // 8 + 1), PAGE * OVER),
    "unknown encoding 0": batch_of([1], [1], b"\0", PAGE, 0),
    "unknown encoding -1": batch_of([1], [1], b"\0", PAGE, -1),
    "lz4 for 4096": batch_of([1], [1], b"\0", PAGE * 2, Encoding.LZ4),
    "0 bytes of lz4": batch_of([1], [1], b"\0", b"", Encoding.LZ4),
    "lz4 for 0": batch_of([1], [1], b"\x01", b"\0", Encoding.LZ4),
    "not lz4": batch_of([1], [1], b"\0", b"\xff\xff\xff", Encoding.LZ4),
    "unpacks to 4095": batch_of([1], [1], b"\0", lz4.block.compress(PAGE[1:], store_size=False), Encoding.LZ4),
    "is not lz4 of": batch_of([1], [1], b"\0", lz4.block.compress(PAGE * 2, store_size=False), Encoding.LZ4),
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
        batches = list(encode(ram, first, np.ones_like(first), round=0, compress=False))
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
