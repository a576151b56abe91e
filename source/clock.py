"""Two hosts' clocks: the difference between them, and how long the guest's own stood still."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from switchover.v1 import migration_pb2, migration_pb2_grpc

__all__ = ["ClockOffset", "guest_gap_ms", "measure"]

MIN_ROUND_TRIPS = 3
MEASURE_SECONDS = 0.004
GUEST_GAP_SECONDS = 1.0
WAIT_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The other monotonic clock minus ours, in nanoseconds, for they count from different moments.

    It is off by at most `error_ns`.
    """

    offset_ns: int
    error_ns: int


def measure(read_other_clock: Callable[[], int]) -> ClockOffset:
    """Read the other clock again and again and believe the quickest round trip, which leaves least room for error.

    It takes 4 ms, or three round trips if those take longer, for the guest writes meanwhile.
    """
    best: ClockOffset | None = None
    began, trips = time.monotonic_ns(), 0
    while trips < MIN_ROUND_TRIPS or time.monotonic_ns() - began < MEASURE_SECONDS * 1e9:
        trips += 1
        before = time.monotonic_ns()
        other = read_other_clock()
        after = time.monotonic_ns()
        sample = ClockOffset(other - (before + after) // 2, (after - before + 1) // 2)
        if best is None or sample.error_ns < best.error_ns:
            best = sample
    assert best is not None
    return best


def guest_gap_ms(stub: migration_pb2_grpc.MigrationServiceStub, session_id: str) -> float:
    """Ask what the guest's clock program has measured; -1 if that cannot be learned, which changes nothing else."""
    deadline = time.monotonic() + GUEST_GAP_SECONDS
    request = migration_pb2.GetSessionRequest(session_id=session_id)
    while time.monotonic() < deadline:
        try:
            session = stub.GetSession(request, timeout=GUEST_GAP_SECONDS)
        except grpc.RpcError:
            break
        if session.HasField("guest_gap_us"):
            return session.guest_gap_us / 1000
        time.sleep(WAIT_SECONDS)
    return -1.0
