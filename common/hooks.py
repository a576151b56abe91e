"""Points at which a test may hold a real process still.

A race is shown by stopping a process exactly there, not by luck. With SWITCHOVER_HOOKS set to a directory,
`reach(name)` waits as long as the file `name` stands in it, and says that it has arrived by creating `name.reached`.
Without the variable it costs a comparison.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["reach"]

_DIRECTORY = Path(os.environ["SWITCHOVER_HOOKS"]) if "SWITCHOVER_HOOKS" in os.environ else None


def reach(name: str) -> None:
    """Arrive at a point; return when no test holds it."""
    if _DIRECTORY is None or not (_DIRECTORY / name).exists():
        return
    (_DIRECTORY / f"{name}.reached").touch()
    while (_DIRECTORY / name).exists():
        time.sleep(0.002)
