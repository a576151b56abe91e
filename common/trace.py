"""Trace points: what QEMU traces of a VFIO migration, under QEMU's names, as debug events of the log.

SWITCHOVER_TRACE=1 in the environment of a daemon switches them on for it and for the machine processes that it starts,
which write theirs to `machine.log` in the machine's directory.
"""

from __future__ import annotations

import logging
import os
from typing import Final

__all__ = ["LOG_LEVEL"]

LOG_LEVEL: Final = logging.DEBUG if os.environ.get("SWITCHOVER_TRACE") == "1" else logging.INFO
"""The least level that is logged."""
