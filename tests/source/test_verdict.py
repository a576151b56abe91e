from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from switchover.v1 import host_pb2, migration_pb2

from common.machine.device import Digest
from common.memory import bitmap
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, HIGH_START, LOW_END, PAGE_SIZE, Layout
from common.memory.packed import PackedBitmap
from source.history import History
from source.verdict import (
    EXPLAINED_PAGES,
    DataLossError,
    check_unchanged,
    device_digest,
    judge_devices,
    judge_memory,
)

CHUNKS = 4
LAYOUT = Layout(CHUNKS * CHUNK_SIZE)
Digests = npt.NDArray[np.uint64]


def page_digests(chunk: int) -> Digests:
    """Digests of our pages: each its own."""
    return np.arange(chunk * CHUNK_PAGES, (chunk + 1) * CHUNK_PAGES, dtype=np.uint64) + np.uint64(1 << 40)


def mismatch(chunk: int, differing: set[int]) -> migration_pb2.ChunkMismatch:
    theirs = page_digests(chunk)
    for page in differing:
        theirs[page % CHUNK_PAGES] += np.uint64(1)
    return migration_pb2.ChunkMismatch(chunk=chunk, page_digests=theirs.astype("<u8").tobytes())


def nobody(_: int) -> list[str]:
    return []


def test_memory_that_is_equal_has_no_verdict_against_it() -> None:
    result = host_pb2.MigrationResult()
    judge_memory([], page_digests, LAYOUT, History(), nobody, result)
    assert result == host_pb2.MigrationResult()


@given(st.sets(st.integers(0, LAYOUT.pages - 1), min_size=1, max_size=40))
def test_exactly_the_pages_that_differ_are_counted_and_the_first_are_named(pages: set[int]) -> None:
    result = host_pb2.MigrationResult()
    chunks = sorted({page // CHUNK_PAGES for page in pages})
    mismatches = [mismatch(chunk, {page for page in pages if page // CHUNK_PAGES == chunk}) for chunk in chunks]
    with pytest.raises(DataLossError, match=f"^{len(pages)} pages at the destination differ"):
        judge_memory(mismatches, page_digests, LAYOUT, History(), nobody, result)
    assert result.mismatched_pages == len(pages)
    assert [found.page for found in result.mismatches] == sorted(pages)[:EXPLAINED_PAGES]
    assert [found.gpa for found in result.mismatches] == [page * PAGE_SIZE for page in sorted(pages)][:EXPLAINED_PAGES]


def test_a_page_is_explained_by_its_history() -> None:
    history = History()
    dirty = bitmap.empty(LAYOUT.pages)
    bitmap.set_range(dirty, 5, 1)
    history.sent(1, PackedBitmap.of(dirty, LAYOUT.pages))
    history.reported(0, "default", PackedBitmap.of(dirty, LAYOUT.pages))
    history.reported(1, "default", PackedBitmap.of(bitmap.empty(LAYOUT.pages), LAYOUT.pages))
    result = host_pb2.MigrationResult()
    with pytest.raises(DataLossError, match="the first at GPA 0x5000; it could have been written by: vcpu, nic0 at"):
        judge_memory(
            [mismatch(0, {5, 6})],
            page_digests,
            LAYOUT,
            history,
            lambda page: [f"nic0 at IOVA {page:#x}"] if page == 5 else [],
            result,
        )
    first, second = result.mismatches
    assert (first.page, list(first.sent_in_rounds), list(first.reported)) == (5, [0, 1], ["after round 0: default"])
    assert first.could_have_written == ["vcpu", "nic0 at IOVA 0x5"]
    assert second.sent_in_rounds == [0] and not second.reported and second.could_have_written == ["vcpu"]


def test_a_page_behind_the_hole_has_the_address_that_the_guest_knows() -> None:
    layout = Layout(LOW_END + CHUNK_SIZE)
    page = LOW_END // PAGE_SIZE + 3
    result = host_pb2.MigrationResult()
    with pytest.raises(DataLossError):
        judge_memory([mismatch(page // CHUNK_PAGES, {page})], page_digests, layout, History(), nobody, result)
    assert result.mismatches[0].gpa == HIGH_START + 3 * PAGE_SIZE


def test_chunks_without_pages_are_data_loss_too() -> None:
    """A deferred verdict has no page digests: the machine runs, and its pages have changed since."""
    result = host_pb2.MigrationResult()
    mismatches = [migration_pb2.ChunkMismatch(chunk=chunk) for chunk in (1, 3)]
    said = "^2 chunks of 2 MiB at the destination differ from the source's, the first at GPA 0x200000"
    with pytest.raises(DataLossError, match=f"{said}; only vCPUs could have written to it$"):
        judge_memory(mismatches, page_digests, LAYOUT, History(), nobody, result)
    asked: list[int] = []

    def nic(page: int) -> list[str]:
        asked.append(page)
        return ["nic0 at IOVA 0x5"] if page == CHUNK_PAGES + 7 else []

    with pytest.raises(DataLossError, match=f"{said}; pages of it could have been written by: vcpu, nic0 at IOVA 0x5$"):
        judge_memory(mismatches, page_digests, LAYOUT, History(), nic, result)
    assert asked == list(range(CHUNK_PAGES, CHUNK_PAGES + 8))  # of the first chunk, until one is found


def test_who_could_have_written_to_the_next_chunk_is_no_suspect() -> None:
    found = [migration_pb2.ChunkMismatch(chunk=1)]

    def next_to_it(page: int) -> list[str]:
        return ["nic0"] if page >= 2 * CHUNK_PAGES else []

    with pytest.raises(DataLossError, match=r"; only vCPUs could have written to it$"):
        judge_memory(found, page_digests, LAYOUT, History(), next_to_it, host_pb2.MigrationResult())
    with pytest.raises(DataLossError, match=r"by: vcpu, nic0, nvme0$"):
        judge_memory(found, page_digests, LAYOUT, History(), lambda _: ["nic0", "nvme0"], host_pb2.MigrationResult())


def test_a_chunk_whose_pages_are_equal_by_now_still_differs() -> None:
    with pytest.raises(DataLossError, match=r"^1 chunks of 2 MiB at the destination differ"):
        judge_memory([mismatch(2, set())], page_digests, LAYOUT, History(), nobody, host_pb2.MigrationResult())


def test_a_chunk_that_is_not_in_ram_is_never_read() -> None:
    def read(chunk: int) -> Digests:
        pytest.fail(f"reads chunk {chunk}")

    found = migration_pb2.ChunkMismatch(chunk=CHUNKS, page_digests=bytes(CHUNK_PAGES * 8))
    with pytest.raises(DataLossError, match="difference in chunk 4, which is not in RAM"):
        judge_memory([found], read, LAYOUT, History(), nobody, host_pb2.MigrationResult())


def devices(*names: str) -> host_pb2.MigrationResult:
    return host_pb2.MigrationResult(
        devices=[host_pb2.DeviceResult(name=name, verified="not verified") for name in names]
    )


@pytest.mark.parametrize(
    ("names", "compared", "each", "whole"),
    [
        ([], [], [], "true"),
        (["nic0", "nvme0"], ["nic0", "nvme0"], ["compared", "compared"], "true"),
        (["nic0", "nvme0"], ["nvme0"], ["transport", "compared"], "transport"),
        (["nic0"], [], ["transport"], "transport"),
    ],
)
def test_a_device_counts_as_compared_only_if_it_was(
    names: list[str], compared: list[str], each: list[str], whole: str
) -> None:
    result = devices(*names)
    judge_devices(migration_pb2.VerifyResponse(compared_devices=compared), result)
    assert [device.verified for device in result.devices] == each
    assert result.verified == whole


def test_a_device_that_differs_is_data_loss() -> None:
    result = devices("nic0", "nvme0")
    response = migration_pb2.VerifyResponse(
        compared_devices=["nic0", "nvme0"], devices=[migration_pb2.DeviceMismatch(name="nvme0", what="state dump")]
    )
    with pytest.raises(DataLossError, match=r"differ from the source's: nvme0 \(state dump\)$"):
        judge_devices(response, result)
    assert [device.verified for device in result.devices] == ["compared", "differs"]
    assert result.verified == ""


def test_every_device_that_differs_is_named() -> None:
    differing = [migration_pb2.DeviceMismatch(name=name, what="BARs") for name in ("nic0", "nvme0")]
    with pytest.raises(DataLossError, match=r": nic0 \(BARs\), nvme0 \(BARs\)$"):
        judge_devices(migration_pb2.VerifyResponse(devices=differing), devices("nic0", "nvme0"))


def test_ram_that_stood_still_is_unchanged() -> None:
    check_unchanged(np.arange(8, dtype=np.uint64), np.arange(8, dtype=np.uint64), lambda *_: ["not asked for"])


def test_a_late_write_is_noticed() -> None:
    stopped = np.arange(8, dtype=np.uint64)
    later = stopped.copy()
    later[[3, 6]] += np.uint64(1)
    with pytest.raises(DataLossError, match=r"^2 chunks of 2 MiB .* the first is chunk 3: .*; 1536 \+ 512"):
        check_unchanged(stopped, later, lambda first, pages: [f"{first} + {pages}"])
    with pytest.raises(DataLossError, match=r"; nic0 wrote it; vcpu wrote it$"):
        check_unchanged(stopped, later, lambda *_: ["nic0 wrote it", "vcpu wrote it"])


def test_a_digest_goes_over_the_wire_as_it_is() -> None:
    ones = (1 << 64) - 1
    assert device_digest("nic0", Digest(ones, (1, ones), 7, compared=True)) == migration_pb2.DeviceDigest(
        name="nic0", config=ones, bars=[1, ones], dump=7, compared=True
    )
