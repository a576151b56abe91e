"""What devices wrote, and what was said of it: reports, mappings that come and go, logs that are armed again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from stage import Scenario, Stage, driven, places
from switchover.v1 import host_pb2

from common.machine.client import Changes, MappingChange
from common.memory.layout import PAGE_SIZE

pytestmark = pytest.mark.matrix

SLOW = "rate = 3000"  # bytes per second: two packets, so a buffer comes to its turn once in two minutes
SPARE = 32 << 20  # RAM that nobody uses
MOVING = "remap = 1"  # a buffer is unmapped and mapped elsewhere before each packet


def mapping_of(stage: Stage, request: int) -> MappingChange:
    """Return the mapping of the buffer that a request of the nic's driver uses."""
    buffers, _ = places("nic")
    page = buffers[request % len(buffers)]
    machine = stage.machine()
    with machine.ram(writable=False) as ram:
        # The page before the buffers holds their IOVAs.
        table = np.frombuffer(bytes(ram.view[(buffers[0] - 1) * PAGE_SIZE : buffers[0] * PAGE_SIZE]), "<u8")
    machine.close()
    return MappingChange(
        "default", int(table[request % len(buffers)]), PAGE_SIZE, page * PAGE_SIZE, readable=True, writable=True
    )


def last_finished(stage: Stage) -> MappingChange:
    return mapping_of(stage, stage.counter("driver0", "finished") - 1)


def next_finished(stage: Stage) -> MappingChange:
    return mapping_of(stage, stage.counter("driver0", "finished"))


@contextmanager
def beside(request: Callable[[], None], *, waits: bool) -> Iterator[None]:
    """Make a request that is answered, or that waits until the block has been left."""
    thread = threading.Thread(target=request)
    thread.start()
    thread.join(0.3 if waits else 20)
    assert thread.is_alive() == waits
    yield
    thread.join(20)
    assert not thread.is_alive()


class TestLastPageOfSlot(Scenario):
    """The last page of a memory slot is reported clean (firecracker #5705).

    Guard: a mapping reaches up to its end. An nvme's buffers are mappings of eight pages.
    """

    GUARD = "last-page-of-slot"
    MACHINE = driven("nvme")
    WRITER = "nvme0 wrote it "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        # After the second round: all that the driver has written since tracking began, long ago on a busy host, is
        # copied once more after the first one, and would hide what is lost.
        with stage.held("source.sync1") as at_the_sync:
            session = stage.begin(max_downtime_ms=0.001, max_rounds=2, on_timeout=host_pb2.ON_TIMEOUT_SWITCH_OVER)
            at_the_sync()
            stage.wait_for_more("driver0", "finished", 400)
        return stage.end(session)

    def pages(self) -> Callable[[int], bool]:
        buffers, ring = places("nvme")
        return lambda page: page in buffers[7::8] or page == ring[-1]


class TestReportBeforeData(Scenario):
    """A page is reported dirty before the data is in it, so it is copied too early (riscv-iommu #772).

    Guard: a device answers between two steps of its work, when all that it reports is in place.
    """

    GUARD = "report-before-data"
    MACHINE = driven("nic", SLOW, "remap = 0")
    WRITER = "nic0 wrote it 1 time, "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        with stage.held("source.precopy") as tracked, stage.held("source.switchover") as sent:
            session = stage.begin(max_downtime_ms=0.001, max_rounds=2, on_timeout=host_pb2.ON_TIMEOUT_SWITCH_OVER)
            tracked()
            in_the_middle = stage.in_the_middle_of_a_write("nic0")
            tracked.release()
            if guarded:
                time.sleep(0.3)
            else:
                sent()
            in_the_middle.release()
            sent()
            stage.wait_for_more("driver0", "finished", 1)
        return stage.end(session)

    def pages(self) -> Callable[[int], bool]:
        return places("nic")[0].__contains__


class TestUntrackedDevice(Scenario):
    """A device writes that nobody tracks, and the migration completes (Cloud Hypervisor #2505).

    Guard: unknown is dirty. Where no log covers what a device may write, that is all that is mapped writable.
    """

    GUARD = "untracked-device"
    MACHINE = driven(
        "nvme", 'faults = ["unlogged"]\ndevice_dirty_tracking = "off"\niommu_dirty_tracking = "off"\nmigration = "on"'
    )
    WRITER = "nvme0 wrote it "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
            at_the_sync()
            stage.wait_for_more("driver0", "finished", 100)
        result = stage.end(session)
        assert [tracking.method for tracking in result.dirty_tracking] == ["perpetual"]
        return result

    def pages(self) -> Callable[[int], bool]:
        buffers, ring = places("nvme")
        return lambda page: page in buffers or page in ring


class TestUnmapInPrecopy(Scenario):
    """An IOVA is unmapped, and its unreported dirty bits go with it (QEMU series patches 12 to 16).

    Guard: an unmap returns when what was written through the mapping is in the RAM bitmap.
    """

    GUARD = "unmap-in-precopy"
    MACHINE = driven("nic", "rate = 1000000", MOVING)
    WRITER = "nic0 wrote it "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
            at_the_sync()
            # All buffers are written and unmapped once; those in the ring then wait for a nic that stands still.
            stage.wait_for_more("driver0", "finished", 400)
            rung = stage.held("device.rung")
            rung()
        result = stage.end(session)
        rung.release()
        return result

    def pages(self) -> Callable[[int], bool]:
        return places("nic")[0].__contains__


class TestRemapSameIova(Scenario):
    """An IOVA leads elsewhere between the REPORT of its bit and the translation (Cloud Hypervisor #8567).

    Guard: REPORT and translation are one turn, and map and unmap wait for it.
    """

    GUARD = "remap-same-iova"
    MACHINE = driven("nic", driver="remap = 0")
    WRITER = "nic0 wrote it "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        machine = stage.machine()
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
            at_the_sync()
            stage.wait_for_more("driver0", "finished", 400)
            # The nic stands still from here on, and so does its driver when all that is finished is taken.
            rung = stage.held("device.rung")
            rung()
            stage.wait_for_steps(1)
            buffer = last_finished(stage)
            reported = stage.held("container.reported")
        reported()
        there_instead = replace(buffer, gpa=SPARE)
        with beside(lambda: machine.change_mappings(Changes((buffer,), (there_instead,))), waits=guarded):
            reported.release()
        result = stage.end(session)
        machine.close()
        stage.remap(there_instead, buffer)
        rung.release()
        return result

    def pages(self) -> Callable[[int], bool]:
        return places("nic")[0].__contains__


class TestMarkAfterUnmap(Scenario):
    """A device answers an unmap while a write is under way, and marks it when nobody asks for that IOVA any more.

    Guard: an unmap is answered between two steps. The guest's driver does not unmap what it has posted; a guest may.
    """

    GUARD = "mark-after-unmap"
    MACHINE = driven("nic", f"{SLOW}\nmigration_flags = 3", "remap = 0")
    WRITER = "nic0 wrote it 1 time, "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        machine = stage.machine()
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
            at_the_sync()
            in_the_middle = stage.in_the_middle_of_a_write("nic0")
            buffer = next_finished(stage)
            with beside(lambda: machine.change_mappings(Changes((buffer,), ())), waits=guarded):
                in_the_middle.release()
            stage.wait_for_more("driver0", "finished", 1)
        result = stage.end(session)
        machine.close()
        stage.remap(None, buffer)
        return result

    def pages(self) -> Callable[[int], bool]:
        return places("nic")[0].__contains__


class TestRearmWhileMapping(Scenario):
    """The guest maps so much that logs are armed again; what is written between STOP and START is in none of them.

    Guard: after the last START all that is mapped is dirty.
    """

    GUARD = "rearm-while-mapping"
    MACHINE = driven("nic", SLOW, "remap = 0", viommu='enabled = true\nstrategy = "mapped"')
    WRITER = "nic0 wrote it 1 time, "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        machine = stage.machine()
        disarmed = stage.held("container.disarmed")
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
            at_the_sync()
            # Outside of what is armed: dirty when it goes, and again at the sync, which is more than arming costs.
            much = MappingChange("default", 0x1000_0000, 16 << 20, SPARE, readable=True, writable=True)
            machine.change_mappings(Changes((), (much,)))
            machine.change_mappings(Changes((much,), (much,)))
        disarmed()
        stage.wait_for_more("driver0", "finished", 2)
        disarmed.release()
        result = stage.end(session)
        machine.close()
        stage.remap(much, None)
        return result

    def pages(self) -> Callable[[int], bool]:
        buffers, ring = places("nic")
        return lambda page: page in buffers or page in ring
