"""Which protocol two daemons speak: the highest that both know, and of its optional features those that both have.

A change that an old peer would misunderstand is a feature, if the protocol does without it, or a new version. A source
says the lowest and the highest version that it speaks, and its features; the destination chooses. The first daemons
know neither highest version nor features: what they leave out is one version, and no features.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "FEATURES",
    "HIGHEST",
    "LAST_RECORD",
    "LOWEST",
    "MAX_RECONNECT_SECONDS",
    "PACKING",
    "PLAIN_16M",
    "RECONNECT",
    "choose",
    "shared",
]

LOWEST, HIGHEST = 1, 1
RECONNECT = "reconnect"
MAX_RECONNECT_SECONDS = 3600.0
PACKING = "packing"
PLAIN_16M = "plain-16m"
LAST_RECORD = "last-record"
FEATURES = frozenset({LAST_RECORD, PACKING, PLAIN_16M, RECONNECT})
"""What this daemon has beyond the version, by the names in docs/protocol.md."""


def choose(lowest: int, highest: int) -> int | None:
    """Return the version to speak with a peer that speaks these, None: there is none.

    `highest` 0: it speaks the lowest only.
    """
    version = min(HIGHEST, max(lowest, highest))
    return version if version >= max(LOWEST, lowest) else None


def shared(theirs: Iterable[str]) -> list[str]:
    """Return the features that a peer has too, in order."""
    return sorted(FEATURES.intersection(theirs))
