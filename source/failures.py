"""What a migration may end with before its time, and how that is told."""

from __future__ import annotations

from common.ipc.channel import ClosedError, RequestError
from common.rpc.errors import PeerError
from source.commit import NotStartedError, ResolvedError, RevokedError, UndecidedError
from source.counterparts import DeviceDiffersError
from source.state_streams import EndlessStateError
from source.verdict import DataLossError

__all__ = ["CancelledError", "NotConvergedError", "explain"]


class CancelledError(Exception):
    """The operator has cancelled the migration."""


class NotConvergedError(Exception):
    """A limit was reached before the machine could be switched over within the accepted downtime."""


def explain(error: Exception, destination: str) -> tuple[str, str]:
    """Return the reason, for programs, and the sentence, for people, of a failure (docs/protocol.md)."""
    match error:
        case CancelledError():
            return "CANCELLED", str(error)
        case NotConvergedError():
            return "NOT_CONVERGED", str(error)
        case DataLossError():
            return "DATA_LOSS", str(error)
        case DeviceDiffersError():
            return "DEVICE_DIFFERS", str(error)
        case EndlessStateError():
            return "ENDLESS_STATE", str(error)
        case RevokedError():
            return "REVOKED", str(error)
        case ResolvedError():
            return "RESOLVED", str(error)
        case NotStartedError():
            return "NOT_STARTED", str(error)
        case UndecidedError():
            return "UNDECIDED", str(error)
        case PeerError():
            return error.reason, f"{destination}: {error}"
        case RequestError():
            return error.reason, str(error)
        case ClosedError():
            return "MACHINE_GONE", "the machine process has ended"
        case OSError():
            return "IO", str(error)
    return "INTERNAL", f"{type(error).__name__}: {error}"
