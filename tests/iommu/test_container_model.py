"""Whatever guest and devices do between syncs, no page is lost: against a model of versions, over every kind of log.

Proven by breaking the code: with any one of these changes a counterexample is found — uncovered ranges not marked at
sync; not marked at unmap; the unmap's bitmap dropped; bits translated by identity; the neighbours in a large page not
marked at unmap; the final marking of an arming left out; windows not widened to whole large pages; a mapping that
shares a large page taken for covered where devices are asked region by region; DMA by message not marked.
"""

from __future__ import annotations

import random

from dma_devices import PAGES, Destination, Device, Ram, container_of
from hypothesis import given, settings
from hypothesis import strategies as st

from common.iommu.viommu import Viommu
from common.memory.layout import PAGE_SIZE
from common.vfio.dirty_log import LogLimits

P = PAGE_SIZE

devices_like = st.fixed_dictionaries(
    {
        "unmap_bitmap": st.booleans(),
        "outlives": st.booleans(),
        "exact": st.booleans(),
        "clears_granule": st.booleans(),
        "logging": st.sampled_from([True, True, True, False]),
        "iommu": st.sampled_from([False, False, True]),
        "limits": st.sampled_from(
            [
                LogLimits(),
                LogLimits(max_bits=42),
                LogLimits(max_ranges=2),
                LogLimits(max_bits=30, page_sizes=(4 * P,)),
                LogLimits(page_sizes=(16 * P,)),
            ]
        ),
    }
)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(devices_like, min_size=1, max_size=2),
    st.sampled_from(["auto", "mapped", "minmax", "aperture"]),
    st.sampled_from([None, 39, 48]),
    st.integers(0, 1 << 32),
    st.integers(1, 120),
)
def test_no_page_is_lost(kinds, strategy, width, seed, steps):
    rng = random.Random(seed)
    ram = Ram()
    devices = [Device(f"d{n}", ram, **kind) for n, kind in enumerate(kinds)]
    container = container_of(ram, *devices, viommu=width and Viommu(width), strategy=strategy)
    destination = Destination(ram)
    homes = [0, 0x1000_0000, 0xFFF0_0000, (1 << 38) - 64 * P]

    def map_something():
        count = rng.choice([1, 1, 1, 2, 5, 40])
        iova = rng.choice(homes) + rng.randrange(48) * P
        if all(item.end <= iova or iova + count * P <= item.iova for item in container.mappings):
            container.map(iova, count * P, rng.randrange(PAGES - count) * P, writable=rng.random() < 0.9)

    def unmap_something():
        mappings = container.mappings
        if mappings:
            item = rng.choice(mappings)
            container.unmap(item.iova, item.size)

    def write_something():
        device = rng.choice(devices)
        targets = device.writable
        for _ in range(rng.randrange(1, 6) if targets else 0):
            device.write(rng.choice(targets))

    def write_by_message():
        targets = devices[0].writable
        if targets:
            at = rng.choice(targets)
            old = int.from_bytes(container_read(at), "little")
            container.dma_write(at, (old + 1).to_bytes(8, "little"))

    def container_read(at):
        item = next(item for item in container.mappings if item.iova <= at < item.end)
        offset = item.target.offset + at - item.iova
        return bytes(ram.bytes[offset : offset + 8])

    for _ in range(rng.randrange(12)):
        map_something()
    write_something()
    try:
        container.start_tracking(destination.dirty)
    except OSError:
        assert container.tracking is None and not any(device.log.active for device in devices)
        return
    destination.copy = ram.versions.copy()
    work = [map_something, unmap_something, write_something, write_something, write_by_message, container.sync]
    for _ in range(steps):
        rng.choice(work)()
        if rng.random() < 0.3:
            destination.round()
    container.sync(last=True)
    destination.round()
    assert destination.lost() == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_with_everything_covered_only_written_pages_are_dirty(seed, outlives):
    """The other side: a log that covers everything and outlives its mappings costs nothing that was not written."""
    rng = random.Random(seed)
    ram = Ram()
    device = Device("a", ram, unmap_bitmap=not outlives, outlives=outlives)
    container = container_of(ram, device, viommu=Viommu(48), strategy="aperture")
    destination, written = Destination(ram), set()
    container.start_tracking(destination.dirty)
    for n in range(40):
        container.map(n * 2 * P, P, rng.randrange(PAGES) * P)
        if rng.random() < 0.5:
            written.add(container.mappings[-1].ram_page)
            device.write(n * 2 * P)
        if rng.random() < 0.5:
            container.unmap(n * 2 * P, P)
    container.sync()
    assert destination.round() == written
