"""Every interleaving of a handover: never two owners, and a way to one as long as the owner's host lives."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest
from handover_model import Model, Situation, Step

from common.host import ownership
from common.host.ownership import COMMITTED, OPEN, REVOKED, Opening
from common.machine.record import Ownership
from destination import handover as there
from source import handover as here

Parents = dict[Situation, tuple[Situation, str] | None]


def trace(parents: Parents, last: Situation) -> str:
    """Return how a situation came about, step by step."""
    lines = [f"{last}"]
    while (parent := parents[last]) is not None:
        last, name = parent
        lines.append(name)
    return "\n".join(reversed(lines))


def walk(model: Model) -> set[Situation]:
    """Return every situation that can come about; fail on one with two owners, or from which nothing leads to one."""
    first = Situation()
    parents: Parents = {first: None}
    leads: dict[Situation, list[Situation]] = {}
    queue = deque([first])
    while queue:
        now = queue.popleft()
        assert not (now.source_owns and now.destination_owns), f"two owners:\n{trace(parents, now)}"
        for name, then, fault in model.steps(now):
            if not fault:
                leads.setdefault(then, []).append(now)
            if then not in parents:
                parents[then] = now, name
                queue.append(then)
    stuck = without_a_way(parents, leads)
    if stuck:
        pytest.fail(f"nobody ever has it:\n{trace(parents, next(now for now in parents if now in stuck))}")
    return set(parents)


def without_a_way(parents: Parents, leads: dict[Situation, list[Situation]]) -> set[Situation]:
    """Return the situations from which, without any more faults, nothing leads to a settled one."""
    good = [now for now in parents if now.settled]
    stuck = set(parents) - set(good)
    while good:
        for before in leads.get(good.pop(), ()):
            if before in stuck:
                stuck.remove(before)
                good.append(before)
    return stuck


@pytest.mark.parametrize(
    ("sessions", "described"), [(1, True), (1, False), pytest.param(2, True, marks=pytest.mark.matrix)]
)
def test_no_interleaving_has_two_owners_or_no_way_to_one(sessions: int, described: bool) -> None:
    found = walk(Model(sessions, described=described))
    reached = {(now.source.ownership, now.destination.state, now.destination.ownership) for now in found}
    # What it is about does come about.
    assert (Ownership.COMMITTING, there.STARTING, Ownership.STARTING) in reached
    assert (Ownership.RELEASED, there.RUNNING, Ownership.OWNER) in reached
    assert (Ownership.OWNER, there.REVOKED, None) in reached
    assert (Ownership.COMMITTING, there.UNKNOWN, Ownership.COMMITTED) in reached  # its daemon is down
    assert any(now.source.doing == "settling" for now in found)
    assert any(now.destination.lost and now.source.ownership is Ownership.COMMITTING for now in found)
    # Whoever was told that the machine has gone was told so by a host that had begun to start it.
    for source, destination, *_ in found:
        if source.ownership is Ownership.GONE and destination.arrival == source.session:
            assert destination.state in (there.STARTING, there.RUNNING)


# The protocol, broken in one place each: in what happens around the tables …


class CommitBeforeRecord(Model):
    """COMMIT is sent, and then COMMITTING recorded."""

    def begin(self, now: Situation) -> Iterator[Step]:
        yield Step("source: COMMIT", now.says("COMMIT", now.source.session, now.source.incarnation + 1))
        yield from super().begin(now)


class SilenceIsAnAnswer(Model):
    """A source that is not answered takes its machine back."""

    def ask(self, now: Situation) -> Iterator[Step]:
        yield from super().ask(now)
        yield from self.decided(now, here.Event.REVOKED)


class LookingDecides(Model):
    """What GetSession says of a session that is not committed is taken for an answer."""

    def ask(self, now: Situation) -> Iterator[Step]:
        yield from super().ask(now)
        if now.destination.up and self.look(now, now.source.session) not in (there.COMMITTED, *self.started):
            yield from self.decided(now, here.Event.REVOKED)


class AnswerBeforeRecord(Model):
    """Resolve is answered, and then REVOKED recorded."""

    def resolve(self, now: Situation, session: int) -> Iterator[Step]:
        if now.destination.state in (there.PREPARING, there.READY):
            yield Step("destination answers: revoked", now.says("REVOKED", session))
        yield from super().resolve(now, session)


class ForgetsRevoked(Model):
    """A daemon that starts again knows nothing of the sessions that were here."""

    def destination_starts(self, now: Situation) -> Iterator[Step]:
        for name, then, fault in super().destination_starts(now):
            yield Step(name, then.at_destination(decisions=frozenset()), fault)


class ForgetsOpen(Model):
    """A session is noted when it is decided, and not when it comes."""

    def decides(self, now: Situation, session: int, how: str) -> Situation:
        return now if how == OPEN else super().decides(now, session, how)


class AnySession(Model):
    """A COMMIT is taken for the session that is here, whichever it is of."""

    def is_of(self, now: Situation, session: int) -> bool:
        return bool(now.destination.arrival)


class StartsFromMemory(Model):
    """A source that starts again lets its machine run, and reads its record later."""

    def source_starts(self, now: Situation) -> Iterator[Step]:
        for name, then, fault in super().source_starts(now):
            again = then.source.machine == "handing over"
            changes = {"machine": "running", "ownership": Ownership.OWNER, "doing": "idle"} if again else {}
            yield Step(name, then.at_source(**changes), fault)


class LyingOperator(Model):
    """An operator says that the machine is here, and does not know."""

    def operator(self, now: Situation) -> Iterator[Step]:
        if now.source.ownership is Ownership.COMMITTING:
            yield from self.decided(now, here.Event.DECLARED_HERE)


@pytest.mark.parametrize(
    ("broken", "sessions"),
    [
        (CommitBeforeRecord, 1),
        (SilenceIsAnAnswer, 1),
        (LookingDecides, 1),
        (AnswerBeforeRecord, 1),
        (ForgetsRevoked, 1),
        (ForgetsOpen, 1),
        (AnySession, 2),
        (StartsFromMemory, 1),
        (LyingOperator, 1),
    ],
)
def test_the_walk_finds_two_owners(broken: type[Model], sessions: int) -> None:
    with pytest.raises(AssertionError, match="two owners"):
        walk(broken(sessions))


class CommittedIsEnough(Model):
    """A source gives its machine up to a destination that is COMMITTED, which may lose it unstarted."""

    started = (there.COMMITTED, there.STARTING, there.RUNNING)


class NoOperator(Model):
    """Nobody speaks for a destination that was lost for good."""

    def operator(self, now: Situation) -> Iterator[Step]:
        yield from ()


class NeverGivesBack(Model):
    """A destination whose machine has ended before its start keeps it."""

    def start(self, now: Situation) -> Iterator[Step]:
        if now.destination.machine is not None:
            yield from super().start(now)


class NeverAsksAgain(Model):
    """A source that starts again leaves a handover undecided."""

    def source_starts(self, now: Situation) -> Iterator[Step]:
        for name, then, fault in super().source_starts(now):
            yield Step(name, then.at_source(doing="idle"), fault)


class LeavesItStanding(Model):
    """A source that starts again does not let a machine go on for which the last daemon did not come to it."""

    def source_starts(self, now: Situation) -> Iterator[Step]:
        for name, then, fault in super().source_starts(now):
            yield Step(
                name, then.at_source(machine=now.source.machine) if now.source.machine == "held" else then, fault
            )


@pytest.mark.parametrize("broken", [CommittedIsEnough, NoOperator, NeverGivesBack, NeverAsksAgain, LeavesItStanding])
def test_the_walk_finds_that_nobody_has_it(broken: type[Model]) -> None:
    with pytest.raises(pytest.fail.Exception, match="nobody ever has it"):
        walk(broken())


# … and in the tables and rules themselves.


@pytest.mark.parametrize(
    ("table", "cell", "state", "found"),
    [
        (there, (there.READY, there.Event.REVOKE), there.READY, "two owners"),  # revoked is said, and not done
        (there, (there.RUNNING, there.Event.REVOKE), there.RUNNING, "two owners"),
        (here, (Ownership.OWNER, here.Event.BEGIN), Ownership.OWNER, "two owners"),
        (here, (Ownership.COMMITTING, here.Event.COMMITTED), Ownership.OWNER, "two owners"),
        (here, (Ownership.COMMITTING, here.Event.REVOKED), Ownership.GONE, "nobody ever has it"),
        (here, (Ownership.COMMITTING, here.Event.DECLARED_HERE), Ownership.GONE, "nobody ever has it"),
    ],
)
def test_the_walk_notices_a_broken_table(
    monkeypatch: pytest.MonkeyPatch, table: object, cell: object, state: object, found: str
) -> None:
    monkeypatch.setitem(table._TABLE, cell, state)  # type: ignore[attr-defined]
    with pytest.raises((AssertionError, pytest.fail.Exception), match=found):
        walk(Model())


@pytest.mark.parametrize(
    ("kept", "runs", "instead", "found"),
    [
        (Ownership.COMMITTING, True, Opening.HOLD, "nobody ever has it"),
        (Ownership.COMMITTING, False, Opening.BOOT, "two owners"),
        (Ownership.GONE, False, Opening.BOOT, "two owners"),
        (Ownership.RELEASED, False, Opening.BOOT, "two owners"),
    ],
)
def test_the_walk_notices_a_broken_start(
    monkeypatch: pytest.MonkeyPatch, kept: Ownership, runs: bool, instead: Opening, found: str
) -> None:
    right = ownership.opening

    def wrong(known: ownership.Record | None, *, runs: bool, described: str | None) -> Opening:
        if known is not None and (known.ownership, runs) == (kept, its_runs):
            return instead
        return right(known, runs=runs, described=described)

    its_runs = runs
    monkeypatch.setattr("handover_model.opening", wrong)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=found):
        walk(Model())


def test_decisions_have_names_of_their_own() -> None:
    assert len({OPEN, COMMITTED, REVOKED}) == 3
