from __future__ import annotations

import errno

import numpy as np
import pytest

from common.guest.memory import GuestMemory
from common.memory import runs
from common.memory.ram import GuestRam


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(GuestRam.create(2 << 20))


def logged(memory: GuestMemory) -> list[int]:
    return runs.expand(memory.take_log().runs()).tolist()


def test_a_write_is_read_back_and_marked(memory: GuestMemory) -> None:
    memory.start_log()
    memory.write(0x1FFF, b"ab")
    assert memory.read(0x1FFF, 2) == b"ab"
    assert logged(memory) == [1, 2]


def test_taking_the_log_clears_it(memory: GuestMemory) -> None:
    memory.start_log()
    memory.mark(0, 1)
    memory.mark_pages(np.array([5, 511, 5]))
    assert logged(memory) == [0, 5, 511]
    assert logged(memory) == []


def test_nothing_is_logged_before_the_start_and_after_the_stop(memory: GuestMemory) -> None:
    memory.mark(0, 4096)
    memory.start_log()
    assert logged(memory) == []
    memory.mark(0, 4096)
    memory.stop_log()
    memory.stop_log()
    memory.start_log()
    assert logged(memory) == []


def test_the_log_is_refused_when_it_is_off_and_a_second_start_when_it_is_on(memory: GuestMemory) -> None:
    with pytest.raises(OSError) as off:
        memory.take_log()
    memory.start_log()
    memory.mark(0, 1)
    with pytest.raises(OSError) as on:
        memory.start_log()
    assert off.value.errno == on.value.errno == errno.EINVAL
    assert logged(memory) == [0]


def test_outside_ram_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(ValueError):
        memory.view((2 << 20) - 4, 8)
