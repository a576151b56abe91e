"""All checks, in the order in which they run."""

from __future__ import annotations

# Importing a module registers its checks.
from common.conformance import (  # isort: skip
    negotiation as _negotiation,
    messages as _messages,
    description as _description,
    interrupts as _interrupts,
    dma as _dma,
    states as _states,
    migration_data as _migration_data,
    dirty_logging as _dirty_logging,
    device_dma as _device_dma,
    reconnecting as _reconnecting,
)
from common.conformance.check import Check, registered

__all__ = ["CHECKS"]

CHECKS: tuple[Check, ...] = registered()
