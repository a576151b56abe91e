"""Points at which a test may hold a real process still, and guards that it may switch off.

A race is shown by stopping a process exactly there, not by luck. With SWITCHOVER_HOOKS set to a directory,
`reach(name)` waits as long as the file `name` stands in it, and says that it has arrived by creating `name.reached`.
What a guard is good for is shown by taking it away: `guarded(name)` is False while the file `name.off` stands there
(tests/scenarios). A call that fails once is `fails(name)`: True for whoever comes first after `name.fails` was made.
Without the variable each costs a comparison, with it a look at the file system, thousands of times a second in a
device.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["fails", "guarded", "reach"]

_DIRECTORY = os.environ.get("SWITCHOVER_HOOKS")


def fails(name: str) -> bool:
    """Return whether a test wants this call to fail, which is told once."""
    if _DIRECTORY is None:
        return False
    try:
        os.unlink(f"{_DIRECTORY}/{name}.fails")
    except FileNotFoundError:
        return False
    return True


def guarded(name: str) -> bool:
    """Return whether a guard is in place, as it always is unless a test has taken it away."""
    return _DIRECTORY is None or not os.path.exists(f"{_DIRECTORY}/{name}.off")


def reach(name: str) -> None:
    """Arrive at a point; return when no test holds it."""
    if _DIRECTORY is None or not os.path.exists(held := f"{_DIRECTORY}/{name}"):
        return
    Path(f"{held}.reached").touch()
    while os.path.exists(held):
        time.sleep(0.002)
