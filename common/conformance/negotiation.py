"""VERSION, the first message of every conversation."""

from __future__ import annotations

import json
import struct

from common.conformance.check import Failure, check
from common.conformance.device import parsed
from common.conformance.lab import Lab
from common.vfio_user.codec import Command, Version
from common.vfio_user.description import DeviceInfo


def _version(major: int, minor: int, text: bytes) -> bytes:
    return struct.pack("<HH", major, minor) + text


def _document(**more: object) -> bytes:
    return json.dumps({"capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20, **more}}).encode() + b"\0"


@check(
    "VERSION is answered with major version 0, a minor version not above the client's, and capabilities that are JSON "
    "with a NUL at its end."
)
def version(lab: Lab) -> str:
    """Negotiate as a client of today does."""
    device = lab.connect()
    answer = device.negotiate(minor=2)
    if answer.minor > 2:
        raise Failure(f"minor version 2 is answered with {answer.minor}")
    found = answer.capabilities
    migration = f", migration page size {found.migration_page_size}" if found.migration_page_size else ""
    return (
        f"version 0.{answer.minor}, {found.max_msg_fds} descriptors and {found.max_data_xfer_size} bytes of data in a "
        f"message{migration}"
    )


@check("The minor version that both use is the smaller one of the two.")
def older_client(lab: Lab) -> None:
    """Negotiate as a client of minor version 0."""
    answer = lab.connect().negotiate(minor=0)
    if answer.minor != 0:
        raise Failure(f"minor version 0 is answered with {answer.minor}")


@check("A major version that the server does not know is refused: the two have no common protocol.")
def major_version(lab: Lab) -> str:
    """Ask for version 1."""
    device = lab.connect()
    body = _version(1, 0, _document())
    return lab.refused_or_closed("major version 1", lambda: device.ask(Command.VERSION, body).error)


@check("Capabilities may be left out: the defaults hold then.")
def no_capabilities(lab: Lab) -> None:
    """Send nothing but the numbers."""
    parsed(Version.unpack, lab.connect().accepted(Command.VERSION, _version(0, 2, b"")).body)


@check("Capabilities that a server does not know are passed over.")
def unknown_capability(lab: Lab) -> None:
    """Send one that nobody knows."""
    device = lab.connect()
    body = _version(0, 2, _document(perhaps_one_day={"version": 7}))
    parsed(Version.unpack, device.accepted(Command.VERSION, body).body)


@check("Capabilities that are no JSON are refused.")
def no_json(lab: Lab) -> str:
    """Send half an object."""
    device = lab.connect()
    body = _version(0, 2, b'{"capabilities": {"max_msg_fds"\0')
    return lab.refused_or_closed("half a JSON object", lambda: device.ask(Command.VERSION, body).error)


@check("VERSION comes first: before it no other command is carried out.")
def version_first(lab: Lab) -> str:
    """Ask for the device's description without having negotiated."""
    device = lab.connect()
    body = DeviceInfo().pack()
    return lab.refused_or_closed(
        "DEVICE_GET_INFO before VERSION", lambda: device.ask(Command.DEVICE_GET_INFO, body).error
    )
