from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from switchover.v1 import host_pb2

from common.memory import pages as codec
from common.memory import runs
from common.memory.compression import LZ4, MAX_UNIT_PAGES, ZSTD
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE
from common.memory.pages import Applier, Encoding, PageBatch
from common.memory.ram import GuestRam
from common.rpc.page_batch import parse, serialize
from source import packer as packer_module
from source import tuner as tuner_module
from source.compression import Blend
from source.packer import FIRST_LOOKS, Packer

CHUNKS = 24
PAGES = CHUNKS * CHUNK_PAGES
ALL = runs.one(0, PAGES)


@pytest.fixture
def source() -> Iterator[GuestRam]:
    """Three quarters of it words that compress, with zero pages among them; the rest holes."""
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as ram:
        filled = PAGES * 3 // 4
        words = np.random.default_rng(1).integers(0, 50, (filled, PAGE_SIZE // 8), np.uint64)
        words[::7] = 0
        ram.words[:filled] = words
        yield ram


@pytest.fixture
def target() -> Iterator[GuestRam]:
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as ram:
        yield ram


@pytest.fixture
def opened(source: GuestRam) -> Iterator[Callable[..., Packer]]:
    packers: list[Packer] = []

    def open_packer(compression: host_pb2.Compression.ValueType, lanes: int = 1, *, packing: bool = True) -> Packer:
        packers.append(Packer(source, compression, lanes, (MAX_UNIT_PAGES, MAX_UNIT_PAGES), packing=packing))
        return packers[-1]

    yield open_packer
    for packer in packers:
        packer.close()


def send(packer: Packer, applier: Applier, source: GuestRam, number: int) -> list[PageBatch]:
    """Send all of RAM, acknowledging each batch at once; return what arrived."""
    arrived = []
    for batch in packer.batches(0, ALL, source.data_runs(), number, lambda: None):
        message = serialize(batch)
        arrived.append(parse(message))
        applier.apply(arrived[-1])
        packer.applied(batch.pages, len(message))
    return arrived


@pytest.mark.parametrize(
    ("compression", "encoding"),
    [
        (host_pb2.COMPRESSION_OFF, Encoding.RAW),
        (host_pb2.COMPRESSION_LZ4, Encoding.LZ4),
        (host_pb2.COMPRESSION_ZSTD, Encoding.ZSTD),
    ],
)
def test_pages_arrive_in_order_packed_as_told(
    source: GuestRam, target: GuestRam, opened: Callable[..., Packer], compression: int, encoding: Encoding
) -> None:
    packer = opened(compression)
    applier = Applier(target)
    arrived = send(packer, applier, source, 0)
    assert {batch.encoding for batch in arrived if batch.payload} == {encoding}
    firsts = [int(batch.run_first[0]) for batch in arrived if batch.payload]
    assert firsts == sorted(firsts) and len(firsts) > 4
    assert np.array_equal(source.pages, target.pages)
    again = send(packer, applier, source, 1)
    filled = int(source.pages[: PAGES * 3 // 4].any(axis=1).sum())
    assert sum(batch.unchanged_pages for batch in again) == (0 if encoding is Encoding.RAW else filled)


def test_acks_are_asked_for_now_and_then_and_for_the_last_batch(
    source: GuestRam, opened: Callable[..., Packer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer_module, "ACK_BYTES", 3 * MAX_UNIT_PAGES * PAGE_SIZE)
    monkeypatch.setattr(packer_module, "ACK_SECONDS", 1e9)
    batches = [
        batch
        for batch in opened(host_pb2.COMPRESSION_OFF).batches(0, ALL, source.data_runs(), 0, lambda: None)
        if batch.payload
    ]
    sizes = [0]
    for batch in batches[:-1]:
        sizes[-1] += batch.payload_bytes
        if not batch.more:
            sizes.append(0)
    assert not batches[-1].more and any(batch.more for batch in batches)
    assert len(sizes) > 1 and all(size >= packer_module.ACK_BYTES for size in sizes[:-1])
    monkeypatch.setattr(packer_module, "ACK_SECONDS", 0)
    slow = opened(host_pb2.COMPRESSION_OFF).batches(0, ALL, source.data_runs(), 0, lambda: None)
    assert not any(batch.more for batch in slow)


@pytest.mark.parametrize("compression", [host_pb2.COMPRESSION_ZSTD, host_pb2.COMPRESSION_AUTO])
def test_a_destination_that_knows_nothing_else_gets_whole_pages_in_lz4(
    source: GuestRam, target: GuestRam, opened: Callable[..., Packer], compression: int
) -> None:
    packer, applier = opened(compression, packing=False), Applier(target)
    for number in (0, 1):
        arrived = send(packer, applier, source, number)
        assert {batch.encoding for batch in arrived if batch.payload} == {Encoding.LZ4}
        assert not any(batch.unchanged or batch.equal or batch.delta for batch in arrived)
    assert np.array_equal(source.pages, target.pages)


@pytest.mark.parametrize(
    ("quick", "fast", "looks", "then"),
    [
        (0.0, 0.0, FIRST_LOOKS, Encoding.RAW),
        (0.0, float("inf"), FIRST_LOOKS, Encoding.ZSTD),
        (float("inf"), float("inf"), FIRST_LOOKS[:1], Encoding.ZSTD),
    ],
    ids=["it is fast", "it only seemed to be quick", "it is slow"],
)
def test_the_first_batches_go_as_they_are_to_see_how_fast_the_link_is(
    source: GuestRam,
    target: GuestRam,
    opened: Callable[..., Packer],
    monkeypatch: pytest.MonkeyPatch,
    quick: float,
    fast: float,
    looks: tuple[int, ...],
    then: Encoding,
) -> None:
    monkeypatch.setattr(tuner_module, "FAST_LINK", fast)
    monkeypatch.setattr(tuner_module, "QUICK_LINK", quick)
    monkeypatch.setattr(tuner_module, "LOOK_SECONDS", 1000.0)
    monkeypatch.setattr(tuner_module, "choose", lambda *_, **__: Blend(ZSTD, ZSTD, 0.0))
    packer = opened(host_pb2.COMPRESSION_AUTO)
    arrived = [batch for batch in send(packer, Applier(target), source, 0) if batch.payload]
    assert [batch.payload_pages for batch in arrived[: len(looks)]] == list(looks)
    assert {batch.encoding for batch in arrived[: len(looks)]} == {Encoding.RAW}
    assert {batch.encoding for batch in arrived[len(looks) :]} == {then}
    assert packer.compression == ("none" if then is Encoding.RAW else ZSTD.name)
    assert np.array_equal(source.pages, target.pages)


def test_what_is_packed_begins_and_ends_small(
    source: GuestRam, opened: Callable[..., Packer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer_module.os, "sched_getaffinity", lambda _: {0, 1})

    def sizes_of_a_round() -> list[int]:
        sizes = []
        left = PAGES
        for batch in opened(host_pb2.COMPRESSION_ZSTD).batches(0, ALL, source.data_runs(), 0, lambda: None):
            assert batch.payload_pages <= max(left // 4, packer_module.MIN_UNIT_PAGES)
            sizes += [batch.payload_pages] if batch.payload else []
            left -= batch.pages
        assert not left
        return sizes

    sizes = sizes_of_a_round()
    largest = sizes.index(max(sizes))
    assert sizes[: largest + 1] == [min(128 * 3**n // 2**n, MAX_UNIT_PAGES) for n in range(largest + 1)]
    assert sizes[largest] == MAX_UNIT_PAGES and sorted(sizes[largest:], reverse=True) == sizes[largest:]
    assert len(sizes[largest:]) > 4
    # Zeros that are batches of their own count too.
    monkeypatch.setattr(codec, "_WINDOW_PAGES", 1024)
    source.words[512:8192] = 0
    assert len(sizes_of_a_round()) > 4


def test_only_so_much_is_packed_ahead(
    source: GuestRam, opened: Callable[..., Packer], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Semaphore(0)
    count = [0]

    def slow(batch: PageBatch, _: object) -> bool:
        count[0] += 1
        started.release()
        return False

    monkeypatch.setattr(packer_module, "pack", slow)
    packer = opened(host_pb2.COMPRESSION_LZ4)
    batches = packer.batches(0, ALL, source.data_runs(), 0, lambda: None)
    holes = next(batches)
    assert not holes.payload
    next(batches)
    assert count[0] <= packer._ahead + 1
    assert (packer.compression, opened(host_pb2.COMPRESSION_ZSTD).compression) == (LZ4.name, ZSTD.name)


def test_what_fails_while_packing_fails_the_lane(
    source: GuestRam, opened: Callable[..., Packer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch: PageBatch, _: object) -> bool:
        raise MemoryError

    monkeypatch.setattr(packer_module, "pack", broken)
    with pytest.raises(MemoryError):
        list(opened(host_pb2.COMPRESSION_ZSTD).batches(0, ALL, source.data_runs(), 0, lambda: None))


@pytest.mark.parametrize(
    ("pages", "seconds", "then"),
    [(1024, 0.001, 2048), (4096, 0.001, 4096), (2048, 0.02, 2048), (4096, 0.1, 2048), (1024, 9.0, 1024)],
)
def test_batches_grow_while_the_link_is_fast(pages: int, seconds: float, then: int) -> None:
    assert packer_module.next_unit(pages, seconds, (1024, 4096)) == then


def test_batches_stay_short_for_a_lane_that_wants_them_short() -> None:
    assert packer_module.next_unit(256, 0.0, (256, 256)) == 256
    assert packer_module.next_unit(256, 9.0, (256, 256)) == 256


@pytest.mark.parametrize("mib", [4, 12, 24])
def test_what_is_packed_does_not_wait_for_more(
    source: GuestRam, opened: Callable[..., Packer], monkeypatch: pytest.MonkeyPatch, mib: int
) -> None:
    packer = opened(host_pb2.COMPRESSION_ZSTD)
    submitted = []

    def at_once(pack: Callable[..., object], *arguments: object) -> Future[object]:
        done: Future[object] = Future()
        done.set_result(pack(*arguments))
        submitted.append(done)
        return done

    monkeypatch.setattr(packer._pool, "submit", at_once)
    pages = runs.one(0, (mib << 20) // PAGE_SIZE)
    batches = packer.batches(0, pages, pages, 0, lambda: None)
    next(batch for batch in batches if batch.payload)
    assert len(submitted) <= packer._ahead + 1
    assert len(list(batches)) > len(submitted) // 2
