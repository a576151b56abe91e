from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.machine.quantities import parse_duration
from source.policy import STUCK_ROUNDS, Action, Decision, Limits, RoundFacts, decide

MB = 1_000_000


def facts(**changes: object) -> RoundFacts:
    """A round of a guest that dirties a little: 100 MB/s are sent, 10 MB are left."""
    base = RoundFacts(
        number=0,
        elapsed_s=1.0,
        sent_bytes=100 * MB,
        dirty_bytes=10 * MB,
        dirty_rate=10.0 * MB,
        device_bytes=0,
        bandwidth=100.0 * MB,
        initial_data_loaded=True,
        throttle_percent=0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]  # members by name


SIZES = st.integers(0, 1 << 40)
ROUNDS = st.builds(
    RoundFacts,
    number=st.integers(0, 1000),
    elapsed_s=st.floats(0, 1e6),
    sent_bytes=SIZES,
    dirty_bytes=SIZES,
    dirty_rate=st.floats(0, 1e12),
    device_bytes=SIZES,
    bandwidth=st.one_of(st.just(0.0), st.floats(1, 1e12)),
    initial_data_loaded=st.booleans(),
    throttle_percent=st.sampled_from([0, 20, 30, 90, 99]),
)
LIMITS = st.builds(
    Limits,
    max_downtime_s=st.floats(0, 100),
    timeout_s=st.one_of(st.none(), st.floats(0, 1e6)),
    max_rounds=st.one_of(st.none(), st.integers(1, 1000)),
    switch_over_at_limit=st.booleans(),
    auto_converge=st.booleans(),
)
HISTORIES = st.lists(ROUNDS, min_size=1, max_size=4)


def test_switches_over_when_the_rest_fits() -> None:
    """Equal is enough: 30 MB at 100 MB/s are exactly the 300 ms that are accepted."""
    decision = decide([facts(dirty_bytes=20 * MB, device_bytes=10 * MB)], Limits(max_downtime_s=0.3))
    assert decision == Decision(Action.SWITCH_OVER, "300 ms of the 300 ms accepted are enough for the rest", 0)


def test_what_devices_have_to_send_counts() -> None:
    decision = decide([facts(dirty_bytes=20 * MB, device_bytes=10 * MB + 1)], Limits(max_downtime_s=0.3))
    assert decision.action is Action.ITERATE
    assert decision.reason == "the rest would take 300 ms, accepted are 300 ms"


def test_nothing_left_needs_no_bandwidth() -> None:
    idle = facts(dirty_bytes=0, device_bytes=0, bandwidth=0.0)
    assert decide([idle], Limits(max_downtime_s=0.0)).action is Action.SWITCH_OVER


def test_without_a_bandwidth_nobody_knows() -> None:
    decision = decide([facts(bandwidth=0.0)], Limits())
    assert decision.action is Action.ITERATE and "an unknown time" in decision.reason


def test_waits_for_devices_that_load_ahead() -> None:
    """The switchover-ack."""
    decision = decide([facts(dirty_bytes=0, initial_data_loaded=False)], Limits(auto_converge=True))
    assert decision.action is Action.ITERATE and "have not loaded their initial data" in decision.reason


@pytest.mark.parametrize(
    ("elapsed", "number", "limits", "said"),
    [
        (10.0, 3, Limits(0.01, timeout_s=10.0), "not converged in 10 s"),
        (9.99, 3, Limits(0.01, timeout_s=10.0), None),
        (1.0, 4, Limits(0.01, max_rounds=5), "not converged in 5 rounds"),
        (1.0, 3, Limits(0.01, max_rounds=5), None),
        (10.0, 4, Limits(0.01, timeout_s=10.0, max_rounds=5), "not converged in 10 s"),
    ],
)
def test_limits_end_it(elapsed: float, number: int, limits: Limits, said: str | None) -> None:
    history = [facts(elapsed_s=elapsed, number=number)]
    given_up = decide(history, limits)
    told = decide(history, replace(limits, switch_over_at_limit=True))
    if said is None:
        assert given_up.action is told.action is Action.ITERATE
        return
    assert given_up.action is Action.GIVE_UP and given_up.reason.startswith(f"{said}: ")
    assert told == Decision(Action.SWITCH_OVER, f"{said}: switching over as told", 0)


def test_a_device_that_does_not_load_is_named_when_it_was_what_was_missing() -> None:
    decision = decide([facts(elapsed_s=9.0, dirty_bytes=0, initial_data_loaded=False)], Limits(timeout_s=9.0))
    assert decision.action is Action.GIVE_UP
    assert "has not loaded its initial data; a higher limit would help" in decision.reason


@pytest.mark.parametrize(
    ("last", "limits", "ways"),
    [
        # Rounds shrink, they were only cut short.
        (
            facts(dirty_bytes=50 * MB),
            Limits(0.1, timeout_s=1.0),
            ["--max-downtime 626ms", "more time", "--auto-converge (it slows vCPUs, not DMA)"],
        ),
        # The guest dirties faster than the link carries.
        (
            facts(dirty_bytes=50 * MB, dirty_rate=200.0 * MB),
            Limits(0.1, timeout_s=1.0),
            ["--max-downtime 626ms", "a link of more than 500.0 MB/s", "--auto-converge (it slows vCPUs, not DMA)"],
        ),
        (
            facts(dirty_bytes=5 * MB, dirty_rate=200.0 * MB, throttle_percent=99),
            Limits(0.04, timeout_s=1.0, auto_converge=True),
            [
                "--max-downtime 63ms",
                "a link of more than 200.0 MB/s",
                "less DMA (vCPUs are slowed by 99 % already)",
            ],
        ),
    ],
)
def test_says_what_would_help(last: RoundFacts, limits: Limits, ways: list[str]) -> None:
    decision = decide([last], limits)
    assert decision.action is Action.GIVE_UP
    assert decision.reason.partition("it would converge with ")[2] == " or ".join(ways)


def test_more_time_is_not_advised_where_rounds_do_not_shrink() -> None:
    """A set of pages that are always dirty is left after each round, however fast the link."""
    hot = [facts(number=number, dirty_bytes=50 * MB) for number in range(STUCK_ROUNDS)]
    reason = decide(hot, Limits(0.1, max_rounds=STUCK_ROUNDS)).reason
    assert "more time" not in reason and "a link of more than 500.0 MB/s" in reason
    assert "more time" in decide(hot[-1:], Limits(0.1, max_rounds=STUCK_ROUNDS)).reason


@given(HISTORIES, LIMITS)
def test_never_gives_up_without_a_limit(history: list[RoundFacts], limits: Limits) -> None:
    decision = decide(history, replace(limits, timeout_s=None, max_rounds=None))
    assert decision.action is not Action.GIVE_UP


@given(HISTORIES, LIMITS)
def test_gives_up_only_at_a_limit_and_never_goes_on_behind_one(history: list[RoundFacts], limits: Limits) -> None:
    last = history[-1]
    late = limits.timeout_s is not None and last.elapsed_s >= limits.timeout_s
    many = limits.max_rounds is not None and last.number + 1 >= limits.max_rounds
    action = decide(history, limits).action
    if action is Action.GIVE_UP:
        assert (late or many) and not limits.switch_over_at_limit
    if late or many:
        assert action in (Action.GIVE_UP, Action.SWITCH_OVER)


@given(HISTORIES, LIMITS)
def test_switches_over_only_if_it_fits_or_as_told(history: list[RoundFacts], limits: Limits) -> None:
    last = history[-1]
    decision = decide(history, limits)
    ready = last.expected_downtime_s <= limits.max_downtime_s and last.initial_data_loaded
    if decision.action is Action.SWITCH_OVER and not ready:
        assert limits.switch_over_at_limit
        assert "not converged" in decision.reason and decision.reason.endswith("switching over as told")
    if ready:
        assert decision.action is Action.SWITCH_OVER


@given(HISTORIES, LIMITS)
def test_giving_up_always_says_what_would_help(history: list[RoundFacts], limits: Limits) -> None:
    decision = decide(history, limits)
    assert decision.reason
    if decision.action is not Action.GIVE_UP:
        return
    assert "would converge with --" in decision.reason or "would help" in decision.reason
    proposed = re.search(r"--max-downtime (\w+)", decision.reason)
    if proposed is not None:
        assert parse_duration(proposed[1]) >= history[-1].expected_downtime_s


@given(HISTORIES, LIMITS)
def test_slows_the_guest_only_if_allowed_and_never_lets_go(history: list[RoundFacts], limits: Limits) -> None:
    last = history[-1]
    decision = decide(history, limits)
    if decision.action is Action.THROTTLE:
        assert limits.auto_converge and len(history) > 1
        assert all(2 * facts.dirty_bytes > facts.sent_bytes for facts in history[-2:])
        assert last.throttle_percent < decision.throttle_percent <= 99
        assert str(decision.throttle_percent) in decision.reason
    else:
        assert decision.throttle_percent == last.throttle_percent


def test_slows_the_guest_in_the_steps_of_qemu() -> None:
    limits = Limits(max_downtime_s=0.01, auto_converge=True)
    history: list[RoundFacts] = []
    steps: list[int] = []
    throttle = 0
    for number in range(40):
        history.append(facts(number=number, dirty_bytes=90 * MB, throttle_percent=throttle))
        decision = decide(history, limits)
        assert decision.action is (Action.ITERATE if decision.throttle_percent == throttle else Action.THROTTLE)
        if decision.action is Action.THROTTLE:
            throttle = decision.throttle_percent
            steps.append(throttle)
    assert steps == [20, 30, 40, 50, 60, 70, 80, 90, 99]


def test_what_gets_no_better_is_said_with_what_would_help() -> None:
    limits = Limits(max_downtime_s=0.1)
    stuck = [facts(number=number, dirty_bytes=80 * MB) for number in range(STUCK_ROUNDS)]
    reason = decide(stuck, limits).reason
    assert reason == (
        "the rest would take 800 ms, accepted are 100 ms, and it gets no better: --max-downtime 1001ms or "
        "--auto-converge would help"
    )
    assert decide(stuck, limits).hopeless and not decide(stuck[1:], limits).hopeless
    assert "no better" not in decide(stuck[1:], limits).reason
    assert "no better" not in decide([*stuck[:-1], facts(dirty_bytes=60 * MB)], limits).reason
    assert "auto-converge" not in decide(stuck, replace(limits, auto_converge=True)).reason


def test_one_bad_round_slows_nobody() -> None:
    """Half of what was sent is not more than half."""
    limits = Limits(max_downtime_s=0.01, auto_converge=True)
    bad, good = facts(dirty_bytes=90 * MB), facts(dirty_bytes=50 * MB)
    assert decide([bad], limits).action is Action.ITERATE
    assert decide([bad, good], limits).action is Action.ITERATE
    assert decide([good, bad], limits).action is Action.ITERATE
    assert decide([good, bad, bad], limits).action is Action.THROTTLE
    assert decide([bad, bad], replace(limits, auto_converge=False)).action is Action.ITERATE


def test_a_step_counts_only_rounds_at_its_own_throttle() -> None:
    """QEMU counts from 0 again after each step: the round that was under way when it came tells nothing of it."""
    limits = Limits(max_downtime_s=0.01, auto_converge=True)
    history: list[RoundFacts] = []
    steps: list[int] = []
    throttle = 0
    for number in range(8):
        history.append(facts(number=number, dirty_bytes=90 * MB, throttle_percent=throttle))
        throttle = decide(history, limits).throttle_percent
        steps.append(throttle)
    assert steps == [0, 20, 20, 30, 30, 40, 40, 50]


def test_devices_that_have_too_much_to_send_are_what_is_told() -> None:
    """No throttle and no more rounds make what a device sends in STOP_COPY less."""
    last = facts(dirty_bytes=1 * MB, device_bytes=31 * MB)
    decision = decide([last], Limits(0.3, timeout_s=1.0, auto_converge=True))
    assert decision.action is Action.GIVE_UP
    assert "the devices have to send in the switchover alone takes 310 ms at 100.0 MB/s" in decision.reason
    assert "with --max-downtime 401ms or a faster link" in decision.reason
    assert "time" not in decision.reason.partition("would converge")[2].replace("--max-downtime", "")
