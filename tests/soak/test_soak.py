"""The soak itself: its plan is a function of the seed, and a few steps of one."""

from __future__ import annotations

from soaking import soak
from steps import FAULTS, POINTS, Step, machine, step

SEED = 1


def test_a_seed_is_a_plan() -> None:
    plan = [step(SEED, number) for number in range(50)]
    assert plan == [step(SEED, number) for number in range(50)] != [step(SEED + 1, number) for number in range(50)]
    assert machine(SEED, 0) == machine(SEED, 0)
    assert len({machine(SEED, number) for number in range(8)}) > 1


def test_every_fault_strikes_at_points_and_between_them() -> None:
    plan = [step(SEED, number) for number in range(1000)]
    assert {taken.fault for taken in plan} == set(FAULTS)
    assert {taken.point for taken in plan} == {*POINTS, ""}


def first(fault: str, point: str) -> int:
    """Return the number of the first step in which this fault strikes there, and which takes little time."""

    def fits(taken: Step) -> bool:
        quick = taken.lasts <= 0.5 and taken.verify == "strict" and not taken.bandwidth_limit
        return quick and (taken.fault, taken.point) == (fault, point)

    return next(number for number in range(100_000) if fits(step(SEED, number)))


def test_a_few_steps() -> None:
    said: list[str] = []
    steps = [first("network cut", "source.paused"), first("destination daemon killed", "destination.committed")]
    figures = soak(SEED, steps, seconds=60, say=said.append)
    assert figures.steps == len(steps), said
    document = figures.document(1.0)
    assert document["machines"] == 1 and sum(document["migrations"].values()) == len(steps)
