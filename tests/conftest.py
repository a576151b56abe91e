from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does: that is not what these tests are about.
settings.register_profile("switchover", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("switchover")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a short name, whatever the test is called: the path of a socket has 107 bytes at most."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(autouse=True)
def logs_of_this_test() -> Iterator[None]:
    """Forget how a test has set up the logs: they would go to its output, which is closed when it has ended."""
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def signals_of_this_test() -> Iterator[None]:
    """Put back what a command that ran here has made of signals: what is ignored, processes begun later ignore."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
