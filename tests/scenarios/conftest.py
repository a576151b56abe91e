from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# Scenarios are played with the daemons of the journeys.
sys.path.insert(0, str(Path(__file__).parent.parent / "journeys"))

from stage import Stage


@pytest.fixture(scope="session")
def image() -> Path:
    """Real files to fill RAM with."""
    return Path(np.__file__).parent


@pytest.fixture(scope="class")
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Two hosts and the machine of a class of tests."""
    stage = Stage(request.cls.MACHINE)
    try:
        yield stage
    finally:
        stage.close()
