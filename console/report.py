"""How a migration ended, as documented JSON (README.md, "What the numbers mean")."""

from __future__ import annotations

from typing import Any

from switchover.v1.host_pb2 import MigrationResult

from console.daemon import plain_data

__all__ = ["report"]


def report(result: MigrationResult) -> dict[str, Any]:
    """Return the report: times in milliseconds, sizes in bytes, null where there is nothing to tell."""
    plain = plain_data(result)
    measured = result.guest_gap_ms >= 0
    stood_still = result.downtime_ms > 0
    containers = plain["dirty_tracking"]
    return {
        "result": result.result,
        "verified": _verified(result.verified),
        "verify": result.verify,
        "lane_kind": result.lane_kind,
        "error": result.error or None,
        "reason": result.reason or None,
        "session_id": result.session_id,
        "machine_uuid": result.machine_uuid,
        "destination": result.destination,
        "machine_is_at": result.owner,
        "paused": result.paused,
        "total_ms": plain["total_ms"],
        "setup_ms": plain["setup_ms"],
        "max_downtime_ms": plain["max_downtime_ms"],
        "expected_downtime_ms": plain["expected_downtime_ms"] if result.expected_downtime_ms >= 0 else None,
        "downtime_ms": plain["downtime_ms"] if stood_still else None,
        "downtime": plain_data(result.downtime) if stood_still else None,
        "guest_gap_ms": plain["guest_gap_ms"] if measured else None,
        "guest_gap_error_ms": plain["guest_gap_error_ms"] if measured else None,
        "reconnects": result.reconnects,
        "disconnected_ms": plain["disconnected_ms"],
        "rounds": plain["rounds"],
        "throttle_percent": result.throttle_percent,
        "ram": plain_data(result.ram),
        "devices": plain["devices"],
        "mappings": result.mappings,
        "dirty_tracking": {
            "method": _common([container["method"] for container in containers], "mixed"),
            "reason": _common([container["reason"] for container in containers], "see containers"),
            "containers": containers,
        },
        "mismatched_pages": result.mismatched_pages,
        "mismatches": plain["mismatches"],
    }


def _verified(value: str) -> bool | str:
    # Whatever a newer daemon may call it: only "true" means that everything was compared.
    return value if value == "transport" else value == "true"


def _common(values: list[str], otherwise: str) -> str | None:
    if not values:
        return None
    return values[0] if len(set(values)) == 1 else otherwise
