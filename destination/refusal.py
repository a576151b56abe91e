"""How a destination says that what came is not what the protocol wants."""

from __future__ import annotations

import grpc

from common.rpc.errors import RefusalError

__all__ = ["bad"]


def bad(message: str) -> RefusalError:
    """Return the refusal of a request or message that is malformed, out of order, or cannot be meant."""
    return RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", message)
