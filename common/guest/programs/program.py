"""A guest program: steps, state in guest RAM, counters, and what it noticed.

A program is a witness. It keeps everything it knows in its area of guest RAM, so that a guest that was moved goes on
where it stopped, and it compares what it finds there with what must be there. The one thing that does not lie in RAM
is a register: the number of steps taken, which travels in the vCPU's state. A state page that came over in an old
version, consistent as it may be, disagrees with it.
"""

from __future__ import annotations

import ctypes
import inspect
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from common.guest.memory import GuestMemory
from common.ipc.channel import RequestError
from common.memory.layout import PAGE_SIZE

__all__ = ["NEVER", "Area", "GuestArray", "Moment", "NoState", "Program", "in_ram"]

NEVER = 1 << 62
MAGIC = 0x31474F5250545357
MESSAGES = 12
MESSAGE_SIZE = 144
STATE_OFFSET = 2048

_State = TypeVar("_State", bound=ctypes.LittleEndianStructure)
_Structure = TypeVar("_Structure", bound=type[ctypes.LittleEndianStructure])


class Moment(NamedTuple):
    """The present, as a step sees it."""

    now_ns: int  # guest time
    run_ns: int  # time that the vCPU has run, neither paused nor throttled: what to measure waiting and work by
    run: int  # number of the run: grows whenever the vCPU continues after a pause
    interrupted: bool = False  # the program's device has raised an interrupt since the last step


def in_ram(kind: _Structure) -> _Structure:
    """Make a structure of guest RAM out of annotations: each is an unsigned 64-bit number. A class decorator."""
    kind._fields_ = [(name, ctypes.c_uint64) for name in inspect.get_annotations(kind)]
    return kind


class Header(ctypes.LittleEndianStructure):
    """What every area begins with."""

    magic: int
    program: bytes
    steps: int
    errors: int
    halted: int
    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("program", ctypes.c_char * 64),
        ("steps", ctypes.c_uint64),
        ("errors", ctypes.c_uint64),
        ("halted", ctypes.c_uint64),
        ("messages", ctypes.c_char * MESSAGE_SIZE * MESSAGES),
    )


@in_ram
class NoState(ctypes.LittleEndianStructure):
    """The state of a program that has none."""


class GuestArray:
    """An array in guest RAM that begins at a page; who writes to `data` calls `mark` afterwards."""

    __slots__ = ("_memory", "data", "gpa")

    def __init__(self, memory: GuestMemory, gpa: int, data: npt.NDArray[Any]) -> None:
        self._memory = memory
        self.gpa = gpa
        self.data = data

    def mark(self, first: int = 0, count: int | None = None) -> None:
        """Log `count` rows from `first`; all from there if `count` is not given."""
        row = self.data.strides[0]
        self._memory.mark(self.gpa + first * row, (len(self.data) - first if count is None else count) * row)


class Area:
    """RAM that belongs to one program, given out in whole pages, always in the same order."""

    def __init__(self, memory: GuestMemory, gpa: int, size: int) -> None:
        """`ValueError` unless the area consists of whole pages of RAM."""
        if gpa % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(f"an area consists of whole pages, not of {size:#x} bytes at {gpa:#x}")
        memory.view(gpa, size)
        self.memory = memory
        self._next = gpa
        self._end = gpa + size

    def take(self, size: int) -> int:
        """Return the address of `size` bytes more; `ValueError` if they are not there."""
        gpa = self._next
        self._next += -(-size // PAGE_SIZE) * PAGE_SIZE
        if self._next > self._end:
            raise ValueError(f"its area is too small by {self._next - self._end} bytes")
        return gpa

    def array(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> GuestArray:
        """Return an array of `shape` in memory of its own; it holds whatever was there."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        gpa = self.take(size)
        return GuestArray(self.memory, gpa, self.memory.view(gpa, size).view(kind).reshape(shape))


class Program(Generic[_State]):
    """Base of all programs; `state` is in guest RAM, and is marked after each step."""

    COUNTERS: tuple[str, ...] = ()  # the members of `state` that a report shows
    device_name: str | None = None  # whose interrupts make the program take a step

    def __init__(self, name: str, area: Area, state: type[_State]) -> None:
        """Lay out the area, without looking into it: its content may not have arrived yet."""
        self.name = name
        self.memory = area.memory
        self._gpa = area.take(PAGE_SIZE)
        page = self.memory.view(self._gpa, PAGE_SIZE)
        self._header = Header.from_buffer(page.data)
        self.state = state.from_buffer(page.data, STATE_OFFSET)
        self._started = False
        self._steps: int | None = None
        self._lost: str | None = None

    @property
    def _kind(self) -> bytes:
        return f"{type(self).__name__} {self.name}".encode()[:64]

    @property
    def steps(self) -> int | None:
        """The register: steps taken; None if it is not known. Set it to what came in the vCPU's state."""
        return self._steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self._steps = steps

    def start(self, moment: Moment, *, fresh: bool) -> None:
        """Continue the program that the area holds; if there is none, begin, but only in a fresh guest."""
        if self._started:
            return
        self._started = True
        if self._header.magic == MAGIC and self._header.program == self._kind:
            return
        if not fresh:
            self._lost = "the program is not in RAM where it was"
            return
        page = self.memory.view(self._gpa, PAGE_SIZE)
        page[:] = 0
        self._header.program = self._kind
        self._steps = 0
        self.begin(moment)
        self._header.magic = MAGIC
        self.memory.mark(self._gpa, PAGE_SIZE)

    def begin(self, moment: Moment) -> None:
        """Initialise the program's memory; its state is all zeros already."""

    def step(self, moment: Moment) -> int:
        """Do up to 2 ms of work; return the guest time of the next step (an interrupt may bring it forward)."""
        raise NotImplementedError

    def advance(self, moment: Moment) -> int:
        """Take a step as the vCPU does: checked, counted, marked."""
        if self._lost is not None or self._header.halted:
            return NEVER
        if self._steps is None:
            self._steps = self._header.steps
        elif self._steps != self._header.steps:
            self.error(f"its state in RAM is of step {self._header.steps}, but {self._steps} steps were taken")
        try:
            return self.step(moment)
        except (ArithmeticError, LookupError, RequestError, TypeError, ValueError) as error:
            # Nonsense in RAM leads here, and a device or a machine that refuses what it must not.
            self.error(f"stopped by {type(error).__name__}: {error}")
            self._header.halted = 1
            return NEVER
        finally:
            self._header.steps += 1
            self._steps = self._header.steps
            self.memory.mark(self._gpa, PAGE_SIZE)

    def error(self, text: str) -> None:
        """Note that something is not as it must be; the first few texts are kept, all are counted."""
        if self._header.errors < MESSAGES:
            self._header.messages[self._header.errors].value = text.encode()[: MESSAGE_SIZE - 1]
        self._header.errors += 1

    def report(self) -> dict[str, object]:
        """Return name, counters and errors. Only the name until the state is known: RAM is not looked at."""
        if (not self._started and self._steps is None) or self._lost is not None:
            return {"name": self.name, "counters": {}, "errors": [self._lost] if self._lost else []}
        header = self._header
        shown = min(header.errors, MESSAGES)
        errors = [header.messages[index].value.decode(errors="replace") for index in range(shown)]
        if header.errors > shown:
            errors.append(f"and {header.errors - shown} more errors")
        counters = {"steps": header.steps, "errors": header.errors}
        counters |= {name: getattr(self.state, name) for name in self.COUNTERS}
        return {"name": self.name, "counters": counters, "errors": errors}
