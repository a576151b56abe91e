"""The logs of a container's devices, where they log in pages of their own size."""

from __future__ import annotations

import numpy as np
import pytest

from common.iommu.dma_log import DmaLog
from common.iommu.tracking import DeviceTraits
from common.iommu.turn import Turn
from common.memory.bitmap import Words, pages_of, set_pages, words_for
from common.memory.layout import PAGE_SIZE
from common.vfio.feature import Range

LARGE = 16 << 10


class LargePages:
    """A device that logs in pages of 16 KiB, whatever it is asked for, as the kernel allows."""

    name = "large"

    def __init__(self, *, any_page_size: bool) -> None:
        self.any_page_size = any_page_size
        self.dirty: set[int] = set()  # pages of its size

    def logging_start(self, page_size: int, _ranges: object) -> int:
        assert page_size == PAGE_SIZE
        return LARGE

    def logging_stop(self) -> None:
        pass

    def logging_report(self, iova: int, length: int, page_size: int) -> Words:
        if page_size != LARGE and not self.any_page_size:
            raise OSError(22, "not START's page size")
        words = np.zeros(words_for(length // page_size), np.uint64)
        found = [
            page * LARGE // page_size + part - iova // page_size
            for page in self.dirty
            for part in range(LARGE // page_size)
        ]
        set_pages(words, np.array(found, np.int64))
        return words


@pytest.mark.parametrize("any_page_size", [False, True])
def test_a_bit_of_a_large_page_is_all_of_it(*, any_page_size: bool) -> None:
    device = LargePages(any_page_size=any_page_size)
    traits = [DeviceTraits("large", dma_logging=True, report_ranges=any_page_size)]
    log = DmaLog("c", [device], traits, "device", Turn())  # type: ignore[list-item]  # it is asked for no more
    window = Range(5 * LARGE, 3 * LARGE)
    log.start([window])
    assert log.granule == LARGE
    device.dirty = {5, 7}
    assert pages_of(log.report(window)).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
