"""A process that serves a device, with whatever it starts: its end, and its last words."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["ServerProcess"]

_GRACE: Final = 2.0  # seconds between SIGTERM and SIGKILL
_UNDER_WAY: Final = 1.0  # seconds in which what an ended server has said is read; who has left its group may say more
_TAIL: Final = 4096  # bytes of its output that are kept
_WORDS: Final = 200  # characters of a line that are told


class ServerProcess:
    """A server in a process group of its own, which is ended as a whole.

    Nobody but `stop` reaps it: until then neither its number nor its group's can be anybody else's. Whoever leaves the
    group is not reached.
    """

    def __init__(self, command: Sequence[str], before_exec: Callable[[], None] | None = None) -> None:
        """Start it; OSError if that cannot be done. `before_exec` is called in the new process."""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=before_exec,
            )
        except subprocess.SubprocessError as error:  # it has died before it was the command
            raise OSError(errno.ECHILD, str(error)) from error
        self.pid = self._process.pid
        self._output = b""
        self._status = 0
        self._ended = threading.Event()
        self._attending = threading.Lock()  # taken by whoever begins to
        self._waiter = threading.Thread(target=self._await_end, daemon=True)
        self._reader = threading.Thread(target=self._keep_output, daemon=True)

    def attend(self) -> None:
        """Begin to read what it says and to wait for its end; whatever else is asked of it does so too.

        To be done soon, for it may have much to say, but not before all those are started that have a `before_exec`: a
        process with threads is none to fork from.
        """
        if self._attending.acquire(blocking=False):
            self._waiter.start()
            self._reader.start()

    def _await_end(self) -> None:
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        self._status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        self._ended.set()

    def _keep_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            while data := os.read(pipe.fileno(), 65536):
                self._output = (self._output + data)[-_TAIL:]

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for its end, for so long at most; return its status, -N if signal N ended it, None if it lives."""
        self.attend()
        return self._status if self._ended.wait(seconds) else None

    def last_words(self) -> str:
        """Return the last line that it has said before its end, which `wait` has seen; empty if it said nothing."""
        self._reader.join(_UNDER_WAY)
        return self._output.decode(errors="replace").strip().rpartition("\n")[2].strip()[:_WORDS]

    def stop(self) -> None:
        """End it, and all that is left of its group, also where it has ended itself already."""
        if self._process.returncode is not None:
            return
        self.attend()
        self._signal(signal.SIGTERM)
        self.wait(_GRACE)
        self._signal(signal.SIGKILL)
        self._waiter.join()
        self._process.wait()
        self._reader.join(_UNDER_WAY)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
