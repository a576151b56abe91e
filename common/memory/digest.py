"""Digests of guest RAM, computed by processes of their own that map it.

A digest is xxh3_64 of a 2 MiB chunk, or of a page where a chunk differs: one call for each chunk runs at the speed of
memory, one for each page at a quarter of it. Holes are hashed as the zeros that they are, without being read. The loops
of page hashes run here, in workers, because beside them a daemon's interpreter would keep everybody else waiting.

A worker is `python -m common.memory.digest RAM_FD SOCKET_FD`; it ends when the other end of its socket is closed, so it
never outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import xxhash

from common.ipc.channel import Client, ClosedError, Message, serve
from common.memory import runs
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE
from common.memory.ram import GuestRam

__all__ = ["ZERO_CHUNK", "ZERO_PAGE", "DigestWorkers", "balance", "chunk_digests", "page_digests"]

Digests = npt.NDArray[np.uint64]
_ZEROS = memoryview(bytes(CHUNK_SIZE))
ZERO_CHUNK: int = xxhash.xxh3_64_intdigest(_ZEROS)
ZERO_PAGE: int = xxhash.xxh3_64_intdigest(_ZEROS[:PAGE_SIZE])


def chunk_digests(ram: GuestRam, first: int, last: int) -> Digests:
    """Return the digests of chunks `first` up to and without `last`; holes are not read."""
    digests = np.full(last - first, ZERO_CHUNK, np.uint64)
    within = runs.one(first * CHUNK_PAGES, (last - first) * CHUNK_PAGES)
    start, count = runs.cut_at_chunks(ram.data_runs(within))
    chunk = start // CHUNK_PAGES
    whole = count == CHUNK_PAGES
    for number in chunk[whole].tolist():
        offset = number * CHUNK_SIZE
        digests[number - first] = xxhash.xxh3_64_intdigest(ram.view[offset : offset + CHUNK_SIZE])
    # The other chunks: the runs of data in each, and zeros between them.
    start, count, chunk = start[~whole], count[~whole], chunk[~whole]
    bounds = [*np.flatnonzero(np.diff(chunk, prepend=-1)).tolist(), chunk.size]
    starts, ends = (start * PAGE_SIZE).tolist(), ((start + count) * PAGE_SIZE).tolist()
    for low, high in itertools.pairwise(bounds):
        number = int(chunk[low])
        position, end_of_chunk = number * CHUNK_SIZE, (number + 1) * CHUNK_SIZE
        digest = xxhash.xxh3_64()
        for data, end in zip(starts[low:high], ends[low:high], strict=True):
            digest.update(_ZEROS[: data - position])
            digest.update(ram.view[data:end])
            position = end
        digest.update(_ZEROS[: end_of_chunk - position])
        digests[number - first] = digest.intdigest()
    return digests


def page_digests(ram: GuestRam, chunk: int) -> Digests:
    """Return the digests of the 512 pages of a chunk; holes are not read."""
    digests = np.full(CHUNK_PAGES, ZERO_PAGE, np.uint64)
    base = chunk * CHUNK_PAGES
    for page in runs.expand(ram.data_runs(runs.one(base, CHUNK_PAGES))).tolist():
        digests[page - base] = xxhash.xxh3_64_intdigest(ram.view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
    return digests


def balance(weights: npt.NDArray[np.int64], parts: int) -> list[tuple[int, int]]:
    """Cut a sequence of weights into at most `parts` contiguous [first, last) of about the same weight, none empty."""
    reached = np.cumsum(weights)
    targets = reached[-1] * np.arange(1, parts) // parts if weights.size else np.empty(0, np.int64)
    cuts = [0, *np.searchsorted(reached, targets, "right").tolist(), weights.size]
    return [(first, last) for first, last in itertools.pairwise(cuts) if first < last]


class DigestWorkers:
    """Processes that hash RAM; calls from several threads share them in turn.

    They are started at once and are ready a moment later. A worker that dies ends the call with `ClosedError`.
    """

    def __init__(self, ram: GuestRam, workers: int = 1) -> None:
        self._ram = ram
        self._chunks = ram.layout.pages // CHUNK_PAGES
        self._processes: list[subprocess.Popen[bytes]] = []
        self._clients: list[Client] = []
        self._threads = ThreadPoolExecutor(workers, "digest")
        try:
            for _ in range(workers):
                self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._clients.append(Client(ours))
        with theirs:
            # -P: no module of the working directory is taken for one of ours.
            command = [sys.executable, "-P", "-m", "common.memory.digest", str(self._ram.fd), str(theirs.fileno())]
            fds = (self._ram.fd, theirs.fileno())
            self._processes.append(subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL))

    def wait_until_ready(self) -> None:
        """Return when all of them answer: whoever asks while a machine stands still must not wait for their start."""
        list(self._threads.map(lambda client: client.call("chunks", first=0, last=0), self._clients))

    def chunks(self, first: int = 0, last: int | None = None) -> Digests:
        """Return the digests of chunks `first` up to and without `last` (None: to the end of RAM).

        `ValueError` if they are not all in RAM.
        """
        last = self._chunks if last is None else last
        if not 0 <= first <= last <= self._chunks:
            raise ValueError(f"chunks {first} to {last} are not all among {self._chunks}")
        within = runs.one(first * CHUNK_PAGES, (last - first) * CHUNK_PAGES)
        start, count = runs.cut_at_chunks(self._ram.data_runs(within))
        # What is no data costs next to nothing; it is counted at all so that a sparse RAM is shared out as well.
        weights = np.ones(last - first, np.int64)
        np.add.at(weights, start // CHUNK_PAGES - first, count)
        parts = balance(weights, len(self._clients))
        answers = self._threads.map(
            lambda client, part: client.call("chunks", first=first + part[0], last=first + part[1]),
            self._clients,
            parts,
        )
        return np.concatenate([np.empty(0, np.uint64), *(np.frombuffer(answer.payload, "<u8") for answer in answers)])

    def pages(self, chunk: int) -> Digests:
        """Return the digests of a chunk's 512 pages; `ValueError` if it is not in RAM."""
        if not 0 <= chunk < self._chunks:
            raise ValueError(f"chunk {chunk} is not among {self._chunks}")
        return np.frombuffer(self._clients[0].call("pages", chunk=chunk).payload, "<u8").astype(np.uint64)

    def close(self) -> None:
        """End the workers; a call that waits ends with `ClosedError`."""
        for client in self._clients:
            client.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _work(ram: GuestRam, sock: socket.socket) -> None:
    """Answer until the other side goes."""

    def chunks(request: Message) -> Message:
        return Message(payload=chunk_digests(ram, int(request["first"]), int(request["last"])).astype("<u8").tobytes())

    def pages(request: Message) -> Message:
        return Message(payload=page_digests(ram, int(request["chunk"])).astype("<u8").tobytes())

    with contextlib.suppress(ClosedError):
        serve(sock, {"chunks": chunks, "pages": pages})


if __name__ == "__main__":
    # Ctrl-C is for whoever started us; we end when our socket does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work(GuestRam.attach(int(sys.argv[1]), writable=False), socket.socket(fileno=int(sys.argv[2])))
