"""Configuration space as bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.machine.pci_config import COMMAND, MSI, MSIX, Register, capability, guest_registers


def config(*capabilities: tuple[int, int, int], status: int = 0x10) -> bytearray:
    made = bytearray(256)
    made[0x06] = status
    made[0x34] = capabilities[0][0] if capabilities else 0
    for offset, identity, following in capabilities:
        made[offset : offset + 2] = bytes([identity, following])
    return made


def test_capabilities_are_found() -> None:
    chain = config((0x40, 0x01, 0x50), (0x50, MSI, 0x70), (0x70, MSIX, 0))
    assert capability(bytes(chain), MSIX) == 0x70
    assert capability(bytes(chain), MSI) == 0x50
    assert capability(bytes(chain), 0x10) is None


def test_without_the_status_bit_there_are_none() -> None:
    assert capability(bytes(config((0x40, MSIX, 0), status=0)), MSIX) is None


def test_a_chain_that_loops_or_leads_into_the_header() -> None:
    assert capability(bytes(config((0x40, 1, 0x50), (0x50, 2, 0x40))), MSIX) is None
    assert capability(bytes(config((0x40, 1, 0x10))), 0) is None


def test_command_is_the_last_that_is_restored() -> None:
    registers = guest_registers(bytes(config((0x40, MSI, 0x60), (0x60, MSIX, 0))))
    assert registers[-1] == Register(COMMAND, 2)
    assert registers[:6] == [Register(0x10 + 4 * bar, 4) for bar in range(6)]
    # The vectors' address and data before the bit that enables them.
    assert registers.index(Register(0x44, 4)) < registers.index(Register(0x48, 2)) < registers.index(Register(0x42, 2))
    assert Register(0x62, 2) in registers


def test_msi_with_64_bits_and_masks() -> None:
    made = config((0x40, MSI, 0))
    made[0x42] = 0x80
    made[0x43] = 0x01
    registers = guest_registers(bytes(made))
    assert {Register(0x44, 4), Register(0x48, 4), Register(0x4C, 2), Register(0x50, 4)} <= set(registers)


@given(st.binary(min_size=256, max_size=256))
def test_whatever_a_device_says(content: bytes) -> None:
    for offset, size in guest_registers(content):
        assert 0 < size <= 4 and offset + size <= 256
