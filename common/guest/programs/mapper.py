"""mapper: keeps thousands of small DMA mappings alive and gives them other pages all the time, as a busy driver does.

The IOVAs stay, the pages behind them change: mapping n leads to one of its pages, and after each change to the next.
A mapping that got lost in a move is found when it is its turn, for then it cannot be unmapped.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from common.guest.device import GuestDevice
from common.guest.programs.program import NEVER, Area, Moment, Program, in_ram
from common.memory.layout import PAGE_SIZE

__all__ = ["Mapper", "MapperKnobs"]

CHANGES_PER_STEP = 8
TARGETS = 64  # pages that the mappings lead to, in turn
NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class MapperKnobs:
    """`mappings` of a page each, in the address space of `device`; `changes` of them in a second."""

    device: str
    mappings: int = 1000
    changes: int = 200

    def __post_init__(self) -> None:
        if not 1 <= self.mappings <= 16_384:
            raise ValueError(f"mappings must be 1 to 16384, not {self.mappings}")
        if not 0 <= self.changes <= 10_000:
            raise ValueError(f"changes must be 0 to 10000, not {self.changes}")


@in_ram
class MapperState(ctypes.LittleEndianStructure):
    """Changes are counted from the first one ever."""

    mapped: int
    changes: int


class Mapper(Program[MapperState]):
    """Maps as fast as a step allows until all mappings are there, then changes one after the other."""

    COUNTERS = ("mapped", "changes")

    def __init__(self, name: str, area: Area, knobs: MapperKnobs, device: GuestDevice, iova_top: int) -> None:
        super().__init__(name, area, MapperState)
        if not device.viommu:
            raise ValueError("there is no vIOMMU to map in")
        self._knobs = knobs
        self._device = device
        self._base = iova_top - knobs.mappings * PAGE_SIZE
        self._targets = area.take(TARGETS * PAGE_SIZE)

    def step(self, moment: Moment) -> int:
        """Map or change a few."""
        state = self.state
        if state.mapped < self._knobs.mappings:
            for number in range(state.mapped, min(state.mapped + CHANGES_PER_STEP, self._knobs.mappings)):
                self._map(number, number)
                state.mapped = number + 1
            return moment.now_ns
        if not self._knobs.changes:
            return NEVER
        for _ in range(CHANGES_PER_STEP):
            lap, number = divmod(state.changes, self._knobs.mappings)
            self._device.unmap(self._base + number * PAGE_SIZE, PAGE_SIZE)
            self._map(number, number + lap + 1)
            state.changes += 1
        return moment.now_ns + CHANGES_PER_STEP * NS // self._knobs.changes

    def _map(self, number: int, target: int) -> None:
        gpa = self._targets + target % TARGETS * PAGE_SIZE
        self._device.map(self._base + number * PAGE_SIZE, gpa, PAGE_SIZE)
