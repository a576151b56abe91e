from __future__ import annotations

import os
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


def theirs(variable: str, what: str, name: str = "") -> Path:
    """Return what an environment variable names, or `name` in that directory; skip the test without."""
    if variable not in os.environ:
        pytest.skip(f"set {variable} to {what}")
    path = Path(os.environ[variable]).absolute() / name
    if not os.access(path, os.X_OK):
        pytest.skip(f"{variable}: {path} is no program")
    return path


def sample(name: str) -> Path:
    return theirs("SWITCHOVER_LIBVFIO_USER", "the directory of libvfio-user's built samples", name)


@pytest.fixture
def sample_server() -> Path:
    """libvfio-user's sample server."""
    return sample("server")


@pytest.fixture
def sample_client() -> Path:
    """libvfio-user's sample client."""
    return sample("client")


@pytest.fixture
def qemu() -> Path:
    """QEMU from 10.1 on."""
    return theirs("SWITCHOVER_QEMU", "qemu-system-x86_64, 10.1 or newer")
