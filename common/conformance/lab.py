"""Where a check works: instances of the server, probes that talk to them, and memory for their DMA.

A check costs itself and nothing else: whatever it opened is closed after it, and a server that it has killed, or made
hang, is replaced if that is possible.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from common.conformance.check import Check, Failure, Outcome, Result, Unknown
from common.conformance.device import Device
from common.conformance.exercise import Exerciser, exerciser_of
from common.conformance.memory import DmaMemory, sealed_file
from common.conformance.probe import Hung, Limits, Lost, Probe, Transcript
from common.conformance.target import Instance, Target, UnreachableError
from common.vfio_user.capabilities import MAX_TRANSFER

__all__ = ["Lab", "run"]

_FATE = 1.0  # seconds that a server which closed the connection has to end


class Lab:
    """What one check works with."""

    def __init__(self, target: Target, limits: Limits) -> None:
        self.limits = limits
        self.transcript = Transcript()
        self._target = target
        self._deadline = time.monotonic() + limits.check
        self._resources = ExitStack()
        self._instance: Instance | None = None
        self._probe: Probe | None = None

    def close(self) -> None:
        """Give everything back."""
        self._resources.close()
        if self._instance is not None:
            self._instance.stop()

    # Connections

    def connect(self) -> Device:
        """Connect to the server, after closing the earlier connection, and say nothing."""
        self.disconnect()
        if self._instance is None:
            self._instance = self._target.start()
        self._probe = probe = self._connected(self._instance)
        return probe

    def device(self, max_transfer: int = MAX_TRANSFER) -> Device:
        """Connect, negotiate, look at the device, and bring it to RUNNING."""
        device = self.connect()
        device.negotiate(max_transfer=max_transfer)
        device.look()
        return device

    def again(self) -> Device:
        """Connect to the same server once more, where it serves more than one client; `Unknown` if it ends."""
        self.disconnect()
        if self._instance is not None and self._instance.fate(_FATE):
            if self._instance.crashed():
                raise Lost("the server died when its client went")
            raise Unknown("the server serves one client and ends, so there is no next client")
        try:
            return self.connect()
        except UnreachableError as error:
            raise Unknown(f"the server serves one client: {error}") from None

    def restart(self) -> Device:
        """Go on with a fresh device after this one was lost: a new instance, or a new connection."""
        self.disconnect()
        if self._instance is not None:
            self._instance.stop()
        self._instance = None
        return self.device()

    @contextmanager
    def second(self) -> Iterator[Device]:
        """Give a device of a second instance."""
        if not self._target.restarts:
            raise Unknown("a second instance is needed: give a command that starts one (--command)")
        instance = self._target.start()
        try:
            device = self._connected(instance)
            try:
                device.negotiate()
                device.look()
                yield device
            finally:
                device.close()
        except (Lost, Hung) as error:
            raise type(error)(f"second instance: {error}; {instance.fate(_FATE) or 'it is still there'}") from None
        finally:
            instance.stop()

    def disconnect(self) -> None:
        """Close the connection."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _connected(self, instance: Instance) -> Device:
        device = Device(instance.connect(self.limits.start), self.limits, self._deadline, self.transcript)
        self._resources.callback(device.close)
        return device

    # What else a check needs

    def memory(self) -> DmaMemory:
        """Return memory that the device may be given."""
        memory = DmaMemory()
        self._resources.callback(memory.close)
        return memory

    def sparse_memory(self, size: int) -> int:
        """Return the descriptor of so much memory, all holes; nobody looks at what is written there."""
        fd = sealed_file(size)
        self._resources.callback(os.close, fd)
        return fd

    def exerciser(self, device: Device, memory: DmaMemory) -> Exerciser:
        """Return what makes this device do DMA, with the memory mapped; `Unknown` for a device that is not known."""
        exerciser = exerciser_of(device, memory)
        self._resources.callback(exerciser.close)
        exerciser.attach()
        return exerciser

    def scribble(self, device: Device) -> None:
        """Give the device a state that tells it from a fresh one, where it is known how."""
        with suppress(Unknown):
            self.exerciser(device, self.memory()).scribble()

    def fate(self, seconds: float = _FATE) -> str | None:
        """Say how the server ended, if it ends within so many seconds; None if it lives, or nobody can tell."""
        return None if self._instance is None else self._instance.fate(seconds)

    def crashed(self) -> bool:
        """Tell whether the server is known to have died."""
        return self._instance is not None and self._instance.crashed()

    def refused_or_closed(self, what: str, answer: Callable[[], int]) -> str:
        """Insist that the server refuses, or closes the connection and survives; `answer` returns an errno or 0."""
        try:
            error = answer()
        except Lost:
            self.disconnect()
            fate = self.fate()
            if self.crashed():
                raise Failure(f"{what}: {fate}") from None
            return "the server closes the connection"
        if not error:
            raise Failure(f"{what} is not refused")
        return "the server refuses it"


def run(checks: Sequence[Check], target: Target, limits: Limits) -> Iterator[Result]:
    """Run checks one after the other, and give what came of each; raise `UnreachableError` if there is no server."""
    gone = ""
    for number, check in enumerate(checks):
        started = time.monotonic()
        lab = Lab(target, limits)
        try:
            outcome, detail = (Outcome.UNKNOWN, gone) if gone else _outcome(check, lab)
        except UnreachableError as error:
            if not number:
                raise
            outcome, detail = Outcome.UNKNOWN, f"the server cannot be reached any more: {error}"
        finally:
            lab.close()
        if not (target.restarts or gone or _well(target, limits)):
            gone = f"after {check.full_name} the server serves nobody; a command that starts it (--command) would go on"
            if not number and outcome is Outcome.FAIL:
                gone = "the server has answered nothing yet: it hangs, or serves another client"
            if number and outcome is Outcome.PASS:
                outcome, detail = Outcome.FAIL, "the server, which has served several clients, serves nobody after it"
        seconds = time.monotonic() - started
        yield Result(check, outcome, detail, lab.transcript.sent, lab.transcript.received, seconds)


def _well(target: Target, limits: Limits) -> bool:
    """Tell whether the server serves a client that connects now."""
    lab = Lab(target, limits)
    try:
        lab.connect().negotiate()
    except (UnreachableError, Failure, Lost, Hung):
        return False
    finally:
        lab.close()
    return True


def _outcome(check: Check, lab: Lab) -> tuple[Outcome, str]:
    try:
        return Outcome.PASS, check.body(lab) or ""
    except Unknown as error:
        return Outcome.UNKNOWN, str(error)
    except Failure as error:
        return Outcome.FAIL, str(error)
    except Lost as error:
        fate = lab.fate()
        return Outcome.FAIL, f"{error}: {fate}" if fate else str(error)
    except Hung as error:
        return Outcome.FAIL, f"the server hangs: {lab.fate(0) or error}"
    except UnreachableError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a server answers, the other checks go on
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
        return Outcome.UNKNOWN, f"a defect of the check, which does not understand what came: {problem}"
