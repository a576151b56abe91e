from __future__ import annotations

import errno

import pytest

from common.iommu.iova_tree import Mapping, RamTarget
from common.iommu.viommu import Viommu
from common.memory.layout import PAGE_SIZE


@pytest.mark.parametrize(("width", "last"), [(39, 0x7F_FFFF_FFFF), (48, 0xFFFF_FFFF_FFFF)])
def test_max_iova_bounds_every_domain(width, last):
    """QEMU series patch 14."""
    viommu = Viommu(width)
    assert viommu.max_iova == last
    tree = viommu.domain("dma0")
    tree.insert(Mapping(last + 1 - PAGE_SIZE, PAGE_SIZE, 0, RamTarget(0)))
    with pytest.raises(OSError) as caught:
        tree.insert(Mapping(last + 1, PAGE_SIZE, 0, RamTarget(0)))
    assert caught.value.errno == errno.EINVAL


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="39 or 48"):
        Viommu(57)


def test_domains_are_apart_and_keep_their_mappings():
    viommu = Viommu()
    viommu.domain("dma0").insert(Mapping(0, PAGE_SIZE, 0, RamTarget(0)))
    assert len(viommu.domain("dma0")) == 1
    assert len(viommu.domain("dma1")) == 0


def test_faults_are_counted_and_the_last_are_kept():
    viommu = Viommu(clock=lambda: 7.5)
    viommu.domain("dma0").insert(Mapping(0, PAGE_SIZE, 0, RamTarget(0), writable=False))
    assert viommu.translate("dma0", 8, 8, write=False)[0].offset == 8
    for n in range(1000):
        with pytest.raises(OSError) as caught:
            viommu.translate("dma0", n, 8, write=True)
        assert caught.value.errno == errno.EFAULT
    assert viommu.fault_count == 1000 and len(viommu.faults) == 256
    last = viommu.faults[-1]
    assert (last.container, last.iova, last.size, last.write, last.time) == ("dma0", 999, 8, True, 7.5)
    assert "must not be written" in last.reason
