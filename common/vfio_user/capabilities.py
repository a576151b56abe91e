"""What the two sides of a connection tell each other in VERSION, and our extension of it.

The extension is one more capability, `switchover`. A client says that it knows it, a server then what it has of it;
nobody ever requires it, and who does not know it takes no notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

__all__ = ["EXTENSION_VERSION", "MAX_TRANSFER", "PAGE_SIZE", "Capabilities", "Extension", "TwinSocket"]

MAX_TRANSFER: Final = 1 << 20
"""Bytes of data in one message that we accept and announce; also what holds for a side that announces nothing."""

PAGE_SIZE: Final = 4096
"""The page size, in bytes, that all known servers insist on."""

EXTENSION_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Extension:
    """What a server of ours can do beyond the protocol; of a client's, only that it is there counts.

    `precopy_info` and `data_size`: it says how much there is to read in PRE_COPY and STOP_COPY. `p2p`: it has the P2P
    states. `report_ranges`: it logs the ranges of START only, and REPORT takes any part of them, at any page size.
    `comparable_dump`: equal states give equal STOP_COPY data. `iommu_dirty`: it plays the IOMMU in front of the device,
    which keeps dirty bits apart from the device's own log (codec.IOMMU_DIRTY_START and the two after it).
    `trace`: it keeps a journal of its writes (codec.WRITE_JOURNAL).
    """

    precopy_info: bool = True
    data_size: bool = True
    p2p: bool = True
    report_ranges: bool = True
    comparable_dump: bool = True
    iommu_dirty: bool = False
    trace: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the value of the capability."""
        return {"version": EXTENSION_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Extension | None:
        """Read the capability: None if it is of another version; what it does not mention is not there."""
        if not isinstance(value, Mapping) or value.get("version") != EXTENSION_VERSION:
            return None
        return cls(**{name: value.get(name) is True for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class TwinSocket:
    """The capability `twin_socket` of libvfio-user: a socket of their own for the server's commands.

    A client offers it; a server that takes it says which of the reply's descriptors is the socket: `fd_index`.
    """

    fd_index: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the value of the capability."""
        return {"supported": True} | ({} if self.fd_index is None else {"fd_index": self.fd_index})

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> TwinSocket | None:
        """Read the capability: None if it is not supported."""
        if members.get("supported") is not True:
            return None
        return cls(_number(members, "fd_index", 0, low=0) if "fd_index" in members else None)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capabilities of one side, those that matter here (vfio-user: "capabilities" in VERSION).

    `max_msg_fds`: descriptors that it takes with one message. `max_data_xfer_size`: bytes of data that it takes in one
    message. `migration_page_size`: bytes, None where it has no migration.
    """

    max_msg_fds: int = 1
    max_data_xfer_size: int = MAX_TRANSFER
    migration_page_size: int | None = None
    extension: Extension | None = None
    twin_socket: TwinSocket | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the whole document."""
        members: dict[str, Any] = {"max_msg_fds": self.max_msg_fds, "max_data_xfer_size": self.max_data_xfer_size}
        if self.migration_page_size is not None:
            members["migration"] = {"pgsize": self.migration_page_size}
        if self.twin_socket is not None:
            members["twin_socket"] = self.twin_socket.to_json()
        if self.extension is not None:
            members["switchover"] = self.extension.to_json()
        return {"capabilities": members}

    @classmethod
    def from_json(cls, document: Any) -> Capabilities:
        """Read a document; what it does not mention has its default; ValueError if it makes no sense."""
        members = _object(_object({"document": document}, "document"), "capabilities")
        migration = _object(members, "migration") if "migration" in members else None
        return cls(
            max_msg_fds=_number(members, "max_msg_fds", 1, low=0),
            max_data_xfer_size=_number(members, "max_data_xfer_size", MAX_TRANSFER, low=1),
            migration_page_size=None if migration is None else _number(migration, "pgsize", PAGE_SIZE, low=1),
            twin_socket=TwinSocket.from_json(_object(members, "twin_socket")),
            extension=Extension.from_json(members.get("switchover")),
        )


def _object(members: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    match members.get(name, {}):
        case Mapping() as value:
            return value
        case value:
            raise ValueError(f"the capability {name} is {value!r}, not an object")


def _number(members: Mapping[str, Any], name: str, default: int, *, low: int) -> int:
    value = members.get(name, default)
    if type(value) is int and value >= low:
        return value
    raise ValueError(f"the capability {name} is {value!r}, not a number from {low}")
