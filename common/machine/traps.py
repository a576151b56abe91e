"""What the guest cannot do alone: accesses to BARs, the vIOMMU, enabling a device. The vCPU waits for each answer."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common import hooks
from common.ipc.channel import Handler, Message, RequestError
from common.machine.board import Bar

if TYPE_CHECKING:
    from common.machine.machine import Machine

__all__ = ["traps"]

MAX_BLOCK = 1 << 20


def traps(machine: Machine) -> dict[str, Handler]:
    """Return the handlers of a machine's traps."""

    def bar_of(request: Message) -> tuple[Bar, int, int]:
        gpa, size = int(request["gpa"]), int(request["size"])
        bar = machine.board.find(gpa, size)
        if bar is None or not 0 < size <= MAX_BLOCK:
            raise OSError(errno.EFAULT, f"no BAR at guest physical address {gpa:#x} + {size:#x}")
        return bar, gpa - bar.gpa, size

    def mmio_read(request: Message) -> dict[str, int]:
        bar, offset, size = bar_of(request)
        data = machine.devices[bar.device].client.region_read(bar.index, offset, size)
        return {"value": int.from_bytes(data, "little")}

    def mmio_write(request: Message) -> None:
        bar, offset, size = bar_of(request)
        data = int(request["value"]).to_bytes(size, "little")
        machine.devices[bar.device].client.region_write(bar.index, offset, data)

    def mmio_block_read(request: Message) -> Message:
        bar, offset, size = bar_of(request)
        return Message(payload=machine.devices[bar.device].client.region_read(bar.index, offset, size))

    def mmio_block_write(request: Message) -> None:
        data = memoryview(request.payload)
        bar = machine.board.find(int(request["gpa"]), len(data))
        if bar is None or not 0 < len(data) <= MAX_BLOCK:
            raise OSError(errno.EFAULT, f"no BAR at guest physical address {request['gpa']:#x} + {len(data):#x}")
        machine.devices[bar.device].client.region_write(bar.index, int(request["gpa"]) - bar.gpa, data)

    def iommu_map(request: Message) -> None:
        hooks.reach("machine.map")
        machine.containers[request["container"]].map(
            request["iova"],
            request["size"],
            request["gpa"],
            readable=request["readable"],
            writable=request["writable"],
        )

    def iommu_unmap(request: Message) -> None:
        hooks.reach("machine.unmap")
        machine.containers[request["container"]].unmap(request["iova"], request["size"])

    def irq_enable(request: Message) -> None:
        machine.devices[request["device"]].guest_enable()

    def irq_unmask(request: Message) -> None:
        machine.devices[request["device"]].unmask()

    def device_reset(request: Message) -> None:
        hooks.reach("machine.device_reset")
        machine.reset_device(request["device"])

    handlers = (
        mmio_read,
        mmio_write,
        mmio_block_read,
        mmio_block_write,
        iommu_map,
        iommu_unmap,
        irq_enable,
        irq_unmask,
        device_reset,
    )
    return {handler.__name__: _refusing(handler) for handler in handlers}


def _refusing(handler: Handler) -> Handler:
    """Refuse what a guest must not ask for, instead of taking it for a defect of the machine."""

    def refusing(request: Message) -> Message | Mapping[str, Any] | None:
        try:
            return handler(request)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RequestError("EINVAL", f"{type(error).__name__}: {error}") from error

    return refusing
