from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Faults strike the daemons of the journeys.
sys.path.insert(0, str(Path(__file__).parent.parent / "journeys"))

from cells import SEED
from rig import Rig


def pytest_report_header() -> str:
    return f"faults: SEED={SEED}"


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()
