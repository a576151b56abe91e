"""Captured conversations between other implementations."""

import json
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent.parent / "data" / "vfio_user"
SOURCE, DESTINATION, QEMU = (
    DATA / f"{name}.jsonl"
    for name in ("libvfio-user-sample-source", "libvfio-user-sample-destination", "qemu-11.1.3-attach")
)


@dataclass(frozen=True)
class Captured:
    sender: str
    message_id: int
    command: int
    flags: int
    error: int
    fds: int
    body: bytes

    @property
    def is_reply(self) -> bool:
        return self.flags & 0xF == 1


def load(path: Path) -> list[Captured]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Captured(r["from"], r["id"], r["command"], r["flags"], r["error"], r["fds"], bytes.fromhex(r["body"]))
        for r in rows
    ]


def answered(path: Path) -> list[tuple[Captured, Captured]]:
    """Return each command with its reply: each side answers in order, and ids repeat."""
    pairs, open_commands = [], []
    for message in load(path):
        if not message.is_reply:
            open_commands.append(message)
            continue
        command = next(c for c in open_commands if (c.message_id, c.command) == (message.message_id, message.command))
        open_commands.remove(command)
        pairs.append((command, message))
    return pairs
