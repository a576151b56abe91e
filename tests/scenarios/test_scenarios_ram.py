"""Pages that get lost on their way, whoever wrote them: what to send, and until when."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import grpc
import pytest
from rig import assert_completed
from stage import GUEST_AREAS, RAM, Scenario, Stage, driven, places, traced
from switchover.v1 import host_pb2

from common.memory.layout import PAGE_SIZE
from common.rpc.errors import peer_error

pytestmark = pytest.mark.matrix

WRITER = """
[[guest]]
program = "clock"
[[guest]]
program = "writer"
pattern = "random"
rate = "5MB/s"
region = "16MiB"
"""
REGION = range((RAM - (16 << 20)) // PAGE_SIZE, RAM // PAGE_SIZE)
NOBODY = "no vCPU or device has written it since the migration began"


def of_the_writer(page: int) -> bool:
    return page in REGION or page in GUEST_AREAS


class TestMissedDirty(Scenario):
    """Pages were dirty, and their bits were missed (propolis #233).

    Guard: what the last sync of pre-copy took out of the logs exists nowhere else, and goes into the last round.
    """

    GUARD = "missed-dirty"
    MACHINE = traced(guest=WRITER)
    WRITER = "vcpu wrote it "
    COMPRESSION = host_pb2.COMPRESSION_OFF

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin(compression=self.COMPRESSION)
            at_the_sync()
            stage.wait_for_more("writer0", "pages", 400)
        return stage.end(session)

    def pages(self) -> Callable[[int], bool]:
        return of_the_writer


class TestMissedDirtyAuto(TestMissedDirty):
    """The same where the link and the cores decide how pages go."""

    COMPRESSION = host_pb2.COMPRESSION_AUTO


class TestMissedDirtyZstd(TestMissedDirty):
    """The same where pages are packed, and go as differences or not at all where the destination has them."""

    COMPRESSION = host_pb2.COMPRESSION_ZSTD


class TestSecondHop(Scenario):
    """A → B → C: the second hop offers only what was dirtied after the first (propolis #232).

    Guard: whoever sent RAM here, the next destination has nothing of it; round 0 is all of RAM.
    """

    GUARD = "second-hop"
    MACHINE = traced(guest=WRITER)
    WRITER = NOBODY

    def prepare(self, stage: Stage) -> None:
        stage.wait_for_more("writer0", "pages", 400)
        assert_completed(stage.end(stage.begin()))

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        return stage.end(stage.begin())

    def pages(self) -> Callable[[int], bool]:
        return of_the_writer


class TestFailedThenRetry(Scenario):
    """A migration fails, and what it has sent counts as sent when it is tried again (propolis #616, #682).

    Guard: an attempt begins with all of RAM, whatever an earlier one has sent.
    """

    GUARD = "failed-then-retry"
    MACHINE = traced(guest=WRITER)
    WRITER = NOBODY

    def prepare(self, stage: Stage) -> None:
        stage.wait_for_more("writer0", "pages", 400)
        with stage.held("source.switchover") as arrived:
            session = stage.begin()
            arrived()
            stage.here.stub.Cancel(host_pb2.CancelRequest(session_id=session), timeout=20)
        assert stage.end(session).result == "cancelled"

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        return stage.end(stage.begin())

    def pages(self) -> Callable[[int], bool]:
        return of_the_writer


class TestLateDma(Scenario):
    """A device writes after the last transfer (propolis #253).

    Guard: a device in STOP does nothing, whatever it was told to do before. What it writes all the same comes after all
    was compared, so only the second reading of the stopped RAM can show it.
    """

    GUARD = "late-dma"
    MACHINE = driven("nvme")
    WRITER = "nvme0"

    def unguarded(self, stage: Stage) -> AbstractContextManager[None]:
        return nullcontext()

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        with stage.held("source.switchover") as at_the_end, stage.held("source.handover") as compared:
            session = stage.begin()
            at_the_end()
            # The nvme knows of commands, and is about to carry them out.
            due = stage.held("device.due")
            due()
            at_the_end.release()
            compared()
            if guarded:
                due.release()
                time.sleep(0.2)
            else:
                # Not before, for the nvme at the destination stands still with the same commands.
                with stage.without(self.GUARD), stage.held("nvme0-dma-written") as written:
                    due.release()
                    written()
        return stage.end(session)

    def check_mismatches(self, result: host_pb2.MigrationResult, told: str) -> None:
        pages = [int(page) for page in re.findall(r"; nvme0 wrote page (\d+) \d+ ms after", result.error)]
        assert pages, told
        buffers, ring = places("nvme")
        assert all(page in buffers or page in ring for page in pages), told


class TestResumeGeneration(Scenario):
    """Memory is corrupt after suspend, resume and migrate (xen-api #7018).

    Guard: a machine that leaves is neither paused nor resumed by anybody else.
    """

    GUARD = "resume-generation"
    MACHINE = traced(guest=WRITER)
    WRITER = "vcpu"

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        stage.here.stub.Pause(host_pb2.PauseRequest(), timeout=20)
        with stage.held("source.handover") as compared:
            session = stage.begin()
            compared()
            if guarded:
                with pytest.raises(grpc.RpcError) as caught:
                    stage.here.stub.Resume(host_pb2.ResumeRequest(), timeout=20)
                assert peer_error(caught.value).reason == "MIGRATION_RUNS"
            else:
                stage.here.stub.Resume(host_pb2.ResumeRequest(), timeout=20)
                stage.wait_for_more("writer0", "pages", 100)
        return stage.end(session)

    def check_mismatches(self, result: host_pb2.MigrationResult, told: str) -> None:
        pages = [int(page) for page in re.findall(r"; vcpu wrote page (\d+) \d+ ms after", result.error)]
        assert pages, told
        assert all(of_the_writer(page) for page in pages), told
