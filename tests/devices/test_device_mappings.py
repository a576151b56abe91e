from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from device_rig import Memory

from common.devices import mappings as module
from common.devices.mappings import Mappings

PAGE = 4096


@pytest.fixture
def mappings() -> Mappings:
    return Mappings()


def add(mappings: Mappings, iova: int, size: int, fd: int | None = None, offset: int = 0, **rights: bool) -> None:
    mappings.add(iova, size, **({"readable": True, "writable": True} | rights), fd=fd, offset=offset)


def refusal(mappings: Mappings, *arguments: int, **rights: bool) -> int | None:
    with pytest.raises(OSError) as refused:
        add(mappings, *arguments, **rights)
    return refused.value.errno


def test_finds_the_mapping_of_an_address(mappings: Mappings) -> None:
    for iova in (8 * PAGE, 2 * PAGE, 4 * PAGE):
        add(mappings, iova, 2 * PAGE)
    found = [mappings.find(page * PAGE + 5) for page in range(11)]
    starts = [mapping and mapping.iova // PAGE for mapping in found]
    assert starts == [None, None, 2, 2, 4, 4, None, None, 8, 8, None]
    assert [mappings.next_start(page * PAGE) // PAGE for page in (0, 2, 7, 8)] == [2, 4, 8, 1 << 52]


@pytest.mark.parametrize(
    ("iova", "size", "code"),
    [
        (0, 0, errno.EINVAL),
        (1, PAGE, errno.EINVAL),
        (0, PAGE + 1, errno.EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, errno.EOVERFLOW),
        (4 * PAGE, PAGE, errno.EEXIST),
        (3 * PAGE, 2 * PAGE, errno.EEXIST),
        (5 * PAGE, 2 * PAGE, errno.EEXIST),
        (0, 10 * PAGE, errno.EEXIST),
        (4 * PAGE, 2 * PAGE, errno.EEXIST),
    ],
)
def test_refuses_what_does_not_fit(mappings: Mappings, iova: int, size: int, code: int) -> None:
    add(mappings, 4 * PAGE, 2 * PAGE)
    assert refusal(mappings, iova, size) == code
    assert len(mappings) == 1
    add(mappings, 3 * PAGE, PAGE)
    add(mappings, 6 * PAGE, PAGE)


def test_the_top_of_the_address_space_can_be_mapped(mappings: Mappings) -> None:
    add(mappings, (1 << 64) - PAGE, PAGE)
    assert mappings.find((1 << 64) - 1) is not None
    mappings.remove((1 << 64) - PAGE, PAGE)


def test_takes_away_exactly_what_was_mapped(mappings: Mappings) -> None:
    add(mappings, 4 * PAGE, 2 * PAGE)
    for iova, size in ((4, 1), (5, 1), (3, 2), (4, 3), (0, 0)):
        with pytest.raises(OSError) as missing:
            mappings.remove(iova * PAGE, size * PAGE)
        assert missing.value.errno == errno.ENOENT
    mappings.remove(4 * PAGE, 2 * PAGE)
    assert len(mappings) == 0


def test_a_file_is_mapped_once_and_let_go_with_its_last_mapping(mappings: Mappings, ram: Memory) -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:ram" in line for line in maps)

    before = mapped()
    for page in range(10):
        add(mappings, page * 2 * PAGE, PAGE, ram.fd, page * PAGE)
    assert mapped() == before + 1
    mappings.remove(0, PAGE)
    assert mapped() == before + 1
    mappings.clear()
    assert mapped() == before


def test_sees_the_files_bytes(mappings: Mappings, ram: Memory) -> None:
    add(mappings, PAGE, PAGE, ram.fd, 3 * PAGE)
    mapping = mappings.find(PAGE)
    assert mapping is not None and mapping.view is not None
    mapping.view[:4] = b"here"
    assert ram.mmap[3 * PAGE : 3 * PAGE + 4] == b"here"
    del mapping


def test_refuses_files_that_would_harm_it(mappings: Mappings, ram: Memory) -> None:
    assert refusal(mappings, 0, PAGE, ram.fd, ram.size) == errno.EINVAL
    assert refusal(mappings, 0, 2 * PAGE, ram.fd, ram.size - PAGE) == errno.EINVAL
    assert refusal(mappings, 0, PAGE, ram.fd, 5) == errno.EINVAL
    assert refusal(mappings, 0, PAGE, readable=False, writable=False) == errno.EINVAL
    reading, writing = os.pipe()
    assert refusal(mappings, 0, PAGE, reading, writable=False) == errno.EINVAL
    os.close(reading)
    os.close(writing)
    read_only = os.open(f"/proc/self/fd/{ram.fd}", os.O_RDONLY)
    assert refusal(mappings, 0, PAGE, read_only) == errno.EACCES
    add(mappings, 0, PAGE, read_only, writable=False)
    os.close(read_only)
    mapping = mappings.find(0)
    assert mapping is not None and mapping.view is not None and mapping.view.readonly
    del mapping


def test_a_file_that_can_shrink_is_read_and_written(mappings: Mappings, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(4 * PAGE))
    before = len(os.listdir("/proc/self/fd"))
    with path.open("r+b") as file:
        for page in range(3):
            add(mappings, page * PAGE, PAGE, file.fileno(), (page + 1) * PAGE)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    mapping = mappings.find(PAGE)
    assert mapping is not None and mapping.view is None and mapping.local
    mapping.write(PAGE + 8, b"here")
    assert path.read_bytes()[2 * PAGE + 8 : 2 * PAGE + 12] == b"here"
    assert mapping.read(PAGE + 8, 4) == b"here"
    os.truncate(path, 2 * PAGE + 10)
    with pytest.raises(OSError):
        mapping.read(PAGE + 8, 4)
    mappings.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_number_of_mappings_is_limited(mappings: Mappings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MAPPINGS", 3)
    for page in range(3):
        add(mappings, page * PAGE, PAGE)
    assert refusal(mappings, 3 * PAGE, PAGE) == errno.ENOSPC
