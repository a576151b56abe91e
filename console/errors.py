"""What a command says when it cannot do what it was asked."""

from __future__ import annotations

from console.exit_codes import ExitCode

__all__ = ["CommandError"]


class CommandError(Exception):
    """One line for people, an exit code for scripts, and a daemon's reason where it gave one."""

    def __init__(self, message: str, code: ExitCode, reason: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
