"""Who may call what, by the names in the caller's certificate.

That a caller has a certificate of the CA at all is TLS's business (`common.rpc.tls`); this is what comes on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import grpc

__all__ = ["ANYBODY", "Access", "caller", "is_allowed"]

HOST = "switchover.v1.HostService"
MIGRATION = "switchover.v1.MigrationService"
READ_ONLY = ("GetMachine", "WatchEvents")

_COMMON_NAME, _ALTERNATIVE_NAMES = "x509_common_name", "x509_subject_alternative_name"


@dataclass(frozen=True, slots=True)
class Access:
    """Names of those that may migrate to here, and of those that may change what is here; None: anybody's."""

    sources: frozenset[str] | None = None
    operators: frozenset[str] | None = None


ANYBODY = Access()


def is_allowed(method: str, names: Iterable[str], access: Access) -> bool:
    """Return whether a caller of these names may call a method ("/package.Service/Method").

    Health, reflection and what only looks is for all.
    """
    service, _, call = method.removeprefix("/").partition("/")
    if service == MIGRATION:
        return access.sources is None or not access.sources.isdisjoint(names)
    if service == HOST and call not in READ_ONLY and access.operators is not None:
        return not access.operators.isdisjoint(names)
    return True


def caller(context: grpc.ServicerContext) -> frozenset[str]:
    """Return the names in a caller's certificate, common and alternative ones; without TLS nobody has any."""
    shown = cast("Mapping[str, Iterable[bytes]]", context.auth_context())  # its stub is wrong
    found = (*shown.get(_COMMON_NAME, ()), *shown.get(_ALTERNATIVE_NAMES, ()))
    return frozenset(name.decode(errors="replace") for name in found)
