"""QEMU's vfio-user-pci attaches our devices, and its guest uses them: interrupts by pin and vector, DMA."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from our_device import COMMAND, serving
from qemu import running

from common.datasheets import accelerator, nic, nvme, pattern, pci, sample

pytestmark = pytest.mark.interop

SHARED = ("-M", "q35,memory-backend=ram", "-object")
RAM: Mapping[str, tuple[str, ...]] = {
    "mapped": (*SHARED, "memory-backend-memfd,id=ram,size=64M,share=on"),
    "a file that can shrink": (*SHARED, "memory-backend-file,id=ram,size=64M,share=on,mem-path={directory}/ram"),
    "by message": ("-M", "q35"),
}
REGISTERS, TABLE = (pci.REGISTERS_BAR, pci.REGISTERS_SIZE), (pci.MSIX_BAR, pci.MSIX_BAR_SIZE)
BARS = {
    "nic": [REGISTERS, TABLE],
    "nvme": [REGISTERS, TABLE],
    "accelerator": [REGISTERS, (pci.MEMORY_BAR, 16 << 20), TABLE],
    "sample": [(sample.TIMER_BAR, sample.TIMER_BAR_SIZE), (sample.MEMORY_BAR, sample.MEMORY_BAR_SIZE)],
}
IDS = {
    "nic": (pci.VENDOR_ID, nic.DEVICE_ID),
    "nvme": (pci.VENDOR_ID, nvme.DEVICE_ID),
    "accelerator": (pci.VENDOR_ID, accelerator.DEVICE_ID),
    "sample": (sample.VENDOR_ID, sample.DEVICE_ID),
}
MAGICS = {"nic": nic.MAGIC, "nvme": nvme.MAGIC, "accelerator": accelerator.MAGIC}


@pytest.mark.parametrize("kind", sorted(BARS))
def test_its_guest_sees_a_pci_device(qemu: Path, tmp_path: Path, kind: str) -> None:
    socket = tmp_path / "device.sock"
    with serving((*COMMAND, kind, "--socket"), socket):
        for _ in range(2):  # the server is there for the next client too
            with running(qemu, tmp_path, socket, *RAM["mapped"]) as machine:
                device = machine.pci()
                assert (device["id"]["vendor"], device["id"]["device"]) == IDS[kind]
                assert device["irq_pin"] == 1
                regions = device["regions"]
                assert [(region["bar"], region["size"]) for region in regions] == BARS[kind]
                assert all(region["type"] == "memory" for region in regions)
                assert [bool(region["mem_type_64"]) for region in regions] == [
                    region["bar"] == pci.MEMORY_BAR for region in regions
                ]
                if kind in MAGICS:
                    assert machine.read_words(regions[0]["address"] + pci.ID, 1) == [MAGICS[kind]]


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """The guest of guest.S."""
    tools = {name: shutil.which(name) for name in ("as", "ld", "nm")}
    if None in tools.values():
        pytest.skip("the guest program needs binutils: as, ld, nm")
    path = tmp_path / "guest"
    source = Path(__file__).with_name("guest.S")
    subprocess.run(["as", "--32", "-o", tmp_path / "guest.o", source], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x100000", "-o", path, tmp_path / "guest.o"], check=True)
    return path


def address_of(guest: Path, symbol: str) -> int:
    symbols = subprocess.run(["nm", guest], check=True, capture_output=True, text=True).stdout
    return next(int(line.split()[0], 16) for line in symbols.splitlines() if line.split()[-1] == symbol)


@pytest.mark.parametrize("ram", sorted(RAM))
def test_its_guest_uses_a_nic(qemu: Path, guest: Path, tmp_path: Path, ram: str) -> None:
    socket = tmp_path / "device.sock"
    options = [option.format(directory=tmp_path) for option in RAM[ram]]
    console = ("-global", "isa-debugcon.iobase=0xe9", "-kernel", str(guest))
    with (
        serving((*COMMAND, "nic", "--socket"), socket),
        running(qemu, tmp_path, socket, *options, *console) as machine,
    ):
        machine.wait(lambda: machine.console.exists() and machine.console.read_text().endswith("."), "the guest hangs")
        # The pin has interrupted, then the vector, and each time there was a packet.
        assert machine.console.read_text() == "IM."
        packets = address_of(guest, "packets")
        for number in range(2):
            packet = machine.read_memory(packets + number * 2048, 1500, tmp_path)
            assert packet == pattern.block(number, 1500)
        entries = machine.read_memory(address_of(guest, "ring") + pci.RING_HEADER, 2 * nic.ENTRY.itemsize, tmp_path)
        assert [int.from_bytes(entries[at : at + 8], "little") for at in (16, 48)] == [0, 1]  # sequence numbers
        assert machine.read_words(machine.pci()["regions"][0]["address"] + pci.HEAD, 1) == [2]
