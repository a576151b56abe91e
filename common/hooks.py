"""Points at which a test may hold a real process still, and guards that it may switch off.

A race is shown by stopping a process exactly there, not by luck. With SWITCHOVER_HOOKS set to a directory,
`reach(name)` waits as long as the file `name` stands in it, and says that it has arrived by creating `name.reached`.
What a guard is good for is shown by taking it away: `guarded(name)` is False while the file `name.off` stands there
(tests/scenarios). A call that fails once is `fails(name)`: True for whoever comes first after `name.fails` was made.
Without the variable each costs a comparison.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["fails", "guarded", "reach"]

_DIRECTORY = Path(os.environ["SWITCHOVER_HOOKS"]) if "SWITCHOVER_HOOKS" in os.environ else None


def fails(name: str) -> bool:
    """Return whether a test wants this call to fail, which is told once."""
    if _DIRECTORY is None:
        return False
    try:
        (_DIRECTORY / f"{name}.fails").unlink()
    except FileNotFoundError:
        return False
    return True


def guarded(name: str) -> bool:
    """Return whether a guard is in place, as it always is unless a test has taken it away."""
    return _DIRECTORY is None or not (_DIRECTORY / f"{name}.off").exists()


def reach(name: str) -> None:
    """Arrive at a point; return when no test holds it."""
    if _DIRECTORY is None or not (_DIRECTORY / name).exists():
        return
    (_DIRECTORY / f"{name}.reached").touch()
    while (_DIRECTORY / name).exists():
        time.sleep(0.002)
