from __future__ import annotations

import sys
from pathlib import Path

# The peers cheat daemons of the journeys.
sys.path.insert(0, str(Path(__file__).parent.parent / "journeys"))
