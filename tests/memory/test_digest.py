from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common.ipc.channel import ClosedError
from common.memory.digest import ZERO_CHUNK, ZERO_PAGE, DigestWorkers, balance, chunk_digests, page_digests
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE
from common.memory.ram import GuestRam

CHUNKS = 6


def digests_of(data: bytes, size: int) -> list[int]:
    return [xxhash.xxh3_64_intdigest(data[start : start + size]) for start in range(0, len(data), size)]


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    """Chunks that are full, half full, scattered, holes, and zeros."""
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as ram:
        random = np.random.default_rng(3)
        ram.bytes[:CHUNK_SIZE] = random.integers(0, 256, CHUNK_SIZE, np.uint8)
        ram.pages[CHUNK_PAGES : CHUNK_PAGES + 256] = 1
        ram.pages[2 * CHUNK_PAGES + 3 : 3 * CHUNK_PAGES : 5] = 2
        ram.populate(4 * CHUNK_PAGES, CHUNK_PAGES)
        ram.pages[CHUNKS * CHUNK_PAGES - 1] = 4
        yield ram


def test_digests_are_those_of_the_bytes_and_read_no_holes(ram: GuestRam) -> None:
    allocated = ram.allocated_bytes
    digests = chunk_digests(ram, 0, CHUNKS)
    pages = [page_digests(ram, chunk) for chunk in range(CHUNKS)]
    assert ram.allocated_bytes == allocated
    contents = ram.view.tobytes()
    assert digests.tolist() == digests_of(contents, CHUNK_SIZE)
    assert np.concatenate(pages).tolist() == digests_of(contents, PAGE_SIZE)
    assert digests[3] == digests[4] == ZERO_CHUNK and pages[3][0] == ZERO_PAGE
    assert chunk_digests(ram, 2, 4).tolist() == digests[2:4].tolist()
    assert chunk_digests(ram, 2, 2).tolist() == []


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 2 * CHUNK_PAGES - 1), max_size=20), st.sets(st.integers(0, 1)))
def test_a_digest_does_not_tell_holes_from_zeros(pages: set[int], populated: set[int]) -> None:
    with GuestRam.create(2 * CHUNK_SIZE) as sparse, GuestRam.create(2 * CHUNK_SIZE) as dense:
        for chunk in populated:
            dense.populate(chunk * CHUNK_PAGES, CHUNK_PAGES)
        for page in pages:
            sparse.pages[page, page] = dense.pages[page, page] = 1
        assert chunk_digests(sparse, 0, 2).tolist() == chunk_digests(dense, 0, 2).tolist()
        assert page_digests(sparse, 1).tolist() == page_digests(dense, 1).tolist()
        dense.pages[CHUNK_PAGES, 4095] ^= 1
        assert (chunk_digests(sparse, 0, 2) == chunk_digests(dense, 0, 2)).tolist() == [True, False]


def test_a_tebibyte_of_holes_is_digested_unread() -> None:
    with GuestRam.create(1 << 40) as ram:
        digests = chunk_digests(ram, 0, 1 << 19)
        assert digests.size == 1 << 19 and (digests == ZERO_CHUNK).all()
        assert ram.allocated_bytes == 0


@given(st.lists(st.integers(1, 1000), max_size=50), st.integers(1, 6))
def test_parts_are_contiguous_and_even(weights: list[int], parts: int) -> None:
    cuts = balance(np.array(weights, np.int64), parts)
    assert len(cuts) <= parts
    assert [number for first, last in cuts for number in range(first, last)] == list(range(len(weights)))
    assert all(first < last for first, last in cuts)
    assert all(sum(weights[first:last]) <= sum(weights) / parts + max(weights) for first, last in cuts)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_digests(ram: GuestRam, workers: int) -> None:
    allocated = ram.allocated_bytes
    with DigestWorkers(ram, workers) as pool:
        assert pool.chunks().tolist() == chunk_digests(ram, 0, CHUNKS).tolist()
        ram.pages[3 * CHUNK_PAGES + 7] = 9
        assert pool.chunks(1, 5).tolist() == chunk_digests(ram, 1, 5).tolist()
        assert pool.chunks(2, 2).size == 0
        assert pool.pages(3).tolist() == page_digests(ram, 3).tolist()
        results: list[list[int]] = []
        threads = [threading.Thread(target=lambda: results.append(pool.chunks().tolist())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [chunk_digests(ram, 0, CHUNKS).tolist()] * 4
    assert ram.allocated_bytes == allocated + PAGE_SIZE


def test_only_chunks_of_ram_are_asked_for(ram: GuestRam) -> None:
    with DigestWorkers(ram) as pool:
        for first, last in [(-1, 2), (3, 2), (0, CHUNKS + 1)]:
            with pytest.raises(ValueError, match="not all among"):
                pool.chunks(first, last)
        for chunk in (-1, CHUNKS):
            with pytest.raises(ValueError, match="not among"):
                pool.pages(chunk)


def test_a_worker_ends_when_its_socket_does_and_its_loss_is_noticed(ram: GuestRam) -> None:
    pool = DigestWorkers(ram, 2)
    first, second = pool._processes
    assert pool.chunks().size == CHUNKS
    pool._clients[0].close()
    assert first.wait(10) == 0
    os.kill(second.pid, signal.SIGINT)
    assert pool._clients[1].call("pages", chunk=0).payload
    second.kill()
    with pytest.raises((ClosedError, OSError)):
        pool.chunks()
    pool.close()
    pool.close()
