"""What is read back from RAM and devices when all has arrived, and compared with what the source has.

Strict: in the blackout, after the devices have validated their state. Deferred: before the machine runs, RAM as it
arrives, devices while both ends write down who owns the machine; the source asks for the verdict when it runs here.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future

import grpc
from switchover.v1 import migration_pb2

from common.machine.client import MachineClient
from common.machine.device import DEFERRED_BYTES, Digest
from common.memory.pages import Applier
from common.memory.ram import GuestRam
from common.rpc.errors import RefusalError
from destination.refusal import bad
from destination.verifier import Verifier, compare_devices

__all__ = ["ReadBack"]

Verify = migration_pb2.VerifyMode


class ReadBack:
    """One arrival's: `before_loading`, then `after_loading`, then `compare`; `close` at any time."""

    def __init__(
        self, mode: Verify.ValueType, ram: GuestRam, applier: Applier, machine: MachineClient, pool: Executor
    ) -> None:
        self._mode = mode
        self._deferred = mode == Verify.VERIFY_MODE_DEFERRED
        self._machine = machine.another()  # the arrival's is needed to end a machine whose devices are being read
        self._pool = pool
        self._reading: Future[None] | None = None
        self._digests: Future[dict[str, Digest]] | None = None
        self._verifier: Verifier | None = None
        if mode != Verify.VERIFY_MODE_OFF:
            self._verifier = Verifier(ram, applier, early=self._deferred)

    @property
    def is_kept(self) -> bool:
        """Whether somebody may still ask for a comparison."""
        return self._verifier is not None

    def wait_until_ready(self) -> None:
        """Return when RAM can be read without further delay."""
        if self._verifier is not None:
            self._verifier.wait_until_ready()

    def before_loading(self) -> None:
        """RAM is whole."""
        verifier = self._verifier
        if self._deferred and verifier is not None:
            self._reading = self._pool.submit(verifier.complete)

    def after_loading(self) -> None:
        """The devices have their state."""
        verifier = self._verifier
        if verifier is None:
            return
        if not self._deferred:
            # Only now: what a device wrote as it validated its state is read too.
            self._reading = self._pool.submit(verifier.read_all)
        else:
            self._digests = self._pool.submit(self._machine.digests, DEFERRED_BYTES)

    def wait_until_read(self) -> None:
        """Return when the machine may run; raise what keeps it from being read, ClosedError or RequestError."""
        if self._digests is not None and self._reading is not None:
            self._digests.result()
            self._reading.result()

    def compare(self, request: migration_pb2.VerifyRequest) -> migration_pb2.VerifyResponse:
        """Return what differs from what the source has; `RefusalError` if nothing was read, or it sent no digests."""
        verifier, reading = self._verifier, self._reading
        if verifier is None or reading is None:
            why = "verification is off" if self._mode == Verify.VERIFY_MODE_OFF else "nothing has been read back"
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "NOT_READ", why)
        digests = self._machine.digests() if self._digests is None else self._digests.result()
        reading.result()
        try:
            mismatches = verifier.compare(request.chunk_digests, pages=not self._deferred)
        except ValueError as error:
            raise bad(str(error)) from error
        differing, compared = compare_devices(digests, request.devices)
        return migration_pb2.VerifyResponse(
            chunks=len(request.chunk_digests) // 8,
            mismatches=mismatches,
            devices=differing,
            compared_devices=compared,
        )

    def close(self) -> None:
        """Let go of RAM: a comparison that is under way fails, and there is none after this."""
        verifier, self._verifier = self._verifier, None
        self._machine.close()
        if verifier is not None:
            verifier.close()
