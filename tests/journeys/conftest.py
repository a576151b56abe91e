from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope="session")
def image() -> Path:
    """Real files to fill RAM with: the library that computes on it."""
    return Path(np.__file__).parent
