"""Reading what has stopped: the source's half of the comparison.

All of RAM is read, whatever any log has said of it, and read once more when the machine runs at the destination: what
was written in between was written by somebody who should have stood still.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future

from switchover.v1 import host_pb2, migration_pb2

from common.machine.client import MachineClient
from common.memory.digest import DigestWorkers
from common.memory.layout import CHUNK_PAGES
from common.memory.ram import GuestRam
from source import verdict
from source.history import History
from source.verdict import Digests

__all__ = ["Verifier"]


class Verifier:
    """Reads the stopped machine and judges what the destination says of it; failures are `DataLossError`."""

    def __init__(self, ram: GuestRam, machine: MachineClient, pool: Executor) -> None:
        """Start the processes that read RAM; everything slow beside that is done in `pool`."""
        self._layout = ram.layout
        self._machine = machine
        self._pool = pool
        self._workers = DigestWorkers(ram)
        self._reading: Future[Digests] | None = None

    def start_reading(self) -> None:
        """Start to read RAM, which has stopped, or is about to be written for the last time by what is read too."""
        self._reading = self._pool.submit(self._workers.chunks)

    def read(self, session_id: str, most_of_device: int | None) -> migration_pb2.VerifyRequest:
        """Return what RAM and devices hold, when all of it is read, of each device at most so many bytes."""
        digests = self._machine.digests(most_of_device)
        return migration_pb2.VerifyRequest(
            session_id=session_id,
            devices=[verdict.device_digest(name, digest) for name, digest in digests.items()],
            chunk_digests=self._read_ram().tobytes(),
        )

    def _read_ram(self) -> Digests:
        assert self._reading is not None
        return self._reading.result()

    def judge(self, response: migration_pb2.VerifyResponse, history: History, result: host_pb2.MigrationResult) -> None:
        """Note in the result what was compared, and who could have written what differs."""
        chunks = self._layout.pages // CHUNK_PAGES
        if response.chunks != chunks:
            raise verdict.DataLossError(f"the destination has compared {response.chunks} chunks of {chunks}")
        verdict.judge_memory(
            response.mismatches, self._workers.pages, self._layout, history, self._machine.explain, result
        )
        verdict.judge_devices(response, result)

    def check_unchanged(self) -> None:
        """Read RAM once more: it must be as it was."""
        verdict.check_unchanged(self._read_ram(), self._workers.chunks(), self._machine.late_writes)

    def close(self) -> None:
        """End the processes."""
        self._workers.close()
