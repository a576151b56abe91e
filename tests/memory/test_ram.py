from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.memory import runs
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE
from common.memory.ram import GuestRam


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam.create(4 * CHUNK_SIZE) as created:
        yield created


def data_pages(ram: GuestRam, within: runs.Runs | None = None) -> list[int]:
    return runs.expand(ram.data_runs(within)).tolist()


def test_the_views_are_the_same_bytes(ram: GuestRam) -> None:
    ram.view[PAGE_SIZE + 8] = 7
    assert ram.bytes[PAGE_SIZE + 8] == 7
    assert ram.pages.shape == (4 * CHUNK_PAGES, PAGE_SIZE) and ram.pages[1, 8] == 7
    assert ram.words.shape == (4 * CHUNK_PAGES, 512) and ram.words[1, 1] == 7
    assert ram.layout.size == ram.size == 4 * CHUNK_SIZE


def test_the_size_is_sealed(ram: GuestRam) -> None:
    for size in (CHUNK_SIZE, 8 * CHUNK_SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(ram.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_new_size_must_be_a_size_of_ram() -> None:
    with pytest.raises(ValueError, match="multiple of 2 MiB"):
        GuestRam.create(PAGE_SIZE)


def test_two_mappings_share_memory(ram: GuestRam) -> None:
    with GuestRam.attach(os.dup(ram.fd)) as other, GuestRam.attach(os.dup(ram.fd), writable=False) as reader:
        other.pages[5] = 9
        assert ram.pages[5, 100] == 9 and reader.pages[5, 100] == 9
        assert not reader.bytes.flags.writeable and reader.view.readonly
        assert data_pages(reader) == [5]


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL])
def test_memory_that_may_be_truncated_is_refused(seals: int) -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, CHUNK_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(ValueError, match="not sealed"):
        GuestRam.attach(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_sealed_memfd_of_another_size_and_no_memfd_are_refused() -> None:
    fd = os.memfd_create("odd", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    with pytest.raises(ValueError, match="multiple of 2 MiB"):
        GuestRam.attach(fd)
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(ValueError, match="not a memfd"):
        GuestRam.attach(reader)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 2 * CHUNK_PAGES - 1), max_size=30), max_size=4), st.data())
def test_data_runs_are_the_pages_that_were_written(steps: list[set[int]], data: st.DataObject) -> None:
    with GuestRam.create(2 * CHUNK_SIZE) as ram:
        written: set[int] = set()
        for step in steps:
            for page in step:
                ram.pages[page, page % PAGE_SIZE] = 1
            written |= step
            within = data.draw(st.none() | st.sets(st.integers(0, 2 * CHUNK_PAGES - 1)))
            if within is None:
                assert data_pages(ram) == sorted(written)
            else:
                asked = runs.from_pages(np.array(sorted(within), np.int64))
                assert data_pages(ram, asked) == sorted(written & within)
        assert ram.allocated_bytes == len(written) * PAGE_SIZE


def test_a_tebibyte_of_holes_stays_one() -> None:
    with GuestRam.create(1 << 40) as ram:
        assert data_pages(ram) == []
        last = ram.layout.pages - 1
        ram.pages[last, 0] = 1
        ram.pages[1 << 27, 0] = 1
        assert data_pages(ram) == [1 << 27, last]
        assert data_pages(ram, runs.one(last - 10, 10)) == []
        assert ram.allocated_bytes == 2 * PAGE_SIZE


def test_populated_pages_are_data_and_keep_their_contents(ram: GuestRam) -> None:
    ram.pages[12] = 3
    ram.populate(10, 5)
    assert data_pages(ram) == [10, 11, 12, 13, 14]
    assert (ram.pages[12] == 3).all() and not ram.pages[13].any()
    ram.populate(0, 0)
    assert ram.allocated_bytes == 5 * PAGE_SIZE


def test_populating_without_the_advice(ram: GuestRam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.memory.ram._MADV_POPULATE_WRITE", 9999)
    ram.pages[12] = 3
    ram.populate(10, 5)
    assert ram.allocated_bytes == 5 * PAGE_SIZE
    assert (ram.pages[12] == 3).all() and not ram.pages[13].any()


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, -1), (0, 4 * CHUNK_PAGES + 1), (4 * CHUNK_PAGES, 1)])
def test_only_ram_is_populated(ram: GuestRam, first: int, count: int) -> None:
    with pytest.raises(ValueError, match="not all in RAM"):
        ram.populate(first, count)
    assert ram.allocated_bytes == 0


def test_views_outlive_close() -> None:
    ram = GuestRam.create(CHUNK_SIZE)
    view = ram.pages[3:5]
    fd = ram.fd
    ram.close()
    ram.close()
    view[:] = 5
    assert view.sum() == 5 * 2 * PAGE_SIZE
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_mapping_data_changes_nothing_and_allocates_nothing() -> None:
    with GuestRam.create(8 << 20) as ram:
        ram.bytes[5 * PAGE_SIZE] = 7
        ram.bytes[1000 * PAGE_SIZE] = 9
        before = ram.allocated_bytes
        with GuestRam.attach(os.dup(ram.fd), writable=False) as other:
            other.map_data(other.data_runs())
            assert (other.bytes[5 * PAGE_SIZE], other.bytes[1000 * PAGE_SIZE]) == (7, 9)
        assert ram.allocated_bytes == before == 2 * PAGE_SIZE
