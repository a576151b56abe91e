"""When to iterate, when to switch over, when to slow the guest down, when to give up: a pure function of the history.

QEMU's rule decides the switchover: what is still to send must fit into bandwidth × the accepted downtime, and every
device that loads its state ahead must have said that it has done so (switchover-ack). QEMU itself goes on for ever if
that never comes true; here limits end it, and the reason says what would have made it converge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = ["Action", "Decision", "Limits", "RoundFacts", "decide"]

# Auto-converge as QEMU does it: the guest has dirtied more than half of what was sent, twice in a row.
THROTTLE_TRIGGER = 0.5
THROTTLE_ROUNDS = 2
THROTTLE_INITIAL = 20
THROTTLE_INCREMENT = 10
THROTTLE_MAX = 99
# After so many rounds that have all left more than this share of what the first of them left, it is said.
STUCK_ROUNDS, STUCK_SHARE = 8, 0.8


class Action(Enum):
    """What comes next."""

    ITERATE = "iterate"
    THROTTLE = "throttle"
    SWITCH_OVER = "switch over"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator accepts. None: no limit."""

    max_downtime_s: float = 0.3
    timeout_s: float | None = None
    max_rounds: int | None = None
    switch_over_at_limit: bool = False
    auto_converge: bool = False


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """A round of pre-copy that is over, and what was found dirty after it. Bytes are of pages before compression."""

    number: int
    elapsed_s: float  # since the migration began
    sent_bytes: int  # by this round
    dirty_bytes: int  # RAM found dirty after it
    dirty_rate: float  # bytes of distinct pages per second while it ran
    device_bytes: int  # what the devices would have to send if they stopped now
    bandwidth: float  # bytes per second; 0: nothing was measured yet
    initial_data_loaded: bool  # by every device that has pre-copy
    throttle_percent: int

    @property
    def pending_bytes(self) -> int:
        """All that a switchover would have to send."""
        return self.dirty_bytes + self.device_bytes

    @property
    def expected_downtime_s(self) -> float:
        """How long that would take; infinite while no bandwidth is known."""
        if self.pending_bytes == 0:
            return 0.0
        return self.pending_bytes / self.bandwidth if self.bandwidth > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Decision:
    """What comes next, and why, in words for the operator."""

    action: Action
    reason: str
    throttle_percent: int
    hopeless: bool = False  # as it goes now, it would iterate for ever


def decide(history: Sequence[RoundFacts], limits: Limits) -> Decision:
    """Decide after the last round of `history`, which is not empty."""
    last = history[-1]
    throttle = last.throttle_percent
    fits = last.expected_downtime_s <= limits.max_downtime_s
    if fits and last.initial_data_loaded:
        reason = f"{_ms(last.expected_downtime_s)} of the {_ms(limits.max_downtime_s)} accepted are enough for the rest"
        return Decision(Action.SWITCH_OVER, reason, throttle)
    reached = _limit_reached(last, limits)
    if reached is not None:
        if limits.switch_over_at_limit:
            return Decision(Action.SWITCH_OVER, f"{reached}: switching over as told", throttle)
        return Decision(Action.GIVE_UP, f"{reached}: {_what_would_help(history, limits)}", throttle)
    if fits:
        return Decision(Action.ITERATE, "devices at the destination have not loaded their initial data yet", throttle)
    if limits.auto_converge and throttle < THROTTLE_MAX and _falls_behind(history):
        throttle = min(throttle + THROTTLE_INCREMENT if throttle else THROTTLE_INITIAL, THROTTLE_MAX)
        reason = f"the guest dirties more than half of what is sent: vCPUs slowed down by {throttle} %"
        return Decision(Action.THROTTLE, reason, throttle)
    reason = f"the rest would take {_ms(last.expected_downtime_s)}, accepted are {_ms(limits.max_downtime_s)}"
    hopeless = _gets_no_better(history)
    if hopeless:
        ways = [
            f"--max-downtime {_ms_up(last.expected_downtime_s)}",
            *([] if limits.auto_converge else ["--auto-converge"]),
        ]
        reason += f", and it gets no better: {' or '.join(ways)} would help"
    return Decision(Action.ITERATE, reason, throttle, hopeless)


def _limit_reached(last: RoundFacts, limits: Limits) -> str | None:
    if limits.timeout_s is not None and last.elapsed_s >= limits.timeout_s:
        return f"not converged in {limits.timeout_s:g} s"
    if limits.max_rounds is not None and last.number + 1 >= limits.max_rounds:
        return f"not converged in {limits.max_rounds} rounds"
    return None


def _falls_behind(history: Sequence[RoundFacts]) -> bool:
    """Whether each of the last rounds at this throttle left more dirty than half of what it sent.

    QEMU: migration_trigger_throttle, which counts again from 0 after each step.
    """
    recent = history[-THROTTLE_ROUNDS:]
    return len(recent) == THROTTLE_ROUNDS and all(
        facts.dirty_bytes > THROTTLE_TRIGGER * facts.sent_bytes
        and facts.throttle_percent == recent[-1].throttle_percent
        for facts in recent
    )


def _gets_no_better(history: Sequence[RoundFacts]) -> bool:
    """Whether the last rounds have brought the switchover no nearer."""
    recent = [facts.expected_downtime_s for facts in history[-STUCK_ROUNDS:]]
    return len(recent) == STUCK_ROUNDS and min(recent[1:]) > STUCK_SHARE * recent[0]


def _what_would_help(history: Sequence[RoundFacts], limits: Limits) -> str:
    last = history[-1]
    if not last.initial_data_loaded and last.expected_downtime_s <= limits.max_downtime_s:
        return "a device at the destination has not loaded its initial data; a higher limit would help"
    ways = [f"--max-downtime {_ms_up(last.expected_downtime_s)}"]
    if last.device_bytes > last.bandwidth * limits.max_downtime_s:
        return (
            f"what the devices have to send in the switchover alone takes {_ms(last.device_bytes / last.bandwidth)} "
            f"at {_rate(last.bandwidth)}; it would converge with {ways[0]} or a faster link"
            if last.bandwidth > 0
            else f"nothing could be sent; it would converge with {ways[0]} or a faster link"
        )
    needed = last.pending_bytes / limits.max_downtime_s if limits.max_downtime_s > 0 else float("inf")
    if last.dirty_rate < last.bandwidth and needed < float("inf") and not _gets_no_better(history):
        ways.append("more time")
    elif last.device_bytes < needed * limits.max_downtime_s:
        ways.append(f"a link of more than {_rate(max(needed, last.dirty_rate))}")
    if not limits.auto_converge:
        ways.append("--auto-converge (it slows vCPUs, not DMA)")
    elif last.throttle_percent:
        ways.append(f"less DMA (vCPUs are slowed by {last.throttle_percent} % already)")
    return (
        f"the guest dirties {_rate(last.dirty_rate)}, {_rate(last.bandwidth)} are sent, "
        f"and the rest would take {_ms(last.expected_downtime_s)}; it would converge with " + " or ".join(ways)
    )


def _ms(seconds: float) -> str:
    return "an unknown time" if seconds == float("inf") else f"{seconds * 1000:.0f} ms"


def _ms_up(seconds: float) -> str:
    return "…" if seconds == float("inf") else f"{int(seconds * 1000 * 1.25) + 1}ms"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:.1f} MB/s"
