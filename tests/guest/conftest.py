from __future__ import annotations

from collections.abc import Iterator

import fake_machine
import pytest


@pytest.fixture(autouse=True)
def _close_machines() -> Iterator[None]:
    yield
    while fake_machine.machines:
        fake_machine.machines.pop().close()
