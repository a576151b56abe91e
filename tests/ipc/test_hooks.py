from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import hooks


def test_without_a_directory_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hooks, "_DIRECTORY", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "point").touch()
    hooks.reach("point")
    assert [path.name for path in tmp_path.iterdir()] == ["point"]


def test_a_point_that_nobody_holds_is_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hooks, "_DIRECTORY", tmp_path)
    (tmp_path / "another").touch()
    hooks.reach("point")
    assert not (tmp_path / "point.reached").exists()


def test_says_that_it_is_there_and_waits_until_it_is_let_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waited: list[float] = []
    held = threading.Event()

    def sleep(seconds: float) -> None:
        assert (tmp_path / "point.reached").exists()
        waited.append(seconds)
        if len(waited) == 3:
            (tmp_path / "point").unlink()
            held.set()

    monkeypatch.setattr(hooks, "_DIRECTORY", tmp_path)
    monkeypatch.setattr(hooks, "time", SimpleNamespace(sleep=sleep))
    (tmp_path / "point").touch()
    hooks.reach("point")
    assert held.is_set() and len(waited) == 3


def test_a_guard_is_in_place_unless_it_was_taken_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hooks, "_DIRECTORY", tmp_path)
    assert hooks.guarded("it")
    (tmp_path / "it.off").touch()
    assert not hooks.guarded("it") and hooks.guarded("another")
    monkeypatch.setattr(hooks, "_DIRECTORY", None)
    assert hooks.guarded("it")
