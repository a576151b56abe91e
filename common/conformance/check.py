"""What a check is, and what comes of one.

A check is a function of a `Lab`. It returns a sentence of information or None if it passes, raises `Failure` where the
device does what it must not, and `Unknown` where that cannot be told: the feature is absent, the device cannot be made
to do what is needed, or what it does is left open by the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a lab runs checks
    from common.conformance.lab import Lab

__all__ = ["Body", "Check", "Failure", "Outcome", "Result", "Unknown", "check", "registered"]

Body = Callable[["Lab"], str | None]


class Outcome(StrEnum):
    """What comes of a check."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Failure(Exception):  # noqa: N818 - the device's, not the program's
    """The device does not do what the specification says; the text says what it does."""


class Unknown(Exception):  # noqa: N818 - likewise
    """Whether the device does what the specification says cannot be told; the text says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check: `sentence` is what the specification says, `body` finds out whether the device does it."""

    subject: str
    name: str
    sentence: str
    body: Body

    @property
    def full_name(self) -> str:
        """The name by which reports call it."""
        return f"{self.subject}.{self.name}"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a check: `sent` and `received` are the last messages before it was decided."""

    check: Check
    outcome: Outcome
    detail: str
    sent: str
    received: str
    seconds: float


_registry: list[Check] = []


def check(sentence: str, name: str | None = None) -> Callable[[Body], Body]:
    """Register a check; it is called after its function unless it has a `name`, and its subject is its module."""

    def register(body: Body) -> Body:
        function = getattr(body, "func", body)
        subject = function.__module__.rpartition(".")[2].replace("_", "-")
        _registry.append(Check(subject, name or function.__name__.replace("_", "-"), sentence, body))
        return body

    return register


def registered() -> tuple[Check, ...]:
    """Return the checks of the modules imported so far, in their order."""
    return tuple(_registry)
