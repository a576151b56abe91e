"""A machine for tests: traps, mappings and minimal devices in one thread, time that passes when a test says so."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from common.datasheets import accelerator, nic, nvme, pattern, pci
from common.guest.boot import parse
from common.guest.memory import GuestMemory
from common.guest.vcpu import Vcpu
from common.ipc.channel import Message, RequestError
from common.memory import runs
from common.memory.layout import PAGE_SIZE
from common.memory.ram import GuestRam

AREA = 4 << 20
FIRST_AREA = 0x10_0000
BAR_BASE = 0xE000_0000
BAR_STRIDE = 0x100_0000


class FakeDevice:
    """Registers, a ring that is worked off when the doorbell was rung, DMA that marks what it wrote."""

    entry: np.dtype[Any]
    budget = 16  # entries in half a millisecond

    def __init__(self, machine: FakeMachine, name: str, kind: str, bar: int) -> None:
        self.machine, self.name, self.kind = machine, name, kind
        self.bars = {0: bar, 2: bar + 0x10_0000}
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.interrupt = os.eventfd(0, os.EFD_NONBLOCK)
        self.registers: dict[int, int] = {}
        self.head = 0
        self.enabled = False
        self.awake = False
        self.dirty: set[int] = set()
        self.faults = 0
        self.lose_doorbell = self.lose_interrupt = False

    def read(self, register: int) -> int:
        assert self.enabled, "memory decoding is off"
        fixed = {pci.HEAD: self.head & 0xFFFF_FFFF, pci.FAULTS: self.faults}
        return fixed.get(register, self.registers.get(register, 0))

    def write(self, register: int, value: int) -> None:
        assert self.enabled, "memory decoding is off"
        if register == pci.DOORBELL:
            self.awake = True
        self.registers[register] = value

    def read_memory(self, offset: int, size: int) -> bytes:
        raise AssertionError("no such BAR")

    def dma(self, iova: int, size: int, data: bytes | None = None) -> np.ndarray:
        gpa = self.machine.translate(iova, size)
        if data is not None:
            self.machine.memory.view(gpa, size)[:] = np.frombuffer(data, np.uint8)
            first, last = gpa // PAGE_SIZE, (gpa + size - 1) // PAGE_SIZE
            self.dirty.update(range(first, last + 1))
        return self.machine.memory.view(gpa, size)

    def work(self) -> None:
        try:
            os.eventfd_read(self.doorbell)
        except BlockingIOError:
            pass
        else:
            self.awake = not self.lose_doorbell or self.awake
        if not (self.awake and self.registers.get(pci.CONTROL, 0) & pci.CONTROL_ENABLE):
            return
        entries, base = self.registers[pci.RING_ENTRIES], self.registers[pci.RING_BASE]
        tail = int(self.dma(base, 4).view("<u4")[0])
        done = 0
        while tail != self.head & 0xFFFF_FFFF and done < self.budget:
            iova = base + pci.RING_HEADER + self.head % entries * self.entry.itemsize
            self.complete(self.dma(iova, self.entry.itemsize).view(self.entry), iova)
            self.head += 1
            done += 1
        self.awake = tail != self.head & 0xFFFF_FFFF
        if done and not self.lose_interrupt:
            os.eventfd_write(self.interrupt, 1)

    def complete(self, entry: np.ndarray, iova: int) -> None:
        raise NotImplementedError

    def finish_entry(self, iova: int, entry: np.void) -> None:
        self.dma(iova, self.entry.itemsize, entry.tobytes())


class FakeNic(FakeDevice):
    entry = nic.ENTRY
    budget = 4

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.registers[pci.ID] = nic.MAGIC
        self.sequence = 0
        self.peer_sequence = 0
        self.lose_peer_writes = False
        self.packet = 1500
        self.corrupt: Callable[[bytes], bytes] = bytes

    def read(self, register: int) -> int:
        sequences = {nic.SEQUENCE: self.sequence, nic.PEER_SEQUENCE: self.peer_sequence}
        return sequences[register] if register in sequences else super().read(register)

    def complete(self, entry: np.ndarray, iova: int) -> None:
        filled = entry.copy()[0]
        length = min(int(filled["size"]), self.packet)
        data = pattern.block(self.sequence, length)
        self.dma(int(filled["iova"]), length, self.corrupt(data))
        filled["done"], filled["sequence"], filled["length"] = 1, self.sequence, length
        filled["checksum"] = zlib.crc32(data)
        self.finish_entry(iova, filled)
        self.sequence += 1
        if self.registers[pci.CONTROL] & nic.CONTROL_PEER:
            offset = self.peer_sequence * nic.PEER_BLOCK % self.registers[nic.PEER_SIZE]
            gpa = self.machine.translate(self.registers[nic.PEER_BASE] + offset, nic.PEER_BLOCK)
            if not self.lose_peer_writes:
                self.machine.write_bar(gpa, pattern.block(self.peer_sequence, nic.PEER_BLOCK))
            self.peer_sequence += 1


class FakeNvme(FakeDevice):
    entry = nvme.ENTRY

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.registers[pci.ID] = nvme.MAGIC
        self.registers[nvme.CAPACITY] = 1 << 20
        self.generations: dict[int, int] = {}

    def complete(self, entry: np.ndarray, iova: int) -> None:
        request = entry.copy()[0]
        status = nvme.STATUS_OK
        for block in range(int(request["blocks"])):
            lba, address = int(request["lba"]) + block, int(request["iova"]) + block * nvme.BLOCK_SIZE
            if request["opcode"] == nvme.OP_READ:
                seed = nvme.content_seed(lba, self.generations.get(lba, 0))
                self.dma(address, nvme.BLOCK_SIZE, pattern.block(seed, nvme.BLOCK_SIZE))
                continue
            data = self.dma(address, nvme.BLOCK_SIZE).tobytes()
            generation = nvme.generation_of(pattern.seed_of(data))
            if data != pattern.block(nvme.content_seed(lba, generation), nvme.BLOCK_SIZE):
                status = nvme.STATUS_BAD_DATA
            self.generations[lba] = generation
        request["status"] = status
        self.finish_entry(iova, request)


class FakeAccelerator(FakeDevice):
    entry = accelerator.ENTRY

    def __init__(self, *args: Any, size: int = 1 << 20) -> None:
        super().__init__(*args)
        self.registers[pci.ID] = accelerator.MAGIC
        self.registers[accelerator.MEMORY_SIZE] = size
        self.content = np.zeros(size, np.uint8)
        self.cells = size // 2 // accelerator.CELL
        self.moves = 0
        for cell in range(self.cells):
            self._put_cell(cell, 0)

    def _put_cell(self, cell: int, step: int) -> None:
        start = self.content.size // 2 + cell * accelerator.CELL
        data = pattern.block(accelerator.cell_seed(cell, step), accelerator.CELL)
        self.content[start : start + accelerator.CELL] = np.frombuffer(data, np.uint8)

    def read(self, register: int) -> int:
        return self.moves if register == accelerator.STEPS else super().read(register)

    def read_memory(self, offset: int, size: int) -> bytes:
        return self.content[offset : offset + size].tobytes()

    def work(self) -> None:
        self._put_cell(self.moves % self.cells, self.moves // self.cells + 1)
        self.moves += 1
        super().work()

    def complete(self, entry: np.ndarray, iova: int) -> None:
        job = entry.copy()[0]
        start, length = int(job["offset"]), int(job["length"])
        memory = self.content[start : start + length]
        if job["opcode"] == accelerator.OP_LOAD:
            memory[:] = self.dma(int(job["iova"]), length)
        elif job["opcode"] == accelerator.OP_XOR:
            memory ^= np.uint8(job["argument"])
        else:
            self.dma(int(job["iova"]), length, memory.tobytes())
        job["status"] = accelerator.STATUS_OK
        self.finish_entry(iova, job)


KINDS: dict[str, type[FakeDevice]] = {"nic": FakeNic, "nvme": FakeNvme, "accelerator": FakeAccelerator}


machines: list[FakeMachine] = []


class FakeMachine:
    """Programs are given as {"program", "name", knobs}; areas are assigned here. `call` is what traps arrive at."""

    def __init__(
        self, programs: list[dict[str, Any]], devices: Mapping[str, str] | None = None, *, viommu: bool = True
    ) -> None:
        self.ram = GuestRam.create(64 << 20)
        self.memory = GuestMemory(self.ram)
        self.viommu = viommu
        self.mappings: dict[int, tuple[int, int]] = {}
        self._pages: dict[int, int] = {}
        self.history: list[tuple[str, int, int]] = []
        self.now_ns = 5_000_000_000
        self.devices = {
            name: KINDS[kind](self, name, kind, BAR_BASE + index * BAR_STRIDE)
            for index, (name, kind) in enumerate((devices or {}).items())
        }
        self.programs = [
            {"area_gpa": FIRST_AREA + index * AREA, "area_size": AREA, **program}
            for index, program in enumerate(programs)
        ]
        self.rams = [self.ram]
        machines.append(self)
        self.vcpu = self._vcpu(fresh=True)

    def close(self) -> None:
        for device in self.devices.values():
            os.close(device.doorbell)
            os.close(device.interrupt)
        for ram in self.rams:
            ram.close()

    def boot(self, *, fresh: bool) -> tuple[dict[str, Any], list[int]]:
        fds: list[int] = []
        devices = []
        for device in self.devices.values():
            devices.append(
                {
                    "name": device.name,
                    "kind": device.kind,
                    "container": "default",
                    "viommu": self.viommu,
                    "bars": {str(index): gpa for index, gpa in device.bars.items()},
                    "doorbell_fd": len(fds),
                    "vectors": [len(fds) + 1],
                }
            )
            fds += [device.doorbell, device.interrupt]
        return {"programs": self.programs, "devices": devices, "fresh": fresh}, fds

    def _vcpu(self, *, fresh: bool) -> Vcpu:
        vcpu = Vcpu(self.memory, self, lambda: self.now_ns)  # type: ignore[arg-type]  # it has `call`
        boot, fds = self.boot(fresh=fresh)
        vcpu.attach(parse(boot, len(fds)), fds)
        return vcpu

    # Traps.

    def call(self, method: str, /, **params: Any) -> Message:
        return getattr(self, f"_{method}")(**params)

    def _device_at(self, gpa: int) -> tuple[FakeDevice, int, int]:
        for device in self.devices.values():
            for index, base in device.bars.items():
                if base <= gpa < base + (0x1000 if index == 0 else 0xE0_0000):
                    return device, index, gpa - base
        raise RequestError("EINVAL", f"nothing at {gpa:#x}")

    def _irq_enable(self, device: str) -> Message:
        self.devices[device].enabled = True
        return Message()

    def _mmio_read(self, gpa: int, size: int) -> Message:
        assert size in (4, 8)
        device, index, offset = self._device_at(gpa)
        assert index == 0
        return Message({"value": device.read(offset)})

    def _mmio_write(self, gpa: int, size: int, value: int) -> Message:
        assert value < 1 << 8 * size
        device, _, offset = self._device_at(gpa)
        device.write(offset, value)
        return Message()

    def _mmio_block_read(self, gpa: int, size: int) -> Message:
        device, index, offset = self._device_at(gpa)
        assert index == 2
        return Message(payload=device.read_memory(offset, size))

    def _iommu_map(self, container: str, iova: int, gpa: int, size: int, readable: bool, writable: bool) -> Message:
        assert container == "default" and readable and writable and self.viommu
        assert not (iova | gpa | size) % PAGE_SIZE
        assert not iova < 0xFEF0_0000 <= 0xFEE0_0000 < iova + size
        for offset in range(0, size, PAGE_SIZE):
            if iova + offset in self._pages:
                raise RequestError("EEXIST", f"{iova + offset:#x} is mapped already")
            self._pages[iova + offset] = gpa + offset
        self.mappings[iova] = (gpa, size)
        self.history.append(("map", iova, gpa))
        return Message()

    def _iommu_unmap(self, container: str, iova: int, size: int) -> Message:
        gpa, length = self.mappings.pop(iova)
        assert length == size
        for offset in range(0, size, PAGE_SIZE):
            del self._pages[iova + offset]
        self.history.append(("unmap", iova, gpa))
        return Message()

    def translate(self, iova: int, size: int) -> int:
        if not self.viommu:
            return iova
        pages = [self._pages[page] for page in range(iova - iova % PAGE_SIZE, iova + size, PAGE_SIZE)]
        assert pages == list(range(pages[0], pages[0] + len(pages) * PAGE_SIZE, PAGE_SIZE))
        return pages[0] + iova % PAGE_SIZE

    def write_bar(self, gpa: int, data: bytes) -> None:
        device, index, offset = self._device_at(gpa)
        assert isinstance(device, FakeAccelerator) and index == 2
        device.content[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    # Time.

    def pass_time(self, milliseconds: float, *, vcpu_runs: bool = True, devices_run: bool = True) -> None:
        for _ in range(int(milliseconds * 2)):
            self.now_ns += 500_000
            if devices_run:
                for device in self.devices.values():
                    device.work()
            if not vcpu_runs:
                continue
            for fd in self.vcpu.interrupts:
                self.vcpu.interrupt(fd)
            for _ in range(64):
                if self.vcpu.wait_ns():
                    break
                self.vcpu.step()

    def run(self, milliseconds: float) -> None:
        self.vcpu.run()
        self.pass_time(milliseconds)

    def report(self, name: str | None = None) -> dict[str, Any]:
        programs = {program["name"]: program for program in self.vcpu.report()["programs"]}
        return programs[name or self.programs[0]["name"]]

    def errors(self) -> list[str]:
        return [error for program in self.vcpu.report()["programs"] for error in program["errors"]]

    # Migration: RAM is copied while the machine runs, then what the logs say, and the guest goes on in the copy.

    def migrate(
        self,
        *,
        precopy_ms: float = 30,
        downtime_ms: float = 50,
        lose_vcpu_log: bool = False,
        lose_device_log: bool = False,
        keep_steps: bool = True,
    ) -> None:
        self.memory.start_log()
        for device in self.devices.values():
            device.dirty.clear()
        copy = GuestRam.create(self.ram.size)
        self.rams.append(copy)
        first, count = self.ram.data_runs()
        for start, pages in zip(first.tolist(), count.tolist(), strict=True):
            copy.pages[start : start + pages] = self.ram.pages[start : start + pages]
        self.pass_time(precopy_ms)
        self.vcpu.pause()
        state = self.vcpu.state_out()
        dirty = runs.expand(self.memory.take_log().runs())
        pages_of_devices = {page for device in self.devices.values() for page in device.dirty}
        moved = set() if lose_vcpu_log else set(dirty.tolist())
        moved |= set() if lose_device_log else pages_of_devices
        for page in moved:
            copy.pages[page] = self.ram.pages[page]
        self.pass_time(downtime_ms, vcpu_runs=False, devices_run=False)
        self.ram, self.memory = copy, GuestMemory(copy)
        self.vcpu = self._vcpu(fresh=False)
        if not keep_steps:
            state["steps"] = {}
        self.vcpu.state_in(state)
        self.vcpu.run()
