from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent

# The soak moves machines as the journeys do, and breaks what the fault matrix breaks.
sys.path[:0] = [str(TESTS / "journeys"), str(TESTS / "faults")]
