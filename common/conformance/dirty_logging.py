"""The log of a device's DMA writes: what is asked of it, whether or not the device writes."""

from __future__ import annotations

from common.conformance.check import Failure, Unknown, check
from common.conformance.device import BOTH_AREAS, Device, parsed
from common.conformance.lab import Lab
from common.conformance.memory import AREA, FIRST, PAGE, SECOND
from common.conformance.probe import name_of_error
from common.vfio import feature as vfio
from common.vfio.feature import DeviceFeature, LoggingReport, Range
from common.vfio_user.codec import (
    DMA_READABLE,
    DMA_WRITABLE,
    FEATURE_SIZE,
    UNMAP_GET_DIRTY_BITMAP,
    Command,
    DmaMap,
    DmaUnmap,
    Feature,
)

_HALF_PAGE = PAGE // 2
_LARGE = 4 << 30


def _mapped(lab: Lab) -> Device:
    device = lab.device()
    device.need_logging()
    device.map_both(lab.memory())
    return device


def _quiet(device: Device, iova: int, length: int, page_size: int = PAGE) -> int:
    """Insist that a report, if it is given, is empty; return 0 or the errno of the refusal."""
    pages, error = device.try_report(iova, length, page_size)
    if pages:
        raise Failure(f"{len(pages)} pages are reported as written, and the device had nothing to write")
    return error


@check("A device that can log its DMA has all of DMA_LOGGING_START, _STOP and _REPORT.")
def features(lab: Lab) -> None:
    """Probe them."""
    device = lab.device()
    device.need_logging()
    for number, operation in (
        (DeviceFeature.DMA_LOGGING_STOP, vfio.FEATURE_SET),
        (DeviceFeature.DMA_LOGGING_REPORT, vfio.FEATURE_GET),
    ):
        request = Feature(FEATURE_SIZE, number | operation | vfio.FEATURE_PROBE).pack()
        if error := device.ask(Command.DEVICE_FEATURE, request).error:
            raise Failure(f"{number.name} is not there: {name_of_error(error)}")


@check("A log starts empty, reports what was not written as not written, and stops.")
def quiet(lab: Lab) -> None:
    """Start, report, stop, and again."""
    device = _mapped(lab)
    for _ in range(2):
        device.start_logging()
        for area in BOTH_AREAS:
            if error := _quiet(device, area.iova, area.length):
                raise Failure(f"DMA_LOGGING_REPORT of a mapping is refused: {name_of_error(error)}")
        if error := device.stop_logging():
            raise Failure(f"DMA_LOGGING_STOP is refused: {name_of_error(error)}")


@check("There is a report only while the log runs; before START and after STOP it is refused.")
def report_needs_start(lab: Lab) -> None:
    """Ask for one before and after."""
    device = _mapped(lab)
    if not device.try_report(FIRST, AREA)[1]:
        raise Failure("a report before DMA_LOGGING_START is not refused")
    device.start_logging()
    device.stop_logging()
    if not device.try_report(FIRST, AREA)[1]:
        raise Failure("a report after DMA_LOGGING_STOP is not refused")


@check("The page size of START is a power of two; any other is refused.")
def start_page_size(lab: Lab) -> None:
    """Start with none, and with one that is no power of two."""
    device = _mapped(lab)
    for page_size in (0, 3000):
        if not device.try_start(page_size, BOTH_AREAS):
            raise Failure(f"DMA_LOGGING_START with page size {page_size} is not refused")


@check("The ranges of START are whole pages, end within 64 bits, and do not overlap; others are refused.")
def start_ranges(lab: Lab) -> None:
    """Start with such, if the device looks at ranges at all."""
    device = _mapped(lab)
    if not device.try_start(PAGE, ()):
        raise Unknown("the device takes no notice of ranges: it starts without any, and logs everything")
    for what, ranges in (
        ("a half page", [Range(FIRST + _HALF_PAGE, PAGE)]),
        ("a range beyond 2^64", [Range((1 << 64) - PAGE, 2 * PAGE)]),
        ("ranges that overlap", [Range(FIRST, AREA), Range(FIRST + PAGE, PAGE)]),
    ):
        if not device.try_start(PAGE, ranges):
            raise Failure(f"DMA_LOGGING_START with {what} is not refused")


@check("A START while the log runs does no harm: it is refused, or the log goes on.")
def start_twice(lab: Lab) -> str:
    """Start twice, then report."""
    device = _mapped(lab)
    device.start_logging()
    error = device.try_start(PAGE, BOTH_AREAS)
    if refusal := _quiet(device, FIRST, AREA):
        raise Failure(f"after a second DMA_LOGGING_START reports are refused: {name_of_error(refusal)}")
    return f"the second is {f'refused with {name_of_error(error)}' if error else 'accepted'}"


@check("The page size of a report is a power of two from 4096; any other is refused, and the server goes on.")
def report_page_size(lab: Lab) -> None:
    """Ask for reports by half pages, and by what is no power of two."""
    device = _mapped(lab)
    device.start_logging()
    for page_size in (_HALF_PAGE, 3 * PAGE):
        if not device.try_report(FIRST, AREA, page_size)[1]:
            raise Failure(f"a report by pages of {page_size} bytes is not refused")
    device.report(FIRST, AREA)


@check("A report by larger pages than the log has is refused, or is a bitmap of that many bits.")
def larger_pages(lab: Lab) -> str:
    """Ask for reports by 8 KiB and by 2 MiB."""
    device = _mapped(lab)
    device.start_logging()
    errors = {size: _quiet(device, FIRST, AREA, size) for size in (2 * PAGE, 2 << 20)}
    return "; ".join(f"{size} bytes: {name_of_error(error) if error else 'given'}" for size, error in errors.items())


@check("A report of any range is refused, or brings a bitmap of the range; success without a bitmap is neither.")
def report_ranges(lab: Lab) -> str:
    """Ask for the begin, the middle and the end of a mapping, for what is not mapped, and for one page."""
    device = _mapped(lab)
    device.start_logging()
    words = []
    for what, iova, length in (
        ("begin", FIRST, AREA // 2),
        ("middle", FIRST + 2 * PAGE, AREA // 2),
        ("end", FIRST + AREA - PAGE, PAGE),
        ("not mapped", SECOND + AREA, AREA),
        ("one page", FIRST, PAGE),
    ):
        error = _quiet(device, iova, length)
        words.append(f"{what}: {name_of_error(error) if error else 'given'}")
    device.report(FIRST, AREA)
    return "; ".join(words)


@check("A report over two adjacent mappings is refused, or covers both; success without a bitmap is neither.")
def two_mappings(lab: Lab) -> str:
    """Ask for one report of both areas."""
    device = _mapped(lab)
    device.start_logging()
    error = _quiet(device, FIRST, 2 * AREA)
    return f"refused with {name_of_error(error)}" if error else "given"


@check("A report of a large mapping is refused, or brings a bitmap of all of it.")
def large_report(lab: Lab) -> str:
    """Map 4 GiB, of which nothing is used, and ask for one report."""
    device = lab.device()
    device.need_logging()
    memory = lab.sparse_memory(_LARGE)
    body = DmaMap(DMA_READABLE | DMA_WRITABLE, 0, _LARGE, _LARGE).pack()
    if error := device.ask(Command.DMA_MAP, body, fds=[memory]).error:
        raise Unknown(f"a mapping of {_LARGE >> 30} GiB is refused: {name_of_error(error)}")
    device.start_logging(ranges=[Range(_LARGE, _LARGE)])
    error = _quiet(device, _LARGE, _LARGE)
    return f"refused with {name_of_error(error)}" if error else f"{_LARGE >> 30} GiB in one report"


@check("A report with too little room for its bitmap, without length, or beyond 2^64 is refused.")
def report_room(lab: Lab) -> None:
    """Ask for such."""
    device = _mapped(lab)
    device.start_logging()
    for what, argsz, report in (
        ("with too little room", FEATURE_SIZE + LoggingReport.SIZE + 8, LoggingReport(FIRST, AREA, PAGE)),
        ("without length", 4096, LoggingReport(FIRST, 0, PAGE)),
        ("beyond 2^64", 4096, LoggingReport((1 << 64) - PAGE, 2 * PAGE, PAGE)),
    ):
        request = Feature(argsz, DeviceFeature.DMA_LOGGING_REPORT | vfio.FEATURE_GET).pack()
        device.refused(f"a report {what}", Command.DEVICE_FEATURE, request, report.pack())
    device.report(FIRST, AREA)


@check("DMA_UNMAP with GET_DIRTY_BITMAP, where a device has it, brings the bitmap of what is unmapped.")
def unmap_with_bitmap(lab: Lab) -> str:
    """Unmap with one."""
    device = _mapped(lab)
    device.start_logging()
    request = DmaUnmap(UNMAP_GET_DIRTY_BITMAP, SECOND, AREA, PAGE, vfio.bitmap_bytes(AREA, PAGE))
    reply = device.ask(Command.DMA_UNMAP, request.pack())
    if reply.error:
        raise Unknown(f"the device has no bitmap for an unmap: {name_of_error(reply.error)}")
    if any(parsed(request.unpack_bitmap, reply.body)):
        raise Failure("pages are reported as written, and the device had nothing to write")
    device.map_area(lab.memory(), SECOND)
    return "given"
