"""Move machines to and fro while things break: python tests/soak/soaking.py --seconds 600 --seed 7 (make soak).

The same seed gives the same steps. What was measured is printed at the end, or written as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cells import DEVICES
from pair import Pair
from steps import End, Step, machine, step
from switchover.v1 import host_pb2
from test_journey_localhost import goes_on

from common.rpc.errors import peer_error

HANG = 120.0
PERCENTILES = (50, 90, 99, 100)
SAID_AT_THE_END = 60  # lines of each log


class Figures:
    """What a soak has measured."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.steps = 0
        self.machines = 0
        self.struck: Counter[str] = Counter()
        self.results: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.times: dict[str, list[dict[str, float]]] = {}
        self.rss_mib: list[float] = []

    def add(self, result: host_pb2.MigrationResult | None, *, disturbed: bool) -> None:
        self.results[result.result if result is not None else "not told"] += 1
        if result is None:
            return
        if result.reason:
            self.reasons[result.reason] += 1
        if result.result == "completed":
            times = {
                "downtime_ms": result.downtime_ms,
                "verification_ms": result.downtime.verification,
                "total_ms": result.total_ms,
            }
            if result.guest_gap_ms >= 0:
                times["guest_gap_ms"] = result.guest_gap_ms
            how = f"{result.verify}, {'disturbed' if disturbed else 'undisturbed'}"
            self.times.setdefault(how, []).append(times)

    def document(self, seconds: float) -> dict[str, Any]:
        """Return all of it as documented JSON (docs/reliability.md)."""
        return {
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "steps": self.steps,
            "machines": self.machines,
            "faults": dict(self.struck.most_common()),
            "migrations": dict(self.results.most_common()),
            "reasons": dict(self.reasons.most_common()),
            "completed": {
                how: {
                    "count": len(measured),
                    **{name: percentiles(times[name] for times in measured if name in times) for name in measured[0]},
                }
                for how, measured in sorted(self.times.items())
            },
            "largest_daemon_rss_mib": round(max(self.rss_mib, default=0), 1),
        }


def percentiles(values: Iterable[float]) -> dict[str, float]:
    found = np.percentile(list(values), PERCENTILES, method="higher")
    return {
        f"p{which}" if which < 100 else "max": round(value, 1) for which, value in zip(PERCENTILES, found, strict=True)
    }


def nothing() -> None:
    """Repair what needs no repair."""


def tell(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended by now."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Soak:
    """One run: a pair of hosts, the machine that is there now, and the figures."""

    def __init__(self, seed: int, held: ExitStack) -> None:
        self.figures = Figures(seed)
        self.pair = Pair(held)
        self._boot()

    def _boot(self) -> None:
        self.pair.boot(machine(self.figures.seed, self.figures.machines))
        self.figures.machines += 1
        self._counters = goes_on(self.pair.here.daemon)

    def take(self, step: Step) -> str:
        """Carry one step out, check what has become of the machine, and say so."""
        pair = self.pair
        source = pair.here
        struck, result = self._migrate(step)
        runs = pair.settle()
        became = (End.STAYS if pair.here is source else End.MOVES) if runs else End.DIES
        allowed = step.may_end if struck else End.MOVES
        assert became in allowed, f"{became} where {allowed} is right: {result}"
        if result is not None:
            self._told(result, became, moved=pair.here is not source)
        if runs:
            self._counters = goes_on(pair.here.daemon, self._counters)
            pair.leaves_nothing()
        else:
            self._died()
        self.figures.steps += 1
        self.figures.struck[step.fault if struck else f"{step.fault}: too late"] += 1
        self.figures.add(result, disturbed=struck and step.fault != "nothing")
        self.figures.rss_mib += [host.rss_mib() for host in pair.hosts]
        how = f"{result.result} {result.reason}".strip() if result is not None else "not told"
        return f"{how}; the machine {(became.name or '').lower()}{'' if struck else ': too late for the fault'}"

    def _migrate(self, step: Step) -> tuple[bool, host_pb2.MigrationResult | None]:
        """Return whether the fault has struck, and the result; None if nobody was there to tell it."""
        source, destination = self.pair.here, self.pair.there
        with ExitStack() as held:
            arrived = held.enter_context(self.pair.rig.held(step.point)) if step.point else None
            session = source.daemon.begin(destination.address, **step.request())
            if arrived is not None:
                arrived()
            else:
                time.sleep(step.after)
            repair = self._strike(step, session)
        if repair is None:
            return False, source.daemon.follow(session, HANG)
        told = source.daemon
        if repair is not nothing:
            time.sleep(step.lasts)
            repair()
        if source.daemon is not told:
            return True, None
        return True, told.follow(session, HANG)

    def _strike(self, step: Step, session: str) -> Callable[[], None] | None:
        """Break what the step says; return what repairs it, None if there was nothing to break."""
        pair, there = self.pair, self.pair.there
        match step.fault.split(" ", 1):
            case ["nothing"]:
                return nothing
            case ["cancelled"]:
                try:
                    pair.here.daemon.stub.Cancel(host_pb2.CancelRequest(session_id=session), timeout=20)
                except grpc.RpcError as error:
                    assert peer_error(error).reason == "NO_MIGRATION", peer_error(error)  # noqa: PT017  # it may succeed as well
                    return None
                return nothing
            case ["slow", "network"]:
                there.disturb("slow")
                return lambda: there.disturb("")
            case ["network", how]:
                there.disturb(how)

                def heal() -> None:
                    if how.startswith("without"):
                        there.disturb("cut")  # no network takes bytes out of the middle of a connection that lives on
                    there.disturb("")

                return heal
            case [role, "daemon killed" | "daemon told to end" as how]:
                host = pair.here if role == "source" else there
                if how == "daemon killed":
                    host.daemon.close()
                else:
                    host.daemon.process.send_signal(signal.SIGTERM)

                def start_again() -> None:
                    assert host.daemon.process.wait(HANG) in (0, -signal.SIGKILL)
                    host.daemon.close()
                    host.start()

                return start_again
            case [role, what]:
                what, how = what.split()
                pid = pair.victim(role, step.device if what == "device" else what)
                if not pid:
                    return None
                if how == "killed":
                    tell(pid, signal.SIGKILL)
                    return nothing
                tell(pid, signal.SIGSTOP)
                return lambda: tell(pid, signal.SIGCONT)
        raise AssertionError(step.fault)

    def _told(self, result: host_pb2.MigrationResult, became: End, *, moved: bool) -> None:
        """Fail unless the result is true, and says what has happened in one line."""
        assert result.reason not in ("INTERNAL", "DATA_LOSS"), result
        if result.result == "completed":
            assert moved and result.verified == "true", result
            return
        assert result.error and result.error.isprintable() and "Traceback" not in result.error, result
        if became is not End.DIES:
            assert result.owner == ("destination" if moved else "source"), result

    def _died(self) -> None:
        """It says why, can be looked at, and is not moved; another machine takes its place."""
        pair = self.pair
        state = pair.here.state()
        if state == "failed":
            found = pair.here.daemon.look().machine
            assert found.failure and len(found.devices) == len(DEVICES), found
            with pytest.raises(grpc.RpcError) as refused:
                pair.here.daemon.begin(pair.there.address)
            assert peer_error(refused.value).reason == "BLOCKED", peer_error(refused.value)
        pair.bury()
        self._boot()

    def last_words(self) -> str:
        """Return the ends of all logs."""
        found = []
        for host in self.pair.hosts:
            for log in host.logs():
                found += [f"-- {log}", *log.read_text(errors="replace").splitlines()[-SAID_AT_THE_END:]]
        return "\n".join(found)


def soak(seed: int, steps: Iterable[int], *, seconds: float, say: Callable[[str], object] = print) -> Figures:
    """Take these steps of a seed's plan, but begin none after so many seconds; a failure says which step it was."""
    ends = time.monotonic() + seconds
    with ExitStack() as held:
        run = Soak(seed, held)
        for number in steps:
            if time.monotonic() > ends:
                break
            taken, began = step(seed, number), time.monotonic()
            say(f"{taken}")
            try:
                say(f"  {run.take(taken)}, in {time.monotonic() - began:.1f} s")
            except Exception as error:
                say(run.last_words())
                raise AssertionError(f"seed {seed}, {taken}") from error
        return run.figures


def main() -> int:
    parser = argparse.ArgumentParser(description="Move machines to and fro while things break.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", type=int, default=0, help="step of the plan to begin with")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there too")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    try:
        figures = soak(
            seed, itertools.count(options.first), seconds=options.seconds, say=lambda text: print(text, flush=True)
        )
    except AssertionError:
        traceback.print_exc()
        return 1
    document = json.dumps(figures.document(time.monotonic() - began), indent=2)
    print(document)
    if options.json is not None:
        options.json.write_text(document + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
