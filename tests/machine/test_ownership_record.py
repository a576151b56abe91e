from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Self

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
        machine_uuid=st.text(),
        name=st.text(),
        incarnation=st.integers(0, 1 << 64),
        ownership=st.sampled_from(Ownership),
        directory=st.text(),
        session_id=st.text(),
        peer=st.text(),
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
    """Fails before the n-th step that reaches the disk, and leaves `kept` bytes of what was being written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int = 100, kept: int | None = None) -> None:
        self.order: list[str] = []
        self._fails_at = fails_at
        real_open = Path.open

        def open_file(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = real_open(path, mode, *args, **options)
            if mode != "r+b":
                return file
            return Disk(file, self, kept)

        monkeypatch.setattr(Path, "open", open_file)
        for module, name in ((os, "fsync"), (os, "fdatasync"), (Path, "rename")):
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


class Disk:
    """A file that is written over, of which only the first bytes may get to the disk."""

    def __init__(self, file: IO[bytes], power: Power, kept: int | None) -> None:
        self._file, self._power, self._kept = file, power, kept

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._power.step("write")
        self._file.write(data[: self._kept])
        if self._kept is not None:
            raise PowerFailureError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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
        assert record.read(path) == written and power.order == ["write", "fdatasync"]
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)


@pytest.mark.parametrize("step", range(3))
def test_a_failure_of_the_first_one_leaves_none_or_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    path = tmp_path / "record.json"
    with monkeypatch.context() as patch:
        Power(patch, step)
        with pytest.raises(PowerFailureError):
            record.write(path, NEW)
    assert record.read(path) == (None if step < 2 else NEW)
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


def test_what_was_written_and_not_flushed_is_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    record.write(path, OLD)
    on_disk = path.read_bytes()
    with monkeypatch.context() as patch:
        Power(patch, fails_at=1)
        with pytest.raises(PowerFailureError):
            record.write(path, NEW)
    assert record.read(path) == NEW
    written = path.read_bytes()
    # Whichever of its sectors have got there.
    for at in range(0, len(on_disk), 512):
        path.write_bytes(written[:at] + on_disk[at:])
        assert record.read(path) in (OLD, NEW)
        path.write_bytes(on_disk[:at] + written[at:])
        assert record.read(path) in (OLD, NEW)


def test_a_shorter_record_is_not_read_with_the_end_of_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for written in (OLD, replace(NEW, peer="b" * 9000), OLD, NEW):
        record.write(path, written)
        assert record.read(path) == written


def test_a_record_for_which_there_is_no_room_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write(path, OLD)
    with pytest.raises(OSError, match="a record of 2"):
        record.write(path, replace(OLD, peer="b" * 20_000))
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
