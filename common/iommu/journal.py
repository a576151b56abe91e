"""Which mappings changed since somebody looked: a migration sends them while the guest goes on mapping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.iommu.iova_tree import Mapping

__all__ = ["MappingDelta", "MappingJournal"]


@dataclass(frozen=True, slots=True)
class MappingDelta:
    """Changes to apply in this order, what is gone and then what is there; a receiver then has the same mappings."""

    removed: tuple[Mapping, ...]
    added: tuple[Mapping, ...]


class MappingJournal:
    """The difference between what a receiver has and what is mapped. Locked by its owner.

    It keeps the difference, not the story: a mapping that came and went between two looks leaves no trace, so the
    journal never holds more than the receiver's mappings and ours.
    """

    def __init__(self, mapped: Iterable[Mapping]) -> None:
        """The receiver has nothing yet, `mapped` is there."""
        self._removed: dict[int, Mapping] = {}
        self._added = {mapping.iova: mapping for mapping in mapped}

    def added(self, mapping: Mapping) -> None:
        """Note a new mapping."""
        self._added[mapping.iova] = mapping

    def removed(self, mapping: Mapping) -> None:
        """Note that a mapping is gone."""
        if self._added.pop(mapping.iova, None) is None:
            self._removed[mapping.iova] = mapping

    def take(self) -> MappingDelta:
        """Return the changes since the last call."""
        delta = MappingDelta(tuple(self._removed.values()), tuple(self._added.values()))
        self._removed, self._added = {}, {}
        return delta
