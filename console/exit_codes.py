"""What the command's exit code says to a script."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # protobuf takes longer to import than --help may
    from switchover.v1.host_pb2 import MigrationResult

__all__ = ["ExitCode", "exit_code_of"]


class ExitCode(IntEnum):
    """Exit codes of `switchover`; they are part of its interface and never change their meaning."""

    COMPLETED = 0  # done what was asked
    FAILED = 1  # a migration failed, a daemon refused a request, or a check of a device failed
    USAGE = 2  # wrong arguments or a wrong machine file
    CANCELLED = 3  # the migration was cancelled; the machine goes on at the source
    NOT_CONVERGED = 4  # the migration reached a limit before it converged; the machine goes on at the source
    VERIFICATION_FAILED = 5  # memory or a device differs at the destination (DATA_LOSS)
    UNREACHABLE = 6  # the daemon, or the device to check, cannot be reached, or what answers is none


def exit_code_of(result: MigrationResult) -> ExitCode:
    """Return the exit code for how a migration ended: a lost page outweighs everything else."""
    if result.reason == "DATA_LOSS" or result.mismatched_pages:
        return ExitCode.VERIFICATION_FAILED
    if result.result == "completed":
        return ExitCode.COMPLETED
    if result.reason == "NOT_CONVERGED":
        return ExitCode.NOT_CONVERGED
    return ExitCode.CANCELLED if result.result == "cancelled" else ExitCode.FAILED
