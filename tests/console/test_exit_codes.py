from __future__ import annotations

import pytest
from switchover.v1.host_pb2 import MigrationResult

from console.exit_codes import ExitCode, exit_code_of


def test_the_numbers_are_an_interface() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "COMPLETED": 0,
        "FAILED": 1,
        "USAGE": 2,
        "CANCELLED": 3,
        "NOT_CONVERGED": 4,
        "VERIFICATION_FAILED": 5,
        "UNREACHABLE": 6,
    }


@pytest.mark.parametrize(
    ("result", "reason", "mismatched", "code"),
    [
        ("completed", "", 0, ExitCode.COMPLETED),
        ("completed", "", 3, ExitCode.VERIFICATION_FAILED),
        ("failed", "DATA_LOSS", 0, ExitCode.VERIFICATION_FAILED),
        ("failed", "UNREACHABLE", 0, ExitCode.FAILED),
        ("failed", "NOT_CONVERGED", 0, ExitCode.NOT_CONVERGED),
        ("cancelled", "NOT_CONVERGED", 0, ExitCode.NOT_CONVERGED),
        ("cancelled", "CANCELLED", 0, ExitCode.CANCELLED),
        ("something new", "", 0, ExitCode.FAILED),
    ],
)
def test_how_a_migration_ended(result: str, reason: str, mismatched: int, code: ExitCode) -> None:
    assert exit_code_of(MigrationResult(result=result, reason=reason, mismatched_pages=mismatched)) is code
