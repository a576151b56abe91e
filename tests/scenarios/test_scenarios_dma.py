"""What devices wrote, and what was said of it: reports, mappings that come and go, logs that are armed again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from stage import Scenario, Stage, driven, places
from switchover.v1 import host_pb2

from common.datasheets import nic
from common.datasheets.pci import RING_HEADER
from common.guest.programs.driver_nic import RING_ENTRIES
from common.machine.client import Changes, MappingChange
from common.memory.layout import PAGE_SIZE

SLOW = "rate = 3000"  # bytes per second: two packets, so a buffer comes to its turn once in two minutes
MOVING = "remap = 1"  # a buffer is unmapped and mapped elsewhere before each packet


class TestLastPageOfSlot(Scenario):
    """The last page of a memory slot is reported clean (firecracker #5705).

    Guard: a mapping reaches up to its end. An nvme's buffers are mappings of eight pages.
    """

    GUARD = "last-page-of-slot"
    MACHINE = driven("nvme")
    WRITER = "nvme0 wrote it "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
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

    Guard: a method must cover every device of a container; where none does, all that is mapped is dirty.
    """

    GUARD = "untracked-device"
    MACHINE = driven("nvme", 'faults = ["unlogged"]\ndevice_dirty_tracking = "off"\niommu_dirty_tracking = "off"')
    WRITER = "nvme0 wrote it "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
            at_the_sync()
            stage.wait_for_more("driver0", "finished", 100)
        result = stage.end(session)
        assert [tracking.method for tracking in result.dirty_tracking] == ["perpetual" if guarded else "device"]
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
    """The guest moves a buffer to another IOVA between the REPORT of a bit and its translation.

    Guard: REPORT and translation are one turn, and an unmap waits for it (Cloud Hypervisor #8567).
    """

    GUARD = "remap-same-iova"
    MACHINE = driven("nic", "", MOVING)
    WRITER = "nic0 wrote it "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        at_the_sync = stage.held("source.sync0")
        session = stage.begin()
        at_the_sync()
        stage.wait_for_more("driver0", "finished", 400)
        # The guest is about to unmap a buffer that was written in this round; the nic fills what is posted, and waits.
        unmapping = stage.held("machine.unmap")
        unmapping()
        time.sleep(0.2)
        reported = stage.held("container.reported")
        at_the_sync.release()
        reported()
        mapping = stage.held("machine.map")
        unmapping.release()
        if guarded:
            time.sleep(0.2)
        else:
            mapping()
        reported.release()
        mapping()
        # It is mapped elsewhere now, and posted, but the nic does not come to look.
        rung = stage.held("device.rung")
        mapping.release()
        result = stage.end(session)
        rung.release()
        return result

    def pages(self) -> Callable[[int], bool]:
        return places("nic")[0].__contains__


class TestMarkAfterUnmap(Scenario):
    """A device answers an unmap while a write is under way, and marks it when nobody asks for that IOVA any more.

    Guard: an unmap is answered between two steps. The guest's driver does not unmap what it has posted; a guest may.
    """

    GUARD = "mark-after-unmap"
    MACHINE = driven("nic", SLOW, "remap = 0")
    WRITER = "nic0 wrote it 1 time, "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        machine = stage.machine()
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
            at_the_sync()
            in_the_middle = stage.in_the_middle_of_a_write("nic0")
            buffer = self.being_written(stage)
            unmap = threading.Thread(target=machine.change_mappings, args=(Changes((buffer,), ()),))
            unmap.start()
            unmap.join(0.3 if guarded else 20)
            assert unmap.is_alive() == guarded
            in_the_middle.release()
            unmap.join()
            stage.wait_for_more("driver0", "finished", 1)
        machine.close()
        result = stage.end(session)
        with_buffer = stage.machine()
        with_buffer.change_mappings(Changes((), (buffer,)))
        with_buffer.close()
        return result

    def being_written(self, stage: Stage) -> MappingChange:
        """Return the mapping of the buffer of the first entry in the ring that is not finished."""
        buffers, ring = places("nic")
        number = stage.counter("driver0", "finished")
        machine = stage.machine()
        with machine.ram(writable=False) as ram:
            start = ring[0] * PAGE_SIZE + RING_HEADER
            entries = np.frombuffer(bytes(ram.view[start : (ring[-1] + 1) * PAGE_SIZE]), np.uint8)
            table = entries[: len(entries) // nic.ENTRY.itemsize * nic.ENTRY.itemsize].view(nic.ENTRY)
            while table["done"][number % RING_ENTRIES]:
                number += 1
            iova = int(table["iova"][number % RING_ENTRIES])
        machine.close()
        gpa = buffers[number % len(buffers)] * PAGE_SIZE
        return MappingChange("default", iova, PAGE_SIZE, gpa, readable=True, writable=True)

    def pages(self) -> Callable[[int], bool]:
        return places("nic")[0].__contains__


class TestRearmWhileMapping(Scenario):
    """Logs are armed again, and what was written between STOP and START is in none of them.

    Guard: after the last START all that is mapped is dirty; what goes in between is dirty when it goes.
    """

    GUARD = "rearm-while-mapping"
    MACHINE = driven("nic", "rate = 2000000", MOVING, viommu='enabled = true\nstrategy = "mapped"')
    WRITER = "nic0 wrote it "

    def play(self, stage: Stage, *, guarded: bool) -> host_pb2.MigrationResult:
        disarmed = stage.held("container.disarmed")
        with stage.held("source.sync0") as at_the_sync:
            session = stage.begin()
            at_the_sync()
            # The mappings leave the armed ranges; collecting them whole costs more and more, until arming again pays.
            stage.wait_for_more("driver0", "finished", 1500)
        disarmed()
        stage.wait_for_more("driver0", "finished", 400)
        rung = stage.held("device.rung")
        rung()
        disarmed.release()
        result = stage.end(session)
        rung.release()
        return result

    def pages(self) -> Callable[[int], bool]:
        buffers, ring = places("nic")
        return lambda page: page in buffers or page in ring
