"""How long a throttled vCPU runs and sleeps: QEMU's auto-converge, as pure functions.

In each cycle the vCPU runs for `TIMESLICE_NS` and then sleeps for as long as makes up the percentage (QEMU:
cpu_throttle_thread, CPU_THROTTLE_TIMESLICE_NS).
"""

from __future__ import annotations

__all__ = ["TIMESLICE_NS", "awake_ns", "sleep_left_ns"]

TIMESLICE_NS = 10_000_000


def _cycle_ns(percent: int) -> int:
    if not 0 <= percent <= 99:
        raise ValueError(f"a vCPU can be throttled by 0 to 99 percent, not {percent}")
    return TIMESLICE_NS * 100 // (100 - percent)


def sleep_left_ns(elapsed_ns: int, percent: int) -> int:
    """Return how much longer to sleep, 0 to run, `elapsed_ns` after the throttle was set."""
    cycle = _cycle_ns(percent)
    phase = elapsed_ns % cycle
    return cycle - phase if phase >= TIMESLICE_NS and percent else 0


def awake_ns(elapsed_ns: int, percent: int) -> int:
    """Return how much of the first `elapsed_ns` after the throttle was set the vCPU did not sleep."""
    if not percent:
        return elapsed_ns
    cycles, phase = divmod(elapsed_ns, _cycle_ns(percent))
    return cycles * TIMESLICE_NS + min(phase, TIMESLICE_NS)
