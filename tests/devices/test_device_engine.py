"""The eventfds that an engine watches for others."""

from __future__ import annotations

import os
import threading

from common.devices.engine import Engine


def test_a_number_that_was_another_eventfds_is_not_taken_for_it() -> None:
    engine = Engine("nic0", lambda _: None)
    called, stale = threading.Event(), threading.Event()
    engine.start()
    first = os.eventfd(0)
    with engine.watching:
        engine.watch(first, stale.set)
        os.eventfd_write(first, 1)
        # The engine finds it ready, and waits for us. That cannot be seen, so it gets time for it.
        threading.Event().wait(0.5)
        engine.unwatch(first)
        another = os.eventfd(0, os.EFD_NONBLOCK)
        second = os.dup2(another, first)
        os.close(another)
        engine.watch(second, called.set)
    assert not called.wait(0.1) and not stale.is_set()
    os.eventfd_write(second, 1)
    assert called.wait(10)
    engine.close()
    os.close(second)
