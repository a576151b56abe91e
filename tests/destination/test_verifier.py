"""The verifier on real RAM; only the worker processes are replaced by the functions that they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from switchover.v1 import migration_pb2

from common.machine.device import Digest
from common.memory import digest
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE
from common.memory.pages import Applier, Encoding, PageBatch
from common.memory.ram import GuestRam
from destination import verifier as verifier_module
from destination.verifier import Verifier, compare_device

CHUNKS = 4


class Workers:
    """Digests in this process, and which chunks they were asked for."""

    read: list[tuple[int, int]]

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        Workers.read = []

    def chunks(self, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint64]:
        last = CHUNKS if last is None else last
        Workers.read.append((first, last))
        return digest.chunk_digests(self._ram, first, last)

    def pages(self, chunk: int) -> npt.NDArray[np.uint64]:
        return digest.page_digests(self._ram, chunk)

    def close(self) -> None:
        pass


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam.create(CHUNKS * CHUNK_SIZE) as made:
        yield made


@pytest.fixture
def applier(ram: GuestRam) -> Applier:
    return Applier(ram)


@pytest.fixture
def verifier(ram: GuestRam, applier: Applier, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verifier]:
    monkeypatch.setattr(verifier_module, "DigestWorkers", Workers)
    made = Verifier(ram, applier, early=False)
    yield made
    made.close()


def write(applier: Applier, page: int) -> None:
    runs = np.array([page], np.uint64), np.array([1], np.uint64)
    applier.apply(PageBatch(1, 0, Encoding.RAW, *runs, b"\0", [bytes([page % 251 + 1]) * PAGE_SIZE]))


def expected(ram: GuestRam) -> bytes:
    return digest.chunk_digests(ram, 0, CHUNKS).astype("<u8").tobytes()


def test_what_is_equal_has_no_mismatch(verifier: Verifier, applier: Applier, ram: GuestRam) -> None:
    write(applier, 3)
    verifier.read_all()
    assert verifier.compare(expected(ram), pages=True) == []


@pytest.mark.parametrize("pages", [False, True])
def test_chunks_that_differ_are_named_with_their_pages_only_if_they_stand_still(
    verifier: Verifier, ram: GuestRam, pages: bool
) -> None:
    theirs = expected(ram)
    ram.pages[CHUNK_PAGES + 7, 0] = 1
    ram.pages[3 * CHUNK_PAGES, 5] = 1
    verifier.read_all()
    found = verifier.compare(theirs, pages=pages)
    assert [mismatch.chunk for mismatch in found] == [1, 3]
    read = [digest.page_digests(ram, chunk).tobytes() if pages else b"" for chunk in (1, 3)]
    assert [mismatch.page_digests for mismatch in found] == read


def test_only_the_first_chunks_come_with_pages_but_all_are_named(
    verifier: Verifier, ram: GuestRam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier_module, "CHUNKS_WITH_PAGES", 1)
    theirs = expected(ram)
    ram.pages[::CHUNK_PAGES, 0] = 1
    verifier.read_all()
    found = verifier.compare(theirs, pages=True)
    assert [(mismatch.chunk, len(mismatch.page_digests)) for mismatch in found] == [
        (0, CHUNK_PAGES * 8),
        (1, 0),
        (2, 0),
        (3, 0),
    ]


@pytest.mark.parametrize("size", [0, 8 * CHUNKS - 1, 8 * CHUNKS + 8])
def test_digests_of_another_ram_are_refused(verifier: Verifier, size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes of digests for 4 chunks"):
        verifier.compare(bytes(size), pages=True)


def test_only_what_was_written_since_is_read_again(verifier: Verifier, applier: Applier, ram: GuestRam) -> None:
    verifier.complete()
    assert Workers.read == [(0, CHUNKS)]
    write(applier, 2 * CHUNK_PAGES)
    verifier.complete()
    assert Workers.read[1:] == [(2, 3)]
    assert verifier.compare(expected(ram), pages=False) == []


def test_all_is_read_whatever_was_read_before(verifier: Verifier, ram: GuestRam) -> None:
    """What nobody sent and yet was written, by a device that is broken, is found only so."""
    verifier.complete()
    theirs = expected(ram)
    ram.pages[5, 0] = 1  # not by the applier
    verifier.read_all()
    assert [mismatch.chunk for mismatch in verifier.compare(theirs, pages=False)] == [0]


def test_digests_that_differ_in_one_bit_differ(verifier: Verifier, ram: GuestRam) -> None:
    verifier.read_all()
    theirs = np.frombuffer(expected(ram), "<u8") ^ np.array([0, 1, 0, 1 << 63], np.uint64)
    assert [mismatch.chunk for mismatch in verifier.compare(theirs.tobytes(), pages=False)] == [1, 3]


def test_chunks_that_have_settled_are_read_early_and_again_if_written_again(
    applier: Applier, ram: GuestRam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier_module, "DigestWorkers", Workers)
    for chunk in (0, 1, 2):
        ram.populate(chunk * CHUNK_PAGES, 1)
    verifier = Verifier(ram, applier, early=True)
    try:
        # A hole at once, and what waits to be written not yet.
        wait_until(lambda: Workers.read == [(3, 4)])
        for page in (0, CHUNK_PAGES):
            write(applier, page)
        wait_until(lambda: 0 in {first for first, _ in Workers.read})
        time.sleep(3 * verifier_module.SETTLE_SECONDS)
        assert sorted(chunk for item in Workers.read for chunk in range(*item)) == [0, 1, 3]
        write(applier, 3 * CHUNK_PAGES + 1)
        wait_until(lambda: Workers.read.count((3, 4)) == 2)
        read = len(Workers.read)
        verifier.complete()
        assert Workers.read[read:] == [(2, 3)]
        assert verifier.compare(expected(ram), pages=False) == []
    finally:
        verifier.close()
    assert not verifier._settler.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("theirs", "what"),
    [
        ((1, (2, 3), 4), None),
        ((9, (2, 3), 4), "config space"),
        ((1, (2, 9), 4), "BARs"),
        ((1, (2,), 4), "BARs"),
        ((1, (2, 3), 9), "state dump"),
        ((1, (2, 3), 0), None),  # no dump was taken there
        ((9, (9,), 9), "config space"),
    ],
)
def test_what_differs_first_between_two_readings_of_a_device(
    theirs: tuple[int, tuple[int, ...], int], what: str | None
) -> None:
    config, bars, dump = theirs
    digest = migration_pb2.DeviceDigest(name="nic0", config=config, bars=bars, dump=dump, compared=True)
    assert compare_device(Digest(1, (2, 3), 4, compared=True), digest) == what
    if what == "state dump":
        assert compare_device(Digest(1, (2, 3), 0, compared=True), digest) is None


@pytest.mark.parametrize(("we", "they"), [(False, False), (False, True), (True, False)])
def test_config_spaces_are_compared_where_there_is_nothing_else(we: bool, they: bool) -> None:
    ours = Digest(1, (2,) if we else (), 0, compared=we)
    for config, what in ((1, None), (9, "config space"), (0, None)):  # 0: it was not read there
        theirs = migration_pb2.DeviceDigest(name="nic0", config=config, bars=[2] if they else [], compared=they)
        assert compare_device(ours, theirs) == what
