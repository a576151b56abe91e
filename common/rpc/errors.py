"""Errors on the wire: a status code for gRPC, a reason for programs, a sentence for people.

::

    RefusalError                  what a servicer raises; becomes a status with an ErrorInfo
    PeerError                what a caller gets back; made from any failure of a call by `peer_error`

Reasons are part of the contract (docs/protocol.md): a caller may act on PROTOCOL_VERSION or HAS_MACHINE, never on text.
"""

from __future__ import annotations

import re
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

__all__ = ["PeerError", "RefusalError", "describe", "peer_error", "status_of"]

DOMAIN = "switchover"
MAX_MESSAGE = 600  # characters of a message
_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,62}")  # as google.rpc.ErrorInfo has it


class RefusalError(Exception):
    """A call is refused; nothing of it was done."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class PeerError(Exception):
    """A call has failed; `reason` says why in the contract's words, or is the status code's name."""

    def __init__(self, reason: str, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code


def status_of(refusal: RefusalError) -> Any:
    """Return the rich status for a refusal, for `ServicerContext.abort_with_status`."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN))
    number = code_pb2.Code.Value(refusal.code.name)
    # What the message quotes may be anything that a peer has sent, and trailing metadata has 8 KiB.
    return rpc_status.to_status(status_pb2.Status(code=number, message=_first_line(str(refusal)), details=[detail]))


def describe(error: grpc.RpcError) -> tuple[str, str]:
    """Return (reason, message) of a failed call: one line, fit for a person."""
    failure = peer_error(error)
    return failure.reason, str(failure)


def peer_error(error: grpc.RpcError) -> PeerError:
    """Return what a failed call means."""
    code: grpc.StatusCode = error.code()
    text = str(error.details() or code.name)
    reason = _reason_of(error)
    if reason is not None:
        return PeerError(reason, _first_line(text), code)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return PeerError("NOT_SWITCHOVER", "what answers there is not a Switchover daemon that can do this", code)
    if code is grpc.StatusCode.UNAVAILABLE and "HTTP/2" in text:
        return PeerError("NOT_SWITCHOVER", "what answers there is not a Switchover daemon", code)
    if code is grpc.StatusCode.UNAVAILABLE:
        return PeerError("UNREACHABLE", f"cannot be reached: {_tls_failure(text) or _first_line(text)}", code)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerError("NO_ANSWER", "has not answered in time", code)
    return PeerError(code.name, _first_line(text), code)


def _reason_of(error: grpc.RpcError) -> str | None:
    try:
        status = rpc_status.from_call(error) if hasattr(error, "trailing_metadata") else None
        for detail in status.details if status is not None else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == DOMAIN and _REASON.fullmatch(info.reason):
                return str(info.reason)
    except (DecodeError, ValueError):
        pass  # whoever answers so is none of ours: what the status itself says must do
    return None


def _tls_failure(text: str) -> str | None:
    """Return what went wrong with TLS while connecting; None if it is something else.

    gRPC has no code for it: the names are BoringSSL's, and its own. A server that wants TLS, or another certificate,
    says nothing at all.
    """
    untrusted = re.search(r"CERTIFICATE_VERIFY_FAILED(: [^:]+)?", text)
    if untrusted is not None:
        return f"TLS: the daemon's certificate is not trusted{untrusted[1] or ''}"
    if "Hostname Verification Check failed" in text:
        return "TLS: the daemon's certificate is for other names than that of this address"
    if "WRONG_VERSION_NUMBER" in text:
        return "TLS: the daemon speaks no TLS"
    if "handshake failed" in text:
        return f"TLS: {_first_line(text)}"
    if "failed to connect" in text and ("Socket closed" in text or "Connection reset" in text):
        return "it hangs up at once; if it speaks TLS, it wants --tls with a certificate of its CA"
    return None


def _first_line(text: str) -> str:
    """Return what a person may be shown of a text that somebody else wrote: one line, printable, not too long."""
    line = text.strip().splitlines()[0] if text.strip() else "no details"
    if len(line) > MAX_MESSAGE:
        line = line[: MAX_MESSAGE - 1] + "…"
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
