"""DMA that a device does, and whether its log knows of it: every page that changed has to be reported."""

from __future__ import annotations

import time
from collections.abc import Iterable

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import Device, listed, pages_of, parsed
from common.conformance.exercise import Exerciser
from common.conformance.lab import Lab
from common.conformance.memory import AREA, FIRST, PAGE, SECOND
from common.conformance.probe import name_of_error
from common.vfio import feature as vfio
from common.vfio.feature import DeviceFeature, LoggingReport
from common.vfio.migration import DeviceState
from common.vfio_user.codec import FEATURE_SIZE, UNMAP_GET_DIRTY_BITMAP, Command, DmaUnmap, Feature

_STILL = 0.3  # seconds for which a stopped device is watched


def _started(lab: Lab) -> tuple[Device, Exerciser]:
    device = lab.device()
    device.need_logging()
    exerciser = lab.exerciser(device, lab.memory())
    device.start_logging()
    return device, exerciser


def _worked(exerciser: Exerciser) -> set[int]:
    """Make the device write, and insist that it wrote."""
    exerciser.memory.remember()
    return _wrote(exerciser.work())


def _wrote(pages: set[int]) -> set[int]:
    if not pages:
        raise Unknown("the device did its work without writing to memory directly")
    return pages


def _in_second(pages: set[int]) -> set[int]:
    return _wrote({page for page in pages if page >= SECOND})


def _reported(device: Device) -> set[int]:
    """Return what is reported for both areas, mapping by mapping."""
    return device.report(FIRST, AREA) | device.report(SECOND, AREA)


def _insist(written: Iterable[int], reported: set[int], page_size: int = PAGE) -> None:
    missing = sorted({page & -page_size for page in written} - reported)
    if missing:
        raise Failure(f"written, and not reported: {listed(missing)}")


@check("Every page that a device has written since the log started is reported, and is then reported no more.")
def logged(lab: Lab) -> str:
    """Have it write twice, and compare memory with the reports."""
    device, exerciser = _started(lab)
    for _ in range(2):
        written = _worked(exerciser)
        reported = _reported(device)
        _insist(written, reported)
        if again := _reported(device):
            raise Failure(f"reported once more: {listed(sorted(again))}")
        exerciser.memory.fill()
    return f"{len(written)} pages written, {len(reported)} reported"


@check("A report of part of a mapping takes the bits of that part, and leaves the others to a later report.")
def parts(lab: Lab) -> str:
    """Report the first page that was written, then the whole."""
    device, exerciser = _started(lab)
    written = _worked(exerciser)
    first = min(_in_second(written))
    part, error = device.try_report(SECOND, first - SECOND + PAGE)
    if error:
        raise Unknown(f"reports of parts are refused: {name_of_error(error)}")
    _insist({first}, part)
    _insist(written, part | _reported(device))
    return f"{len(part)} pages in the part"


@check("A report by larger pages has the bit of every page of which some part was written.")
def by_larger_pages(lab: Lab) -> str:
    """Report by 8 KiB."""
    device, exerciser = _started(lab)
    written = _worked(exerciser)
    pages, error = device.try_report(SECOND, AREA, 2 * PAGE)
    if error:
        raise Unknown(f"reports by larger pages are refused: {name_of_error(error)}")
    _insist(_in_second(written), pages, 2 * PAGE)
    return f"{len(pages)} pages of {2 * PAGE} bytes"


@check("A report that is refused for want of room loses nothing.")
def refused_report(lab: Lab) -> None:
    """Ask for one without room, then with it."""
    device, exerciser = _started(lab)
    written = _worked(exerciser)
    request = Feature(FEATURE_SIZE + LoggingReport.SIZE, DeviceFeature.DMA_LOGGING_REPORT | vfio.FEATURE_GET).pack()
    report = LoggingReport(SECOND, AREA, PAGE).pack()
    device.refused("a report without room for a bitmap", Command.DEVICE_FEATURE, request, report)
    _insist(written, _reported(device))


@check("What a device wrote to a mapping is not lost when that is unmapped: the bitmap that goes with it has it.")
def unmapped(lab: Lab) -> str:
    """Have it write, unmap with the bitmap, or with a report after it."""
    device, exerciser = _started(lab)
    written = _in_second(_worked(exerciser))
    request = DmaUnmap(UNMAP_GET_DIRTY_BITMAP, SECOND, AREA, PAGE, vfio.bitmap_bytes(AREA, PAGE))
    reply = device.ask(Command.DMA_UNMAP, request.pack())
    if reply.error:
        raise Unknown(f"the device has no bitmap for an unmap: {name_of_error(reply.error)}")
    pages = pages_of(parsed(request.unpack_bitmap, reply.body), SECOND, AREA, PAGE)
    _insist(written, pages)
    return f"{len(pages)} pages with the unmap"


@check("What is unmapped is not written any more, whatever the device still has to do there.")
def left_alone(lab: Lab) -> None:
    """Unmap the second area, and tell the device to write there."""
    device, exerciser = _started(lab)
    if exerciser.begins_running:
        raise Unknown("this device cannot do without its memory")
    device.unmap_area(SECOND)
    exerciser.memory.mapped.discard(SECOND)
    exerciser.memory.remember()
    exerciser.begin()
    end = time.monotonic() + _STILL
    while time.monotonic() < end:
        device.pump(_STILL / 4)
    if changed := {page for page in exerciser.memory.changed() if page >= SECOND}:
        raise Failure(f"written after the unmap: {listed(sorted(changed))}")
    device.get_state()


@check("What is mapped while the log runs, inside its ranges, is logged too, as what was mapped before.")
def remapped(lab: Lab) -> str:
    """Unmap the second area, map it again, and have the device write there."""
    device, exerciser = _started(lab)
    _worked(exerciser)
    device.unmap_area(SECOND)
    device.map_area(exerciser.memory, SECOND)
    device.try_report(SECOND, AREA)
    exerciser.memory.fill()
    written = _worked(exerciser)
    _insist(written, _reported(device))
    return f"{len(written)} pages"


@check("A device that is stopped does no DMA, whatever it was told to do; it does it when it runs again.")
def stopped(lab: Lab) -> str:
    """Give it work in STOP."""
    device, exerciser = _started(lab)
    if exerciser.begins_running:
        raise Unknown("this device takes no work in STOP")
    device.set_state(DeviceState.STOP)
    exerciser.memory.remember()
    exerciser.begin()
    time.sleep(_STILL)
    if changed := exerciser.memory.changed():
        raise Failure(f"written in STOP: {listed(sorted(changed))}")
    device.set_state(DeviceState.RUNNING)
    exerciser.finish()
    written = _wrote(exerciser.written())
    _insist(written, _reported(device))
    return f"{len(written)} pages after STOP"


@check("DMA in PRE_COPY is logged, and the log goes on through the states until STOP_COPY.")
def in_pre_copy(lab: Lab) -> str:
    """Have the device write in PRE_COPY, stop it, and ask then."""
    device, exerciser = _started(lab)
    device.need_migration(DeviceState.PRE_COPY)
    exerciser.memory.remember()
    if exerciser.begins_running:
        exerciser.begin()
    device.set_state(DeviceState.PRE_COPY)
    if not exerciser.begins_running:
        exerciser.begin()
    exerciser.finish()
    device.drain()
    device.set_state(DeviceState.STOP_COPY)
    written = _wrote(exerciser.written())
    _insist(written, _reported(device))
    return f"{len(written)} pages"


@check("A log that was stopped and started again is empty, and logs again.")
def started_again(lab: Lab) -> str:
    """Have the device write, stop and start the log, and have it write again."""
    device, exerciser = _started(lab)
    _worked(exerciser)
    device.stop_logging()
    device.start_logging()
    if left := _reported(device):
        raise Failure(f"a fresh log reports {listed(sorted(left))}")
    exerciser.memory.fill()
    written = _worked(exerciser)
    _insist(written, _reported(device))
    return f"{len(written)} pages"
