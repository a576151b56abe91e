"""Captured conversations between other implementations."""

from pathlib import Path

from common.vfio_user.transcript import Recorded, pair, read

DATA = Path(__file__).parent.parent / "data" / "vfio_user"
SOURCE, DESTINATION, QEMU = (
    DATA / f"{name}.jsonl"
    for name in ("libvfio-user-sample-source", "libvfio-user-sample-destination", "qemu-11.1.3-attach")
)


def load(path: Path) -> list[Recorded]:
    with path.open("rb") as lines:
        return read(lines)


def answered(path: Path) -> list[tuple[Recorded, Recorded]]:
    """Return each command with its reply."""
    messages = load(path)
    return [(messages[command], messages[reply]) for command, reply in pair(messages).items()]
