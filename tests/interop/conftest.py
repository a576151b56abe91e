from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The peers meet the daemons of the journeys.
sys.path.insert(0, str(Path(__file__).parent.parent / "journeys"))

from rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()
