from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.memory import runs
from common.memory.image import MAX_EXTENT, MIN_EXTENT, ImageReport, fill, plan
from common.memory.layout import CHUNK_SIZE, PAGE_SIZE
from common.memory.ram import GuestRam


@given(st.integers(0, 100_000), st.floats(0, 1), st.integers(0, 2**32))
def test_a_plan_keeps_the_shares(pages: int, zero_fraction: float, seed: int) -> None:
    data, zero = plan(pages, zero_fraction, seed)
    gap = round(pages * zero_fraction)
    assert runs.total(data) == pages - gap
    assert runs.total(zero) == gap // 2
    both = runs.union(data, zero)
    assert runs.total(both) == runs.total(data) + runs.total(zero)
    assert not both[0].size or (both[0][0] >= 0 and int((both[0] + both[1]).max()) <= pages)
    assert (data[1][:-1] >= MIN_EXTENT).all() and (data[1] <= MAX_EXTENT).all() and (zero[1] > 0).all()
    again = plan(pages, zero_fraction, seed)
    assert all(np.array_equal(a, b) for a, b in zip((*data, *zero), (*again[0], *again[1]), strict=True))


def test_another_seed_is_another_plan() -> None:
    assert not np.array_equal(plan(10_000, 0.4, 1)[0][0][:5], plan(10_000, 0.4, 2)[0][0][:5])


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_between_none_and_all(fraction: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        plan(100, fraction, 1)


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def test_files_fill_the_extents_one_after_the_other(tmp_path: Path) -> None:
    contents = {"d/1": noise(1, 900_000), "a": noise(2, 900_001), "c": noise(3, 900_000), "b/1": noise(4, 10_000_000)}
    for directory in ("d", "b"):
        (tmp_path / directory).mkdir()
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    with GuestRam.create(4 * CHUNK_SIZE) as ram:
        report = fill(ram, [tmp_path], start_page=100, zero_fraction=0.5, seed=7)
        data, zero = plan(ram.layout.pages - 100, 0.5, 7)
        size = runs.total(data) * PAGE_SIZE
        assert report == ImageReport(
            3, size, runs.total(zero), ram.layout.pages - 100 - runs.total(data) - runs.total(zero)
        )
        everything = contents["a"] + contents["c"] + contents["b/1"] + contents["d/1"]
        assert ram.pages[runs.expand(data) + 100].tobytes() == everything[:size]
        assert not ram.pages[runs.expand(zero) + 100].any()


def test_what_no_file_fills_stays_holes(tmp_path: Path) -> None:
    (tmp_path / "only").write_bytes(noise(1, 1_500_000))
    with GuestRam.create(8 * CHUNK_SIZE) as ram:
        report = fill(ram, [tmp_path], start_page=0, zero_fraction=0.5, seed=3)
        assert (report.files, report.bytes) == (1, 1_500_000)
        data_pages = -(-1_500_000 // PAGE_SIZE)
        assert ram.allocated_bytes == (data_pages + report.zero_pages) * PAGE_SIZE
        assert report.hole_pages == ram.layout.pages - data_pages - report.zero_pages
        data, zero = plan(ram.layout.pages, 0.5, 3)
        end = runs.expand(data)[data_pages - 1]
        assert report.zero_pages == int(zero[1][zero[0] < end].sum())
        assert int(runs.expand(ram.data_runs()).max()) == end
        assert ram.pages[runs.expand(data)].tobytes()[:1_500_000] == noise(1, 1_500_000)


def test_no_byte_is_used_twice(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(noise(1, 50_000))
    (tree / "b").write_bytes(noise(1, 50_000))
    (tree / "c").write_bytes(noise(2, 50_000))
    os.link(tree / "c", tree / "d")
    (tree / "e").symlink_to(tree / "c")
    (tree / "f").write_bytes(b"")
    os.mkfifo(tree / "g")
    (tree / "h").symlink_to("nowhere")
    (tree / "loop").symlink_to(tree)
    with GuestRam.create(CHUNK_SIZE) as ram:
        report = fill(ram, [tree / "c", tree, tree / "a", tree / "missing"], start_page=0, zero_fraction=0, seed=1)
        assert (report.files, report.bytes, report.zero_pages) == (2, 100_000, 0)
        assert ram.view[:100_000].tobytes() == noise(2, 50_000) + noise(1, 50_000)
        assert report.hole_pages == ram.layout.pages - 25


def test_an_unreadable_file_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(noise(1, 5000))
    (tmp_path / "b").write_bytes(noise(2, 5000))
    opened = io.FileIO

    def refuse(path: Path) -> object:
        if path.name == "a":
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr("common.memory.image.io.FileIO", refuse)
    with GuestRam.create(CHUNK_SIZE) as ram:
        assert fill(ram, [tmp_path], start_page=0, seed=1).bytes == 5000
        assert ram.view[:5000].tobytes() == noise(2, 5000)


def test_nothing_is_filled_before_the_first_page_or_past_ram(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(noise(1, 3 * CHUNK_SIZE))
    with GuestRam.create(CHUNK_SIZE) as ram:
        assert fill(ram, [tmp_path], start_page=512, seed=1) == ImageReport(0, 0, 0, 0)
        assert fill(ram, [tmp_path], start_page=500, zero_fraction=0, seed=1).bytes == 12 * PAGE_SIZE
        assert runs.expand(ram.data_runs()).tolist() == list(range(500, 512))
        with pytest.raises(ValueError, match="not in RAM"):
            fill(ram, [tmp_path], start_page=513, seed=1)
