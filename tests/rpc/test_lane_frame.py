"""The bytes of a TCP page lane: what is said is understood, noise is refused before anything is allocated for it."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.memory.compression import MAX_UNIT_PAGES
from common.memory.pages import MAX_PAGES, MAX_PAYLOAD, MAX_RUNS, PageBatch
from common.rpc.lane_frame import (
    HEADER_SIZE,
    HELLO_SIZE,
    AckReader,
    LaneRefusedError,
    pack_ack,
    pack_batch,
    pack_end,
    pack_hello,
    pack_refusal,
    parse_header,
    parse_hello,
)

BITS = MAX_PAGES // 8
LARGEST = MAX_RUNS * 16 + 4 * BITS + MAX_UNIT_PAGES * 8

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
batches = st.builds(
    lambda sequence, number, encoding, runs, zero, payload, bits, equal_to: PageBatch(
        sequence,
        number,
        encoding,
        np.array([first for first, _ in runs], np.uint64),
        np.array([count for _, count in runs], np.uint64),
        zero,
        payload,
        *bits,
        np.array(equal_to, np.uint64),
    ),
    st.integers(1, 2**64 - 1),
    u32,
    u32,
    st.lists(st.tuples(u64, u64), max_size=20),
    st.binary(max_size=200),
    st.lists(st.binary(max_size=500), max_size=3),
    st.tuples(*[st.binary(max_size=50)] * 3),
    st.lists(u64, max_size=20),
)


@given(batches)
def test_a_batch_is_read_as_it_was_written(batch: PageBatch) -> None:
    data = b"".join(pack_batch(batch))
    header = parse_header(data[:HEADER_SIZE])
    assert header is not None
    end = HEADER_SIZE + header.body_bytes
    read = header.batch(data[HEADER_SIZE:end], [data[end:]])
    assert len(data) - end == header.payload_bytes == batch.payload_bytes
    assert (read.sequence, read.round, read.encoding, read.zero) == (
        batch.sequence,
        batch.round,
        batch.encoding,
        batch.zero,
    )
    assert read.run_first.tolist() == batch.run_first.tolist()
    assert read.run_pages.tolist() == batch.run_pages.tolist()
    assert (read.unchanged, read.equal, read.delta) == (batch.unchanged, batch.equal, batch.delta)
    assert read.equal_to.tolist() == batch.equal_to.tolist()
    assert b"".join(read.payload) == b"".join(batch.payload)


def test_the_example_of_the_documentation() -> None:
    page = bytes(range(256)) * 16
    runs = np.array([0x100, 0x200], np.uint64), np.array([2, 1], np.uint64)
    head, *payload = pack_batch(PageBatch(3, 1, 1, *runs, b"\x02", (page, page)))
    assert bytes(head).hex(" ") == (
        "03 00 00 00 00 00 00 00 01 00 00 00 01 00 00 00 02 00 00 00 01 00 00 00 00 20 00 00 00 00 00 00 "
        "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 "
        "00 01 00 00 00 00 00 00 00 02 00 00 00 00 00 00 02 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00 02"
    )
    assert payload == [page, page]


def test_the_payload_is_not_copied() -> None:
    page = memoryview(bytearray(4096))
    batch = PageBatch(1, 0, 1, np.array([0], np.uint64), np.array([1], np.uint64), b"\0", (page,))
    assert pack_batch(batch)[1] is page


def test_the_end_is_no_batch() -> None:
    assert parse_header(pack_end()) is None


@pytest.mark.parametrize(
    ("runs", "zero_bytes", "payload_bytes", "said"),
    [
        (MAX_RUNS + 1, 0, 0, "65537 runs, more than"),
        (2**32 - 1, 0, 0, "runs, more than"),
        (0, MAX_PAGES // 8 + 1, 0, "bytes of zero bits, more than"),
        (0, 2**32 - 1, 0, "bytes of zero bits, more than"),
        (0, 0, MAX_PAYLOAD + 1, "bytes of payload, more than"),
        (0, 0, 2**64 - 1, "bytes of payload, more than"),
    ],
)
def test_what_is_too_large_is_refused_by_its_header(runs: int, zero_bytes: int, payload_bytes: int, said: str) -> None:
    refused(runs, zero_bytes, payload_bytes, (0, 0, 0, 0), said)


@pytest.mark.parametrize(
    ("references", "said"),
    [
        ((BITS + 1, 0, 0, 0), "bytes of unchanged bits, more than"),
        ((0, BITS + 1, 0, 0), "bytes of equal bits, more than"),
        ((0, 0, 2**32 - 1, 0), "bytes of delta bits, more than"),
        ((0, 0, 0, MAX_UNIT_PAGES + 1), "1025 pages that equal others, more than"),
    ],
)
def test_too_many_references_are_refused_by_the_header(references: tuple[int, ...], said: str) -> None:
    refused(0, 0, 0, references, said)


def test_the_largest_header_is_read() -> None:
    largest = parse_header(
        struct.pack("<QIIIIQIIII", 1, 0, 1, MAX_RUNS, BITS, MAX_PAYLOAD, BITS, BITS, BITS, MAX_UNIT_PAGES)
    )
    assert largest is not None and largest.body_bytes == LARGEST


def refused(runs: int, zero_bytes: int, payload_bytes: int, more: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_header(struct.pack("<QIIIIQIIII", 1, 0, 1, runs, zero_bytes, payload_bytes, *more))


@given(st.binary(min_size=HEADER_SIZE, max_size=HEADER_SIZE))
def test_no_header_leads_to_more_than_the_limits(data: bytes) -> None:
    try:
        header = parse_header(data)
    except ValueError:
        return
    assert header is None or header.body_bytes + header.payload_bytes <= LARGEST + MAX_PAYLOAD


def test_a_hello_has_its_token() -> None:
    token = bytes(range(32))
    hello = pack_hello(token)
    assert hello == b"SWPL\x01\0\0\0" + token and len(hello) == HELLO_SIZE
    assert parse_hello(hello) == token


@pytest.mark.parametrize(
    ("hello", "said"),
    [(b"GET / HTTP/1.1\r\n".ljust(HELLO_SIZE), "no page lane"), (b"SWPL\x02\0\0\0" + bytes(32), "version 2, not 1")],
)
def test_another_hello_is_refused(hello: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_hello(hello)


@given(st.lists(st.integers(0, 2**64 - 2), max_size=5), st.lists(st.integers(0, 60), max_size=4), st.booleans())
def test_acks_come_in_any_pieces(acks: list[int], cuts: list[int], refused: bool) -> None:
    data = b"".join(map(pack_ack, acks)) + (pack_refusal("WRONG_STATE", "the session is gone") if refused else b"")
    reader, read, refusals = AckReader(), [], []
    bounds = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    for low, high in itertools.pairwise(bounds):
        try:
            read += reader.feed(data[low:high])
        except LaneRefusedError as refusal:
            refusals.append((refusal.reason, str(refusal)))
    assert refusals == ([("WRONG_STATE", "the session is gone")] if refused else [])
    assert read[: len(acks)] == read and (refused or read == acks)


def test_a_long_refusal_is_cut() -> None:
    with pytest.raises(LaneRefusedError) as refusal:
        list(AckReader().feed(pack_refusal("BAD_REQUEST", "x" * 5000)))
    assert refusal.value.reason == "BAD_REQUEST" and 900 < len(str(refusal.value)) < 1024


@given(st.binary(max_size=3000))
def test_noise_instead_of_acks_keeps_little(data: bytes) -> None:
    reader = AckReader()
    for start in range(0, len(data), 100):
        try:
            list(reader.feed(data[start : start + 100]))
        except LaneRefusedError:
            return
        assert len(reader._pending) <= 8 + 2 + 1024 + 100
