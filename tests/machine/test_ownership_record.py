from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.machine import record
from common.machine.record import Ownership, Record

OLD = Record("uuid", "vm", 3, Ownership.OWNER, "/run/a")
NEW = Record("uuid", "vm", 3, Ownership.COMMITTING, "/run/a", "5e55", "b:1")


def test_the_record_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    (tmp_path / "record.json.new").touch(mode=0o666)  # what a failure has left
    for written in (OLD, NEW):
        record.write(path, written)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


class PowerFailureError(Exception):
    """Everything stops here."""


@given(
    st.builds(
        Record,
        machine_uuid=st.text(max_size=40),
        name=st.text(max_size=40),
        incarnation=st.integers(0, 1 << 64),
        ownership=st.sampled_from(Ownership),
        directory=st.text(max_size=40),
        session_id=st.text(max_size=40),
        peer=st.text(max_size=40),
        judged=st.booleans(),
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, written: Record) -> None:
    path = tmp_path_factory.getbasetemp() / "record.json"
    record.write(path, written)
    found = record.read(path)
    assert found == written and isinstance(found.ownership, Ownership)


def test_no_record_is_none(tmp_path: Path) -> None:
    assert record.read(tmp_path / "record.json") is None


class Power:
    """Fails before the n-th step that reaches the disk; `kept`: while a record is written over, after so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int = 100, kept: int | None = None) -> None:
        self.order: list[str] = []
        self._fails_at = fails_at
        pwritev = os.pwritev

        def write_over(fd: int, parts: list[bytes], at: int, flags: int) -> int:
            self.step("write through" if flags == os.RWF_DSYNC else "write")
            if kept is None:
                return pwritev(fd, parts, at, flags)
            pwritev(fd, [b"".join(parts)[:kept]], at)
            raise PowerFailureError

        monkeypatch.setattr(os, "pwritev", write_over)
        for module, name in ((os, "fsync"), (Path, "rename")):
            monkeypatch.setattr(module, name, self._failing(name, getattr(module, name)))

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            is_directory = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            self.step(f"{name} of the directory" if is_directory else name)
            return real(*args)

        return call

    def step(self, name: str) -> None:
        if len(self.order) == self._fails_at:
            raise PowerFailureError
        self.order.append(name)


def test_is_on_disk_before_it_has_its_name_and_the_name_before_anyone_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    power = Power(monkeypatch)
    record.write(tmp_path / "record.json", NEW)
    assert power.order == ["fsync", "rename", "fsync of the directory"]


def test_a_later_one_takes_one_flush_and_no_new_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    record.write(path, OLD)
    before = path.stat()
    power = Power(monkeypatch)
    for written in (NEW, OLD, NEW):
        power.order.clear()
        record.write(path, written)
        assert record.read(path) == written and power.order == ["write through"]
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("before", [None, OLD], ids=["none", "an older version's"])
def test_a_failure_of_the_first_one_leaves_what_was_there_or_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, before: Record | None
) -> None:
    path = tmp_path / "record.json"
    if before is not None:
        path.write_text(json.dumps(asdict(before)))
    with monkeypatch.context() as patch:
        Power(patch, step)
        with pytest.raises(PowerFailureError):
            record.write(path, NEW)
    assert record.read(path) == (before if step < 2 else NEW)
    record.write(path, OLD)  # what was left behind is in nobody's way
    assert record.read(path) == OLD


@pytest.mark.parametrize("written", [1, 2, 3])
@pytest.mark.parametrize("kept", [0, 1, 8, 9, 10, 50, 150])
def test_what_is_torn_is_never_read_and_what_counted_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, kept: int
) -> None:
    path = tmp_path / "record.json"
    for number in range(written):
        record.write(path, replace(OLD, incarnation=number))
    counts = replace(OLD, incarnation=written - 1)
    with monkeypatch.context() as patch:
        Power(patch, kept=kept)
        with pytest.raises(PowerFailureError):
            record.write(path, NEW)
    assert record.read(path) == counts
    record.write(path, NEW)
    assert record.read(path) == NEW


@given(st.lists(st.booleans(), min_size=16, max_size=16))
def test_whichever_sectors_have_got_to_the_disk(
    tmp_path_factory: pytest.TempPathFactory, got_there: list[bool]
) -> None:
    path = tmp_path_factory.mktemp("t") / "record.json"
    long, other, longer = replace(OLD, peer="a" * 2500), replace(OLD, peer="c" * 2800), replace(NEW, peer="b" * 3000)
    for earlier in (long, other, long):
        record.write(path, earlier)
    on_disk = path.read_bytes()
    record.write(path, longer)
    written = path.read_bytes()
    sectors = range(0, len(on_disk), 512)
    assert len(sectors) == len(got_there)
    path.write_bytes(
        b"".join((written if got else on_disk)[at : at + 512] for at, got in zip(sectors, got_there, strict=True))
    )
    assert record.read(path) == (longer if all(got_there[8:15]) else long)


@pytest.mark.parametrize("kept", [0, 50, None])
def test_what_the_disk_does_not_take_counts_for_nobody_and_the_next_one_goes_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int | None
) -> None:
    """Else the next one would be written over the only one that is on the disk."""
    path = tmp_path / "record.json"
    record.write(path, NEW)
    record.write(path, OLD)
    before = path.read_bytes()
    pwritev = os.pwritev

    def failing(fd: int, parts: list[bytes], at: int, _flags: int) -> int:
        pwritev(fd, [b"".join(parts)[:kept]], at)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing)
        with pytest.raises(OSError, match="Input/output error"):
            record.write(path, NEW)
    assert path.read_bytes() == before and record.read(path) == OLD


@pytest.mark.parametrize("text", ["nonsense", "{}", json.dumps(asdict(OLD) | {"colour": "red"})])
def test_what_is_whole_and_no_record_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(record.slot(1, text))
    with pytest.raises(ValueError, match="not an ownership record"):
        record.read(path)


def test_a_shorter_record_is_not_read_with_the_end_of_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for written in (OLD, replace(NEW, peer="b" * 3000), OLD, NEW):
        record.write(path, written)
        assert record.read(path) == written


def test_a_record_for_which_there_is_no_room_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write(path, OLD)
    with pytest.raises(OSError, match="a record of 5"):
        record.write(path, replace(OLD, peer="b" * 5_000))
    assert record.read(path) == OLD


def text(**changes: Any) -> bytes:
    members = {"machine_uuid": "u", "name": "vm", "incarnation": 1, "ownership": "OWNER", "directory": "/d"} | changes
    return json.dumps({key: value for key, value in members.items() if value is not None}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe\x00",
        b"\x00" * 200,
        text(ownership="SOMEBODY"),
        text(ownership=None),
        text(ownership=["OWNER"]),
        text(name=None),
        text(colour="red"),
        text()[:-10],
    ],
)
def test_garbage_is_an_error_and_not_no_machine(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(data)
    with pytest.raises(ValueError):
        record.read(path)


def test_what_an_older_version_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text())
    assert record.read(path) == Record("u", "vm", 1, Ownership.OWNER, "/d", "", "")
    record.write(path, NEW)
    assert record.read(path) == NEW
