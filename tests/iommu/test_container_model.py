"""Whatever guest and devices do, no page is lost: against a model of versions, over every kind of log.

Guest and devices are not only busy between syncs: devices write inside every request until it is answered, and the
guest maps and unmaps wherever a sync gives up the turn.

Proven by breaking the code: with any one of these changes a counterexample is found. Uncovered ranges not marked at
sync; not marked at unmap; the unmap's bitmap dropped; bits translated by identity; the final marking of an arming left
out; DMA by message not marked; only the last device's answer kept; a mapping that is gone asked for, or one that shares
a large page taken for covered, where devices are asked region by region.
"""

from __future__ import annotations

import random

from dma_devices import PAGES, Destination, Device, Ram, container_of
from hypothesis import given, settings
from hypothesis import strategies as st

from common.iommu.hooks import Hooks
from common.iommu.viommu import Viommu
from common.memory.layout import PAGE_SIZE
from common.vfio.dirty_log import LogLimits

P = PAGE_SIZE

COARSE = {"limits": LogLimits(page_sizes=(8 * P,)), "clears_granule": True}
KINDS = [
    {},
    {"unmap_bitmap": False},
    {"unmap_bitmap": False, "outlives": True},
    {"exact": True},
    COARSE,
    COARSE | {"unmap_bitmap": False, "outlives": True},
    COARSE | {"exact": True},
    {"limits": LogLimits(max_bits=42)},
    {"limits": LogLimits(max_bits=20)},
    {"limits": LogLimits(max_ranges=2)},
    {"logging": False},
    {"logging": False, "iommu": True},
]


class World:
    """A container, its devices, and what happens to them: `random` decides."""

    def __init__(self, rng, kinds, strategy, width):
        self.rng = rng
        self.ram = Ram()
        self.devices = [Device(f"d{n}", self.ram, **kind) for n, kind in enumerate(kinds)]
        hooks = Hooks()
        hooks.reported = self.write
        hooks.window_done = hooks.disarmed = hooks.rearmed = self.disturb
        for device in self.devices:
            device.on = dict.fromkeys(["map", "unmap", "start", "stop", "report"], self.write)
        viommu = Viommu(width) if width else None
        self.container = container_of(self.ram, *self.devices, viommu=viommu, strategy=strategy, hooks=hooks)
        self.destination = Destination(self.ram)
        self.homes = rng.sample([0, 0x1000_0000, 0xFFF0_0000, (1 << 38) - 64 * P], rng.choice([1, 1, 2, 4]))
        self.still = False

    def map(self):
        count = self.rng.choice([1, 1, 1, 2, 5, 20])
        iova = self.rng.choice(self.homes) + self.rng.randrange(48) * P
        if all(item.end <= iova or iova + count * P <= item.iova for item in self.container.mappings):
            page = self.rng.randrange(PAGES - count)
            self.container.map(iova, count * P, page * P, writable=self.rng.random() < 0.9)

    def unmap(self):
        mappings = self.container.mappings
        if mappings:
            item = self.rng.choice(mappings)
            self.container.unmap(item.iova, item.size)

    def write(self, _window=None):
        device = self.rng.choice(self.devices)
        targets = [] if self.still else device.writable
        for _ in range(self.rng.randrange(4) if targets else 0):
            device.write(self.rng.choice(targets))

    def write_by_message(self):
        targets = self.devices[0].writable
        if targets:
            iova = self.rng.choice(targets)
            version = int.from_bytes(self.container.dma_read(iova, 8), "little")
            self.container.dma_write(iova, (version + 1).to_bytes(8, "little"))

    def disturb(self, _window=None):
        for _ in range(0 if self.still else self.rng.randrange(4)):
            self.rng.choice([self.map, self.unmap, self.write, self.write, self.write_by_message])()

    def step(self):
        work = [self.map, self.unmap, self.write, self.write, self.write_by_message, self.container.sync]
        self.rng.choice(work)()
        if self.rng.random() < 0.3:
            self.destination.round()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=2),
    st.sampled_from(["auto", "mapped", "minmax", "aperture"]),
    st.sampled_from([None, 39, 48]),
    st.integers(0, 1 << 32),
    st.integers(1, 80),
)
def test_no_page_is_lost(kinds, strategy, width, seed, steps):
    world = World(random.Random(seed), kinds, strategy, width)
    container, destination = world.container, world.destination
    for _ in range(world.rng.randrange(12)):
        world.map()
    try:
        container.start_tracking(destination.dirty)
    except OSError:
        assert container.tracking is None and not any(device.log.active for device in world.devices)
        return
    destination.copy = world.ram.versions.copy()
    for _ in range(steps):
        world.step()
    world.still = True
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
