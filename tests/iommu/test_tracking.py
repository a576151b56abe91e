from __future__ import annotations

from common.iommu.tracking import DeviceTraits, choose, rearm_pays


def test_devices_before_iommu_before_nothing():
    """QEMU: vfio_container; M10. A method that does not cover every device covers none."""
    both = DeviceTraits("a", dma_logging=True, iommu_dirty=True)
    own = DeviceTraits("b", dma_logging=True)
    seen = DeviceTraits("c", iommu_dirty=True)
    silent = DeviceTraits("d")
    assert choose([]).kind == "device"
    assert choose([both, own]).kind == "device"
    assert choose([both, seen]).kind == "iommu"
    assert choose([own, seen]).kind == "perpetual"
    assert choose([own, silent]).kind == "perpetual"


def test_the_reason_names_who_is_in_the_way():
    reason = choose([DeviceTraits("nic0"), DeviceTraits("nvme0", dma_logging=True), DeviceTraits("acc0")]).reason
    assert reason.startswith("nic0 and acc0 cannot log their own DMA and no IOMMU sees the DMA of nic0, nvme0 and acc0")
    reason = choose([DeviceTraits("nic0", iommu_dirty=True)]).reason
    assert reason.startswith("nic0 cannot log its own DMA, but")


def test_arming_again_pays_when_its_price_has_been_spent():
    assert not rearm_pays(spent_pages=99, uncovered_pages=50, mapped_pages=100)
    assert rearm_pays(spent_pages=100, uncovered_pages=1, mapped_pages=100)
    assert not rearm_pays(spent_pages=1000, uncovered_pages=0, mapped_pages=100)


def test_renting_costs_at_most_twice_the_better_choice():
    """However many syncs follow, and whatever is uncovered: rent until the price is paid, then buy."""
    for mapped in (1, 7, 100):
        for uncovered in range(1, mapped + 1):
            for syncs in range(1, 3 * mapped):
                spent, bought = 0, 0
                for _ in range(syncs):
                    if bought:
                        break
                    spent += uncovered
                    bought = mapped if rearm_pays(spent, uncovered, mapped) else 0
                assert spent + bought <= 2 * min(syncs * uncovered, mapped) + uncovered


def test_a_method_that_covers_all_says_so():
    assert choose([DeviceTraits("a", dma_logging=True)]).reason == "every device logs its own DMA"
    assert choose([]).reason == "there is no device whose DMA could be missed"
