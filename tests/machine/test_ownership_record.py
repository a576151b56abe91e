from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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


class Torn:
    """A file of which only the first characters reach the disk."""

    def __init__(self, file: IO[str], kept: int) -> None:
        self._file, self._kept = file, kept

    def write(self, text: str) -> None:
        self._file.write(text[: self._kept])
        self._kept -= len(text)
        if self._kept < 0:
            self._file.flush()
            raise PowerFailureError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Power:
    """Fails before the n-th step that reaches the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
        self.order: list[str] = []
        fsync, rename = os.fsync, Path.rename

        def step(name: str) -> None:
            if len(self.order) == fails_at:
                raise PowerFailureError
            self.order.append(name)

        def failing_fsync(fd: int) -> None:
            step("fsync " + ("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"))
            fsync(fd)

        def failing_rename(path: Path, target: Path) -> Path:
            step("rename")
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", failing_fsync)
        monkeypatch.setattr(Path, "rename", failing_rename)


def test_is_on_disk_before_it_has_its_name_and_the_name_before_anyone_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    power = Power(monkeypatch, fails_at=100)
    record.write(tmp_path / "record.json", NEW)
    assert power.order == ["fsync file", "rename", "fsync directory"]


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("before", [None, OLD])
def test_a_failure_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, before: Record | None
) -> None:
    path = tmp_path / "record.json"
    if before is not None:
        record.write(path, before)
    with monkeypatch.context() as patch:
        Power(patch, step)
        with pytest.raises(PowerFailureError):
            record.write(path, NEW)
    assert record.read(path) == (before if step < 2 else NEW)
    record.write(path, NEW)  # what was left behind is in nobody's way
    assert record.read(path) == NEW


@pytest.mark.parametrize("kept", [0, 1, 10, 50])
def test_a_torn_write_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    path = tmp_path / "record.json"
    record.write(path, OLD)
    real = Path.open

    @contextmanager
    def torn(path: Path, *args: Any, **options: Any) -> Iterator[Torn]:
        with real(path, *args, **options) as file:
            yield Torn(file, kept)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", torn)
        with pytest.raises(PowerFailureError):
            record.write(path, NEW)
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
