from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.memory import bitmap
from common.memory.packed import PackedBitmap
from source.history import History

PAGES = 1000
SETS = st.lists(st.sets(st.integers(0, PAGES - 1), max_size=20), max_size=5)


def words(pages: set[int]) -> bitmap.Words:
    made = bitmap.empty(PAGES)
    for page in pages:
        bitmap.set_range(made, page, 1)
    return made


@given(SETS, SETS, st.integers(0, PAGES - 1))
def test_remembers_rounds_and_reports_of_every_page(sent: list[set[int]], reported: list[set[int]], asked: int) -> None:
    history = History()
    for number, pages in enumerate(sent, 1):
        history.sent(number, PackedBitmap.of(words(pages), PAGES))
    for number, pages in enumerate(reported):
        history.reported(number, f"container{number}", PackedBitmap.of(words(pages), PAGES))
    for page in {asked, *(page for pages in (*sent, *reported) for page in pages)}:
        # Round 0 sends everything.
        assert history.rounds_that_sent(page) == [0, *(n for n, pages in enumerate(sent, 1) if page in pages)]
        assert history.reports_of(page) == [
            f"after round {n}: container{n}" for n, pages in enumerate(reported) if page in pages
        ]


def test_what_is_told_later_does_not_change_what_was_told() -> None:
    """Bitmaps are copied: whoever passes one may use it again."""
    history = History()
    dirty = words({7})
    history.sent(1, PackedBitmap.of(dirty, PAGES))
    history.reported(0, "vCPU", PackedBitmap.of(dirty, PAGES))
    dirty[:] = 0
    assert history.rounds_that_sent(7) == [0, 1]
    assert history.reports_of(7) == ["after round 0: vCPU"]
