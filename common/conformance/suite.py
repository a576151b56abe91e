"""All checks, in the order in which they run."""

from __future__ import annotations

import importlib

from common.conformance.check import Check, registered

__all__ = ["CHECKS", "SUBJECTS"]

SUBJECTS = {
    "negotiation": "VERSION, the first message",
    "messages": "headers, sizes, pieces",
    "description": "what a device consists of",
    "regions": "reading and writing them",
    "interrupts": "SET_IRQS and reset",
    "dma": "mappings, and DMA by message",
    "states": "the state machine of the migration",
    "migration-data": "the state as it moves",
    "dirty-logging": "the DMA log, device at rest",
    "device-dma": "the DMA log, device at work",
    "reconnecting": "what a client leaves behind",
}
"""What the modules of checks are about, in their order; importing one registers its checks."""

for _subject in SUBJECTS:
    importlib.import_module(f"common.conformance.{_subject.replace('-', '_')}")

_ORDER = list(SUBJECTS)
CHECKS: tuple[Check, ...] = tuple(sorted(registered(), key=lambda check: _ORDER.index(check.subject)))
