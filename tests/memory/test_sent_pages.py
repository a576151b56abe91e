from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.memory import runs
from common.memory.allocator import tune_allocator
from common.memory.compression import MAX_UNIT_PAGES, METHODS, ZSTD, Method
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE
from common.memory.pages import Applier, PageBatch, encode, flags, pack
from common.memory.ram import GuestRam
from common.memory.sent import SentPages
from common.rpc.page_batch import parse, serialize

CHUNKS = 4
PAGES = CHUNKS * CHUNK_PAGES


def resident() -> int:
    """Bytes of memory that this process has, files aside."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) << 10


def test_memory_is_taken_as_it_is_needed() -> None:
    tune_allocator()  # as daemons do: malloc clears what it has had before, and so takes it
    pages = 1 << 22
    held = [bytearray(8 << 20) for _ in range(4)]
    before = resident()
    del held
    sent = SentPages(pages, 32 << 20)
    sent._empty = False
    covered = np.array([0], np.uint64), np.array([1 << 16], np.uint64)
    for number in range(0, pages, 1 << 16):
        covered[0][0] = number
        sent.forget(PageBatch(0, 0, 1, *covered, bytes(1 << 13), ()))
    assert resident() - before < 16 << 20


class Lane:
    """A source and a target with one lane between them; what arrives is compared with what was copied."""

    def __init__(self, cache_bytes: int = 16 << 20) -> None:
        self.source = GuestRam.create(CHUNKS * CHUNK_SIZE)
        self.target = GuestRam.create(CHUNKS * CHUNK_SIZE)
        self.sent = SentPages(PAGES, cache_bytes)
        self.applier = Applier(self.target)
        self.round = 0

    def close(self) -> None:
        self.source.close()
        self.target.close()

    def send(self, pages: list[int], method: Method = ZSTD, unit: int = 256, *, forget: bool = False) -> PageBatch:
        """Send pages as a round of their own; return the last batch."""
        wanted = runs.from_pages(np.array(sorted(set(pages)), np.int64))
        for copied in encode(self.source, *wanted, round=self.round, copied=lambda: unit):
            numbers = copied.numbers()
            expected = np.zeros((numbers.size, PAGE_SIZE), np.uint8)
            held = ~flags(copied.zero, numbers.size)
            if copied.payload:
                expected[held] = np.frombuffer(copied.payload[0], np.uint8).reshape(-1, PAGE_SIZE)
            # RAM changes under our hands; nothing of that may be in what is sent.
            before = self.source.pages[numbers[held]]
            self.source.pages[numbers[held]] ^= 0x55
            if forget:
                self.sent.forget(copied)
            else:
                self.sent.reduce(copied)
                if copied.payload:
                    pack(copied, method)
            arrived = parse(serialize(copied))
            self.applier.apply(arrived)
            assert np.array_equal(self.target.pages[numbers], expected)
            self.source.pages[numbers[held]] = before
        self.round += 1
        return arrived


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made.close()


def noise(seed: int, pages: int = 1) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (pages, PAGE_SIZE), np.uint8)


def kinds(batch: PageBatch) -> tuple[int, int, int, int, int]:
    """Pages that are zero, unchanged, equal, differences, whole."""
    whole = batch.payload_pages - batch.delta_pages
    return batch.zero_pages, batch.unchanged_pages, batch.equal_pages, batch.delta_pages, whole


def test_a_page_that_has_not_changed_costs_a_bit(lane: Lane) -> None:
    lane.source.pages[10:20] = noise(1, 10)
    assert kinds(lane.send([*range(10, 20)])) == (0, 0, 0, 0, 10)
    lane.source.pages[13] = noise(2)
    again = lane.send([*range(10, 20)])
    assert kinds(again) == (0, 9, 0, 0, 1) and again.payload_bytes == PAGE_SIZE
    assert len(serialize(lane.send([*range(10, 20)]))) < 50


def test_a_page_that_was_zero_meanwhile_is_not_unchanged(lane: Lane) -> None:
    for contents in (noise(1), 0, noise(1), 0, 0):
        lane.source.pages[3] = contents
        assert lane.send([3]).unchanged_pages == 0


def test_a_difference_is_to_what_was_sent_last_in_whatever_way(lane: Lane) -> None:
    def edit(page: int) -> None:
        lane.source.pages[page, lane.round * 8] ^= 1

    lane.source.pages[3:5] = noise(1)
    for _ in range(3):
        edit(3)
        lane.send([3, 4])
    lane.source.pages[4] = lane.source.pages[3]
    edit(4)
    lane.send([4])
    lane.source.pages[3] = lane.source.pages[4]
    assert kinds(lane.send([3])) == (0, 0, 1, 0, 0)
    edit(3)
    assert kinds(lane.send([3])) == (0, 0, 0, 1, 0)
    before = lane.source.pages[3].copy()
    lane.source.pages[3] = 0
    lane.send([3])
    lane.source.pages[3] = before
    edit(3)
    assert kinds(lane.send([3])) == (0, 0, 0, 0, 1)
    edit(3)
    lane.send([3], forget=True)
    edit(3)
    assert kinds(lane.send([3])) == (0, 0, 0, 0, 1)


def test_a_page_of_which_little_has_changed_is_a_difference(lane: Lane) -> None:
    lane.source.pages[5] = noise(1)
    assert kinds(lane.send([5])) == (0, 0, 0, 0, 1)
    # It was sent once; from the second time on its contents are kept.
    for number in range(1, 4):
        lane.source.pages[5, number * 100] ^= 1
        sent = lane.send([5])
        assert kinds(sent) == ((0, 0, 0, 0, 1) if number == 1 else (0, 0, 0, 1, 0))
    assert sent.payload_bytes < 100
    lane.source.pages[5] = noise(2)
    assert kinds(lane.send([5])) == (0, 0, 0, 0, 1)


def test_a_page_that_equals_another_names_it(lane: Lane) -> None:
    lane.source.pages[5:7] = noise(1, 2)
    lane.send([5, 6])
    lane.source.pages[100] = lane.source.pages[6]
    lane.source.pages[101] = noise(2)
    sent = lane.send([100, 101])
    assert kinds(sent) == (0, 0, 1, 0, 1) and sent.equal_to.tolist() == [6]
    # Page 6 changes in the batch in which another refers to what it was.
    lane.source.pages[200] = lane.source.pages[6]
    lane.source.pages[6] = noise(3)
    assert kinds(lane.send([6, 200])) == (0, 0, 1, 0, 1)
    # What is not there any more is not referred to.
    lane.source.pages[300] = noise(1, 2)[0]
    lane.source.pages[5] = 0
    lane.send([5])
    assert kinds(lane.send([300])) == (0, 0, 0, 0, 1)


def test_what_was_sent_uncopied_is_not_referred_to(lane: Lane) -> None:
    lane.source.pages[5] = noise(1)
    lane.send([5])
    lane.send([5])
    lane.source.pages[5] = noise(2)
    lane.send([5], forget=True)
    lane.source.pages[5] = noise(1)
    lane.source.pages[6] = noise(1)
    assert kinds(lane.send([5, 6])) == (0, 0, 0, 0, 2)


def test_contents_that_were_sent_longest_ago_make_room(lane: Lane) -> None:
    small = Lane(cache_bytes=0)  # which keeps one unit
    everything = [*range(MAX_UNIT_PAGES + 10)]
    # All alike but for a word, so that a difference to the wrong one would be small too.
    small.source.pages[: len(everything)] = noise(1)
    small.source.words[: len(everything), 7] = np.arange(len(everything))
    for _ in range(3):
        small.source.pages[: len(everything), 0] += 1
        small.send(everything)
    small.source.pages[: len(everything), 0] += 1
    # The first ten were overwritten by the last ten.
    assert kinds(small.send([*range(20)])) == (0, 0, 0, 10, 10)
    small.close()


contents = st.sampled_from(["zero", "one", "two", "noise", "nudge"])
edits = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 400), st.integers(1, 3), contents), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(edits, st.booleans(), st.sampled_from(METHODS[1:])), min_size=2, max_size=6),
    st.integers(1, 300),
    st.integers(0, 8 << 20),
)
def test_whatever_is_sent_arrives(
    steps: list[tuple[list[tuple[int, int, int, str]], bool, Method]], unit: int, cache_bytes: int
) -> None:
    lane = Lane(cache_bytes)
    try:
        for number, (writes, forget, method) in enumerate(steps):
            touched: set[int] = set()
            for first, count, stride, kind in writes:
                pages = np.arange(first, PAGES, stride)[:count]
                touched |= set(pages.tolist())
                if kind == "nudge":
                    lane.source.pages[pages, number] += 1
                elif kind == "noise":
                    lane.source.pages[pages] = noise(number, pages.size)
                else:
                    lane.source.pages[pages] = {"zero": 0, "one": noise(1000), "two": noise(2000)}[kind]
            lane.send([*touched], method, unit, forget=forget)
            dirty = lane.source.pages[sorted(touched)]
            assert np.array_equal(lane.target.pages[sorted(touched)], dirty)
        assert np.array_equal(lane.source.pages, lane.target.pages)
    finally:
        lane.close()
