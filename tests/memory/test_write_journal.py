from __future__ import annotations

import numpy as np
import pytest

from common.memory import write_journal
from common.memory.write_journal import WriteJournal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time, in ns."""
    time = [100]
    monkeypatch.setattr(write_journal.time, "monotonic_ns", lambda: time[0])
    return time


def test_rows_of_a_range_oldest_first(clock: list[int]) -> None:
    journal = WriteJournal(16)
    journal.note(7, 1)
    clock[0] = 200
    journal.note(6, 3)
    clock[0] = 300
    journal.note_pages(np.array([9, 7]))
    assert journal.of(7, 1, 10).tolist() == [(7, 100), (7, 200), (7, 300)]
    assert journal.of(6, 2, 10).tolist() == [(7, 100), (6, 200), (7, 200), (7, 300)]
    assert journal.of(7, 1, 2).tolist() == [(7, 200), (7, 300)]
    assert journal.of(10, 100, 10).tolist() == []


def test_the_oldest_rows_are_forgotten(clock: list[int]) -> None:
    journal = WriteJournal(4)
    for clock[0] in range(6):
        journal.note(clock[0] % 2, 1)
    assert journal.of(0, 2, 10).tolist() == [(0, 2), (1, 3), (0, 4), (1, 5)]
    journal.note(20, 3)
    assert journal.of(0, 30, 10).tolist() == [(1, 5), (20, 5), (21, 5), (22, 5)]
