"""idle: a guest that has nothing to do but wakes up now and then, as idle guests do."""

from __future__ import annotations

from common.guest.programs.program import Area, Moment, NoState, Program

__all__ = ["Idle"]

PERIOD_NS = 250_000_000


class Idle(Program[NoState]):
    """Counts its steps: one page dirty, four times a second."""

    def __init__(self, name: str, area: Area) -> None:
        super().__init__(name, area, NoState)

    def step(self, moment: Moment) -> int:
        """Wait."""
        return moment.now_ns + PERIOD_NS
