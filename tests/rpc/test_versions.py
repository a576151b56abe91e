from __future__ import annotations

import pytest

from common.rpc import versions


@pytest.mark.parametrize(
    ("ours", "theirs", "spoken"),
    [
        ((1, 1), (1, 0), 1),  # a peer of before there were ranges
        ((1, 2), (1, 0), 1),
        ((2, 3), (1, 0), None),
        ((1, 1), (1, 1), 1),
        ((1, 1), (1, 2), 1),
        ((1, 2), (1, 1), 1),
        ((1, 3), (2, 5), 3),
        ((2, 5), (1, 3), 3),
        ((1, 1), (2, 3), None),
        ((2, 3), (1, 1), None),
        ((1, 1), (0, 0), None),
        ((1, 1), (2, 1), None),  # no range at all
    ],
)
def test_the_highest_that_both_speak(
    monkeypatch: pytest.MonkeyPatch, ours: tuple[int, int], theirs: tuple[int, int], spoken: int | None
) -> None:
    monkeypatch.setattr(versions, "LOWEST", ours[0])
    monkeypatch.setattr(versions, "HIGHEST", ours[1])
    assert versions.choose(*theirs) == spoken


def test_features_that_both_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "FEATURES", frozenset({"b", "c", "a"}))
    assert versions.shared(["c", "x", "a", "a"]) == ["a", "c"]
    assert versions.shared([]) == []
