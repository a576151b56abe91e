"""Both hosts of a handover and the network between them, as a model that can be walked through completely.

What decides is the product's own: the tables of `source.handover` and `destination.handover`, and what a record means
(`common.host.ownership`). The model adds what happens around them, step by step as the daemons do it: what is written
before what is said, what a process loses when it ends, and what its machine does then.

The network forgets no message: each that was ever sent may arrive at any later time, again and again, or never. That is
loss, duplication and delay in one. Any process may end between any two steps, and daemons start again from their
records. Each variation point is a method, so that a test can break exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from common.host.ownership import COMMITTED, OPEN, REVOKED, Opening, decision_of, is_new, opening
from common.machine.record import Ownership, Record
from destination import handover as there
from source import handover as here

__all__ = ["Model", "Situation", "Step"]


class Source(NamedTuple):
    """The host that the machine leaves from. `doing` is None while the daemon is down."""

    ownership: Ownership = Ownership.OWNER
    incarnation: int = 1
    session: int = 0
    doing: str | None = "idle"  # idle, setup, ready, asking, decided, waiting, settling
    machine: str | None = "running"  # running, held, handing over, moved; None: its process has ended


class Destination(NamedTuple):
    """The host that it goes to. `lost`: for good, with everything on it."""

    ownership: Ownership | None = None
    incarnation: int = 0
    session: int = 0  # that of the record
    decisions: frozenset[tuple[int, str]] = frozenset()
    up: bool = True
    arrival: int = 0  # the session in the daemon's memory
    offered: int = 0  # the incarnation of that
    state: int = there.UNKNOWN
    machine: str | None = None  # incoming, running
    brought: int = 0  # the session that the machine came in
    lost: bool = False

    @property
    def is_of_record(self) -> bool:
        """Whether there is a machine's process, and the one that the record is of."""
        return self.machine is not None and self.brought == self.session


class Situation(NamedTuple):
    """Everything at one moment."""

    source: Source = Source()
    destination: Destination = Destination()
    begun: int = 0
    messages: frozenset[tuple[object, ...]] = frozenset()

    def says(self, *message: object) -> Situation:
        """Send a message."""
        return self._replace(messages=self.messages | {message})

    def at_source(self, **changes: object) -> Situation:
        """Change the source."""
        return self._replace(source=self.source._replace(**changes))

    def at_destination(self, **changes: object) -> Situation:
        """Change the destination."""
        return self._replace(destination=self.destination._replace(**changes))

    @property
    def source_owns(self) -> bool:
        """Whether the source runs the machine, or would: now, or when its daemon starts again."""
        return self.source.ownership is Ownership.OWNER

    @property
    def destination_owns(self) -> bool:
        """Likewise; what has nothing left of the machine does not run it (it was given no machine file)."""
        destination = self.destination
        recorded = destination.ownership in (Ownership.COMMITTED, Ownership.STARTING, Ownership.OWNER)
        return destination.machine == "running" or (recorded and destination.is_of_record)

    @property
    def settled(self) -> bool:
        """Whether somebody has the machine who knows it, or it was lost with the host that owned it."""
        source, destination = self.source, self.destination
        if source.ownership is Ownership.OWNER:
            return source.machine in ("running", None)
        if source.ownership is Ownership.COMMITTING:
            return False
        return destination.machine == "running" or destination.lost or has_lost(destination)


class Step(NamedTuple):
    """What happens, and what it leads to. `fault`: nobody can count on it, or on its absence."""

    name: str
    then: Situation
    fault: bool = False


def has_lost(destination: Destination) -> bool:
    """Return whether the machine was this host's, and its process has ended: it was lost as any machine is."""
    owned = destination.ownership in (Ownership.STARTING, Ownership.OWNER)
    return destination.machine is None and (owned or any(how == COMMITTED for _, how in destination.decisions))


class Model:
    """All that can happen next. `sessions`: how many attempts the source makes at most."""

    started: tuple[int, ...] = (there.STARTING, there.RUNNING)  # what its source may take for an answer

    def __init__(self, sessions: int = 1, *, described: bool = True) -> None:
        self.sessions = sessions
        self.described = "m" if described else None  # the machine file that the source's daemon is started with

    def steps(self, now: Situation) -> Iterator[Step]:
        """Yield every step."""
        if now.source.doing is not None:
            yield from self.source_acts(now)
            yield from self.source_hears(now)
            yield from self.operator(now)
        yield from self.source_fails(now)
        if now.destination.lost:
            return
        if now.destination.up:
            yield from self.destination_acts(now)
            yield from self.destination_hears(now)
        yield from self.destination_fails(now)

    # The source.

    def source_acts(self, now: Situation) -> Iterator[Step]:
        source = now.source
        match source.doing:
            case "idle":
                leaves = source.ownership is Ownership.OWNER and source.machine == "running"
                if leaves and now.begun < self.sessions:
                    session = now.begun + 1
                    then = now._replace(begun=session).at_source(doing="setup", session=session)
                    yield Step("source: Prepare", then.says("PREPARE", session, source.incarnation + 1))
            case "setup" | "ready":
                machine = source.machine and "running"
                then = now.at_source(doing="idle", machine=machine).says("ABORT", source.session)
                yield Step("source: abort", then)
                if source.doing == "ready" and source.machine == "held":
                    yield from self.begin(now)
            case "recorded" | "asking" | "settling":
                yield from self.ask(now)
            case "decided":
                if source.machine == "held":
                    yield Step("source: the machine goes on", now.at_source(doing="idle", machine="running"))
                else:
                    yield Step("source: nothing is left to go on", now.at_source(doing="idle"))
            case "waiting" if now.destination.up:
                if self.look(now, source.session) == there.RUNNING:
                    then = now.at_source(doing="idle", ownership=Ownership.RELEASED, machine=None)
                    yield Step("source sees that it runs there", then)

    def begin(self, now: Situation) -> Iterator[Step]:
        """COMMITTING is on disk; nothing was sent."""
        ownership = here.after(now.source.ownership, here.Event.BEGIN)
        machine = "handing over" if ownership is Ownership.COMMITTING else now.source.machine
        yield Step("source: COMMITTING", now.at_source(doing="recorded", ownership=ownership, machine=machine))

    def ask(self, now: Situation) -> Iterator[Step]:
        """COMMIT, and Resolve when it is not answered; both again, as long as nobody answers."""
        source = now.source
        doing = "asking" if source.doing == "recorded" else source.doing
        yield Step("source: COMMIT", now.at_source(doing=doing).says("COMMIT", source.session, source.incarnation + 1))
        if source.doing != "recorded":
            yield Step("source: Resolve", now.says("RESOLVE", source.session))

    def source_hears(self, now: Situation) -> Iterator[Step]:
        source = now.source
        for message in now.messages:
            if message[0] == "READY" and source.doing == "setup" and message[1] == source.session:
                machine = source.machine and "held"
                yield Step("source hears: READY", now.at_source(doing="ready", machine=machine))
            elif source.doing in ("asking", "settling") and message[1] == source.session:
                if message[0] == "STARTED":
                    yield from self.decided(now, here.Event.COMMITTED)
                elif message[0] == "REVOKED":
                    yield from self.decided(now, here.Event.REVOKED)

    def decided(self, now: Situation, event: here.Event) -> Iterator[Step]:
        """The answer is on disk, with what the machine does about it; one that stays goes on next."""
        source = now.source
        try:
            ownership = here.after(source.ownership, event)
        except ValueError:
            return
        incarnation = here.incarnation_after(event, source.incarnation)
        if ownership is Ownership.GONE:
            then = now.at_source(doing="waiting", machine=source.machine and "moved")
        else:
            then = now.at_source(doing="decided", machine=source.machine and "held")
        then = then.at_source(ownership=ownership, incarnation=incarnation)
        yield Step(f"source decides: {event.value}", then)

    def operator(self, now: Situation) -> Iterator[Step]:
        """An operator who tells the truth, and does so only where nobody else can."""
        source, destination = now.source, now.destination
        if source.doing not in ("recorded", "asking", "settling"):
            return
        off = not destination.up and destination.machine is None
        if off or destination.lost:
            yield from self.decided(now, here.Event.DECLARED_HERE)
        if destination.machine == "running" and destination.ownership in (Ownership.STARTING, Ownership.OWNER):
            yield from self.decided(now, here.Event.DECLARED_THERE)

    def source_fails(self, now: Situation) -> Iterator[Step]:
        source = now.source
        if source.doing is not None:
            # The machine's process sees the connection of its migration close; one that was found again has none.
            held = source.machine == "held" and not (source.doing == "decided" and self.was_settling(now))
            machine = "running" if held and source.ownership is not Ownership.COMMITTING else source.machine
            yield Step("source daemon ends", now.at_source(doing=None, machine=machine), fault=True)
        else:
            yield from self.source_starts(now)
        if source.machine is not None and source.incarnation < 3:  # or there would be no end of new machines
            yield Step("source machine ends", now.at_source(machine=None), fault=True)

    def was_settling(self, now: Situation) -> bool:
        """Whether the daemon that has decided had found the handover; both are possible, and the worse is taken."""
        return True

    def source_starts(self, now: Situation) -> Iterator[Step]:
        source = now.source
        known = Record("u", "m", source.incarnation, source.ownership, "/run", str(source.session), "b:1")
        runs = source.machine is not None
        action = opening(known, runs=runs, described=self.described)
        if action is Opening.END:
            runs = False
            action = opening(known, runs=runs, described=self.described)
        then = now.at_source(doing="idle", machine=source.machine if runs else None)
        match action:
            case Opening.HOLD:
                if source.ownership is Ownership.OWNER:
                    then = then.at_source(machine="running")
            case Opening.ASK:
                then = then.at_source(doing="settling")
            case Opening.BOOT:
                then = then.at_source(
                    ownership=Ownership.OWNER, incarnation=source.incarnation + 1, machine="running", session=0
                )
            case Opening.NONE:
                pass
            case _:
                raise AssertionError(f"a source does not {action.value}")
        yield Step(f"source daemon starts: {action.value}", then)

    # The destination.

    def destination_acts(self, now: Situation) -> Iterator[Step]:
        """What it does by itself."""
        destination = now.destination
        state = there.State.ValueType(destination.state)
        if destination.arrival:
            if state == there.PREPARING and destination.machine == "incoming":
                then = now.at_destination(state=there.after(state, there.Event.LOADED))
                yield Step("destination: loaded", then.says("READY", destination.arrival))
            if state in (there.PREPARING, there.READY):
                yield from self.revoke(now, "destination revokes")
            if state == there.COMMITTED:
                yield from self.start(now)
            if state == there.STARTING and destination.machine == "incoming":
                then = now.at_destination(state=there.after(state, there.Event.STARTED), machine="running")
                yield Step("destination: started", then)
            if state == there.RUNNING and destination.ownership is Ownership.STARTING:
                decided = self.decides(now, destination.arrival, COMMITTED)
                yield Step("destination: settled", decided.at_destination(ownership=Ownership.OWNER))
        busy = state in (there.PREPARING, there.READY, there.COMMITTED, there.STARTING)
        if destination.ownership is not None and destination.machine is None and not (busy or destination.arrival):
            # Another machine has come here, and gone on: its record has replaced this one's.
            yield Step("destination: another machine", now.at_destination(ownership=None, session=0, incarnation=0))

    def start(self, now: Situation) -> Iterator[Step]:
        """A machine that was committed is recorded as being started, by its own process, or found to have none."""
        destination = now.destination
        state = there.State.ValueType(destination.state)
        if destination.machine == "incoming":
            then = now.at_destination(state=there.after(state, there.Event.START), ownership=Ownership.STARTING)
            yield Step("destination: STARTING", then)
        else:
            decided = self.decides(now, destination.arrival, REVOKED)
            then = decided.at_destination(state=there.after(state, there.Event.LOST), ownership=None, session=0)
            yield Step("destination: the machine was lost before its start", then)

    def decides(self, now: Situation, session: int, how: str) -> Situation:
        """Note durably how a session was decided."""
        others = (noted for noted in now.destination.decisions if noted[0] != session)
        return now.at_destination(decisions=frozenset((*others, (session, how))))

    def known(self, destination: Destination) -> Record | None:
        """The destination's record."""
        if destination.ownership is None:
            return None
        return Record("u", "m", destination.incarnation, destination.ownership, "/run", str(destination.session))

    def noted(self, destination: Destination, session: int) -> str | None:
        """What is noted of a session."""
        return next((how for its, how in destination.decisions if its == session), None)

    def decision(self, now: Situation, session: int) -> str | None:
        """How a session was decided, if it was."""
        destination = now.destination
        return decision_of(self.known(destination), str(session), self.noted(destination, session))

    def comes_anew(self, now: Situation, session: int) -> bool:
        """Whether a session has never been here."""
        destination = now.destination
        return is_new(self.known(destination), str(session), self.noted(destination, session))

    def revoke(self, now: Situation, name: str, *answer: object) -> Iterator[Step]:
        """REVOKED is on disk, then told, and the machine is taken down."""
        destination = now.destination
        state = there.after(there.State.ValueType(destination.state), there.Event.REVOKE)
        machine = None if state == there.REVOKED else destination.machine
        then = self.decides(now, destination.arrival, REVOKED).at_destination(state=state, machine=machine)
        yield Step(name, then.says(*answer) if answer else then)

    def destination_hears(self, now: Situation) -> Iterator[Step]:
        for message in now.messages:
            match message:
                case ("PREPARE", int(session), int(incarnation)):
                    yield from self.prepare(now, session, incarnation)
                case ("COMMIT", int(session), int(incarnation)):
                    yield from self.commit(now, session, incarnation)
                case ("RESOLVE", int(session)):
                    yield from self.resolve(now, session)
                case ("GET", int(session)):
                    yield Step(
                        "destination hears: GetSession", now.says("STATE", session, self.look(now, session), "GET")
                    )
                case ("ABORT", int(session)):
                    if session == now.destination.arrival and now.destination.state in (there.PREPARING, there.READY):
                        yield from self.revoke(now, "destination hears: Abort")

    def look(self, now: Situation, session: int) -> int:
        """What a session's state is."""
        if session == now.destination.arrival:
            return now.destination.state
        return {COMMITTED: there.RUNNING, REVOKED: there.REVOKED, None: there.UNKNOWN}[self.decision(now, session)]

    def prepare(self, now: Situation, session: int, incarnation: int) -> Iterator[Step]:
        destination = now.destination
        busy = destination.arrival and destination.state != there.REVOKED
        if busy or destination.machine is not None or not self.comes_anew(now, session):
            return
        if destination.ownership is not None and incarnation <= destination.incarnation:
            return
        then = self.decides(now, session, OPEN)
        then = then.at_destination(
            arrival=session, offered=incarnation, state=there.PREPARING, machine="incoming", brought=session
        )
        yield Step(f"destination hears: Prepare {session}", then)

    def is_of(self, now: Situation, session: int) -> bool:
        """Whether a call is of the session that is known."""
        return session == now.destination.arrival

    def commit(self, now: Situation, session: int, incarnation: int) -> Iterator[Step]:
        destination = now.destination
        if not self.is_of(now, session) or incarnation != destination.offered:
            return
        try:
            state = there.after(there.State.ValueType(destination.state), there.Event.COMMIT)
        except ValueError:
            return
        if state != destination.state and destination.machine is None:
            return  # its process has ended, so nothing can be recorded
        then = now
        if state != destination.state:
            then = now.at_destination(
                state=state, ownership=Ownership.COMMITTED, session=destination.arrival, incarnation=incarnation
            )
        # It is answered when the machine runs: until then whoever asks waits.
        if state == there.RUNNING:
            then = then.says("STARTED", session)
        yield Step(f"destination hears: COMMIT {session}", then)

    def resolve(self, now: Situation, session: int) -> Iterator[Step]:
        destination, name = now.destination, f"destination hears: Resolve {session}"
        if session == destination.arrival:
            try:
                yield from self.revoke(now, name, "REVOKED", session)
            except ValueError:
                if destination.state in self.started:
                    yield Step(name, now.says("STARTED", session))
            return
        decision = self.decision(now, session)
        then = now if decision is not None else self.decides(now, session, REVOKED)
        yield Step(name, then.says("STARTED" if decision == COMMITTED else "REVOKED", session))

    def destination_fails(self, now: Situation) -> Iterator[Step]:
        destination = now.destination
        if destination.up:
            recorded = destination.ownership in (Ownership.COMMITTED, Ownership.STARTING, Ownership.OWNER)
            machine = (
                destination.machine if recorded and destination.is_of_record else None
            )  # what is not committed ends with its connection
            then = now.at_destination(up=False, arrival=0, offered=0, state=there.UNKNOWN, machine=machine)
            yield Step("destination daemon ends", then, fault=True)
        else:
            yield from self.destination_starts(now)
        if destination.machine is not None:
            yield Step("destination machine ends", now.at_destination(machine=None), fault=True)
        then = now.at_destination(up=False, arrival=0, offered=0, state=there.UNKNOWN, machine=None, lost=True)
        yield Step("destination is lost for good", then, fault=True)

    def destination_starts(self, now: Situation) -> Iterator[Step]:
        destination = now.destination
        known = self.known(destination)
        action = opening(known, runs=destination.is_of_record, described=None)
        then = now.at_destination(up=True)
        match action:
            case Opening.TAKE_OVER:
                then = self.decides(then, destination.session, COMMITTED)
                then = then.at_destination(machine="running", ownership=Ownership.OWNER)
            case Opening.GIVE_BACK:
                then = self.decides(then, destination.session, REVOKED).at_destination(ownership=None, session=0)
            case Opening.LOST:
                then = self.decides(then, destination.session, COMMITTED)
            case Opening.HOLD | Opening.NONE:
                pass
            case _:
                raise AssertionError(f"a destination does not {action.value}")
        yield Step(f"destination daemon starts: {action.value}", then)
