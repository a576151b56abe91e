"""Reading RAM back: the destination's half of the comparison.

Digests are taken of guest RAM itself, pages that nobody sent included: the digest of a payload would prove the payload
only. For a deferred verdict they must be complete before the machine runs, so chunks are read as soon as they have
settled, and in the blackout only those that were written again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from switchover.v1 import migration_pb2

from common.machine.device import Digest
from common.memory import runs
from common.memory.digest import DigestWorkers
from common.memory.layout import CHUNK_PAGES, CHUNK_SIZE
from common.memory.pages import Applier
from common.memory.ram import GuestRam

__all__ = ["Verifier", "compare_device", "compare_devices"]

SETTLE_SECONDS = 0.02
NEVER_READ = -1
CHUNKS_WITH_PAGES = 256


class Verifier:
    """Keeps a digest of each chunk, and knows which are out of date."""

    def __init__(self, ram: GuestRam, applier: Applier, *, early: bool) -> None:
        """Start to read settled chunks if `early`."""
        self._workers = DigestWorkers(ram)
        self._applier = applier
        start, _ = runs.cut_at_chunks(ram.data_runs())
        self._hole = np.ones(ram.size // CHUNK_SIZE, np.bool_)
        self._hole[start // CHUNK_PAGES] = False
        self._digests = np.zeros(ram.size // CHUNK_SIZE, np.uint64)
        self._read_generation = np.full(self._digests.size, NEVER_READ, np.int64)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._settler = threading.Thread(target=self._settle, name="settle", daemon=True)
        if early:
            self._settler.start()

    def _settle(self) -> None:
        before = self._generation()
        while not self._ended.wait(SETTLE_SECONDS):
            now = self._generation()
            with self._lock:
                # What is populated already is only waiting to be written; what is not costs nothing to read.
                self._read((now == before) & (now != self._read_generation) & ((now > 0) | self._hole))
            before = now

    def _generation(self) -> npt.NDArray[np.int64]:
        return self._applier.generation_of_chunk.astype(np.int64)

    def _read(self, wanted: npt.NDArray[np.bool_]) -> None:
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
        for first, last in edges.reshape(-1, 2).tolist():
            generation = self._generation()[first:last]
            self._digests[first:last] = self._workers.chunks(first, last)
            self._read_generation[first:last] = generation

    def wait_until_ready(self) -> None:
        """Return when RAM can be read without further delay."""
        self._workers.wait_until_ready()

    def complete(self) -> None:
        """Read every chunk that was written since it was read; nothing may be written from now on."""
        self._ended.set()
        with self._lock:
            self._read(self._generation() != self._read_generation)

    def read_all(self) -> None:
        """Read everything, whatever was read before; nothing may be written from now on."""
        self._ended.set()
        with self._lock:
            self._digests[:] = self._workers.chunks()

    def compare(self, theirs: bytes, *, pages: bool) -> list[migration_pb2.ChunkMismatch]:
        """Return the chunks that differ from the source's; raise ValueError if it sent no such digests.

        `pages`: with the digests of the pages of the first of them. A machine that runs already has changed its pages
        since, so they would tell nothing.
        """
        if len(theirs) != self._digests.nbytes:
            raise ValueError(f"{len(theirs)} bytes of digests for {self._digests.size} chunks")
        differ = np.flatnonzero(self._digests != np.frombuffer(theirs, "<u8")).tolist()
        told = differ[:CHUNKS_WITH_PAGES] if pages else []
        return [
            migration_pb2.ChunkMismatch(chunk=chunk, page_digests=self._workers.pages(chunk).tobytes())
            for chunk in told
        ] + [migration_pb2.ChunkMismatch(chunk=chunk) for chunk in differ[len(told) :]]

    def close(self) -> None:
        """End the worker processes."""
        self._ended.set()
        if self._settler.is_alive():
            self._settler.join()
        self._workers.close()


def compare_devices(
    ours: Mapping[str, Digest], theirs: Iterable[migration_pb2.DeviceDigest]
) -> tuple[list[migration_pb2.DeviceMismatch], list[str]]:
    """Return what differs, and the names of the devices that were read on both sides."""
    differing, compared = [], []
    for reading in theirs:
        own = ours.get(reading.name)
        if own is None:
            continue
        if own.compared and reading.compared:
            compared.append(reading.name)
        what = compare_device(own, reading)
        if what is not None:
            differing.append(migration_pb2.DeviceMismatch(name=reading.name, what=what))
    return differing, compared


def compare_device(ours: Digest, theirs: migration_pb2.DeviceDigest) -> str | None:
    """Return what differs between two readings of a device, of what was read on both sides; None if nothing does."""
    if theirs.config and ours.config != theirs.config:
        return "config space"
    if not (ours.compared and theirs.compared):
        return None
    if list(ours.bars) != list(theirs.bars):
        return "BARs"
    if ours.dump and theirs.dump and ours.dump != theirs.dump:
        return "state dump"
    return None
