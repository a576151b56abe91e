"""The driver of the sample device, with a device that does what it should, and what it should not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from common.datasheets import sample
from common.guest.device import GuestDevice
from common.guest.memory import GuestMemory
from common.guest.programs.driver_sample import SampleDriver, SampleKnobs
from common.guest.programs.iova import TOP
from common.guest.programs.program import Area, Moment
from common.memory.layout import PAGE_SIZE
from common.memory.ram import GuestRam

AREA = 0x10_0000
NS = 1_000_000_000


class FakeSample:
    """Its own clock is the guest's, in whole seconds from some year on."""

    name = "sample0"
    viommu = True
    epoch = 1_700_000_000

    def __init__(self, memory: GuestMemory) -> None:
        self.ram = memory
        self.content = bytearray(sample.MEMORY_SIZE)
        self.timer = 0
        self.mapped: list[tuple[int, int]] = []
        self.now_ns = 0
        self.unmasked = 0
        self.armed = False
        self.silent = False
        self.dma = sample.DMA_CONTENT

    @property
    def seconds(self) -> int:
        return self.epoch + self.now_ns // NS

    def enable(self) -> None:
        pass

    def map(self, iova: int, gpa: int, size: int) -> None:
        assert size == PAGE_SIZE
        self.mapped.append((iova, gpa))

    def read(self, register: int, size: int) -> int:
        assert (register, size) == (sample.TIMER, 8)
        return (self.seconds - self.timer) % (1 << 64)

    def write(self, register: int, value: int, size: int) -> None:
        assert (register, size) == (sample.TIMER, 8)
        assert value >= self.seconds + 1
        self.timer = value
        self.armed = True

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        assert (bar, offset) == (sample.MEMORY_BAR, 0)
        self.content[:] = data

    def read_bar(self, bar: int, offset: int, size: int) -> bytes:
        assert (bar, offset, size) == (sample.MEMORY_BAR, 0, sample.MEMORY_SIZE)
        return bytes(self.content)

    def unmask(self) -> None:
        self.unmasked += 1


class Bench:
    def __init__(self, ram: GuestRam) -> None:
        self.memory = GuestMemory(ram)
        self.device = FakeSample(self.memory)
        self.driver = SampleDriver(
            "driver0",
            Area(self.memory, AREA, 4 << 20),
            SampleKnobs("sample0"),
            cast("GuestDevice", self.device),
            TOP,
        )
        self.driver.start(Moment(0, 0, 1), fresh=True)

    def run(self, seconds: float, run: int = 1) -> None:
        device = self.device
        for _ in range(int(seconds * 200)):
            device.now_ns += 5_000_000
            due = device.armed and device.seconds >= device.timer and not device.silent
            self.driver.advance(Moment(device.now_ns, device.now_ns, run, interrupted=due))
            if due:
                # After the interrupt, as theirs does it.
                device.armed = False
                for _, gpa in device.mapped:
                    self.memory.view(gpa, PAGE_SIZE).data[:] = device.dma

    def report(self) -> dict[str, Any]:
        return self.driver.report()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with GuestRam.create(64 << 20) as ram:
        made = Bench(ram)
        yield made
        del made


def test_cycle_after_cycle(bench: Bench) -> None:
    bench.run(10)
    report = bench.report()
    assert report["errors"] == []
    assert report["counters"]["cycles"] >= 4
    assert report["counters"]["interrupts"] == bench.device.unmasked >= 3
    assert len(bench.device.mapped) == 2


def test_a_page_that_is_not_written_is_noticed(bench: Bench) -> None:
    bench.device.dma = b"A" * PAGE_SIZE
    bench.run(9)
    assert "has not written to pages [0, 1]" in bench.report()["errors"][0]


def test_memory_that_is_another_after_a_pause_is_noticed(bench: Bench) -> None:
    bench.run(1)
    bench.device.content[5000] ^= 1
    bench.run(0.1, run=2)
    assert "the device's memory is not what was put there" in bench.report()["errors"][0]


def test_an_interrupt_that_does_not_come_is_noticed(bench: Bench) -> None:
    bench.run(0.1)
    bench.device.silent = True
    bench.run(13)
    assert "no interrupt 10 s after the timer's time" in bench.report()["errors"][0]
    assert bench.report()["counters"]["stalls"] == 1


def test_it_needs_a_viommu(bench: Bench) -> None:
    bench.device.viommu = False
    with pytest.raises(ValueError, match="no vIOMMU"):
        SampleDriver("d", Area(bench.memory, AREA, 4 << 20), SampleKnobs("s"), cast("GuestDevice", bench.device), TOP)
