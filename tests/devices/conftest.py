from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Captured conversations are read as in the tests of the protocol.
sys.path.insert(0, str(Path(__file__).parent.parent / "vfio_user"))

from device_rig import Memory, Rig


@pytest.fixture
def ram() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


@pytest.fixture
def rig(ram: Memory) -> Iterator[Callable[..., Rig]]:
    """Make devices: `rig(kind, memory=None, **knobs)`; they share one RAM unless told otherwise."""
    with contextlib.ExitStack() as stack:

        def make(kind: str, memory_: Memory | None = None, **knobs: Any) -> Rig:
            made = Rig(kind, memory_ or ram, knobs)
            stack.callback(made.close)
            return made

        yield make
