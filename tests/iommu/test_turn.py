from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from dma_devices import beside, finish, until

from common.iommu import turn as turn_module
from common.iommu.turn import Turn


def test_whoever_asks_first_goes_first():
    """With `threading.Lock` in place of the gates the holder, who asks again at once, overtakes those who wait."""
    turn, order = Turn(), []

    def take(name):
        with turn:
            order.append(name)

    waiting = []
    with turn:
        for n in range(3):
            waiting.append(beside(lambda n=n: take(n)))
            until(lambda n=n: turn.waiting == n + 1)
    take("holder")
    finish(*waiting)
    assert order == [0, 1, 2, "holder"]


def test_one_at_a_time():
    turn, inside, worst = Turn(), [], []

    def work():
        for _ in range(300):
            with turn:
                inside.append(1)
                worst.append(len(inside))
                inside.pop()

    finish(*[beside(work) for _ in range(4)])
    assert max(worst) == 1 and len(worst) == 1200


def test_twice_by_one_thread_is_an_error_not_a_deadlock():
    turn = Turn()
    with turn, pytest.raises(RuntimeError), turn:
        pass
    with turn:
        pass


def test_is_free_again_after_an_error():
    turn = Turn()
    with pytest.raises(KeyError), turn:
        raise KeyError
    with turn:
        pass


@pytest.mark.parametrize("granted", [False, True])
def test_an_interrupted_waiter_leaves_or_passes_on(granted, monkeypatch):
    """A signal handler may raise while a thread waits, before or just after it was granted the turn."""
    turn = Turn()

    class Gate:
        """A lock that is interrupted when it is waited for."""

        held = False

        def acquire(self):
            if self.held:
                if granted:
                    turn._pass_on()
                raise KeyboardInterrupt
            self.held = True

        def release(self):
            pass

    monkeypatch.setattr(turn_module, "threading", SimpleNamespace(Lock=Gate, get_ident=threading.get_ident))
    turn._owner = -1  # another thread
    with pytest.raises(KeyboardInterrupt), turn:
        pass
    assert turn.waiting == 0
    if not granted:
        turn._pass_on()
    with turn:
        pass
