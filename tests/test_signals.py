"""A signal that another thread gets ends a program that waits."""

from __future__ import annotations

import os
import select
import signal
import threading

from common.signals import ending_signals


def test_whichever_thread_gets_it_the_main_one_is_woken() -> None:
    before = signal.getsignal(signal.SIGTERM)
    hold, held = threading.Event(), threading.Event()

    def get_it() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        held.set()
        hold.wait()

    with ending_signals() as told:
        assert not select.select([told], (), (), 0)[0]
        thread = threading.Thread(target=get_it)
        thread.start()
        assert os.read(told, 1)
        assert held.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        assert os.read(told, 1)
        hold.set()
        thread.join()
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1
