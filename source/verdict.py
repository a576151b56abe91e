"""The verifier's verdict: what was compared, and for a page that differs who could have written it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from switchover.v1 import host_pb2, migration_pb2

from common.machine.device import Digest
from common.machine.fields import shown
from common.memory.layout import CHUNK_PAGES, PAGE_SIZE, Layout
from source.history import History

__all__ = ["DataLossError", "check_unchanged", "device_digest", "judge_devices", "judge_memory"]

EXPLAINED_PAGES = 16
Digests = npt.NDArray[np.uint64]


class DataLossError(Exception):
    """What arrived is not what was here."""


def device_digest(name: str, digest: Digest) -> migration_pb2.DeviceDigest:
    """Return a device's digest for the wire."""
    return migration_pb2.DeviceDigest(
        name=name, config=digest.config, bars=digest.bars, dump=digest.dump, compared=digest.compared
    )


def judge_memory(
    mismatches: Iterable[migration_pb2.ChunkMismatch],
    page_digests: Callable[[int], Digests],
    layout: Layout,
    history: History,
    dma_writers: Callable[[int], list[str]],
    result: host_pb2.MigrationResult,
) -> None:
    """Name the pages that differ, with their history; raise `DataLossError` if there are any.

    `page_digests` reads a chunk of our RAM page by page; `dma_writers` says who could have written a page by DMA.
    """
    pages: list[int] = []
    chunks: list[int] = []
    for mismatch in mismatches:
        if mismatch.chunk >= layout.pages // CHUNK_PAGES:
            raise DataLossError(f"the destination reports a difference in chunk {mismatch.chunk}, which is not in RAM")
        chunks.append(mismatch.chunk)
        if len(mismatch.page_digests) == CHUNK_PAGES * 8:
            theirs = np.frombuffer(mismatch.page_digests, "<u8")
            differ = np.flatnonzero(page_digests(mismatch.chunk) != theirs)
            pages += (mismatch.chunk * CHUNK_PAGES + differ).tolist()
    if not chunks:
        return
    if not pages:
        raise DataLossError(
            f"{len(chunks)} chunks of 2 MiB at the destination differ from the source's, the first at GPA "
            f"{layout.gpa_of(chunks[0] * CHUNK_PAGES * PAGE_SIZE):#x}{_suspects(chunks, dma_writers)}"
        )
    result.mismatched_pages = len(pages)
    result.mismatches.extend(
        host_pb2.PageMismatch(
            page=page,
            gpa=layout.gpa_of(page * PAGE_SIZE),
            sent_in_rounds=history.rounds_that_sent(page),
            reported=history.reports_of(page),
            could_have_written=["vcpu", *dma_writers(page)],
        )
        for page in pages[:EXPLAINED_PAGES]
    )
    first = result.mismatches[0]
    writers = ", ".join(first.could_have_written)
    raise DataLossError(
        f"{len(pages)} pages at the destination differ from the source's, the first at GPA {first.gpa:#x}; "
        f"it could have been written by: {writers}"
    )


def _suspects(chunks: Sequence[int], dma_writers: Callable[[int], list[str]]) -> str:
    """Name who could have written to the first of the chunks by DMA; whether it was they is not known."""
    for page in range(chunks[0] * CHUNK_PAGES, (chunks[0] + 1) * CHUNK_PAGES):
        if writers := dma_writers(page):
            return f"; pages of it could have been written by: vcpu, {', '.join(writers)}"
    return "; only vCPUs could have written to it"


def judge_devices(response: migration_pb2.VerifyResponse, result: host_pb2.MigrationResult) -> None:
    """Note for each device how it was verified; raise `DataLossError` if one differs."""
    differing = {shown(mismatch.name): shown(mismatch.what) for mismatch in response.devices}
    for device in result.devices:
        if device.name in differing:
            device.verified = "differs"
        else:
            device.verified = "compared" if device.name in response.compared_devices else "transport"
    if differing:
        named = ", ".join(f"{name} ({what})" for name, what in differing.items())
        raise DataLossError(f"devices at the destination differ from the source's: {named}")
    all_compared = all(device.verified == "compared" for device in result.devices)
    result.verified = "true" if all_compared else "transport"


def check_unchanged(stopped: Digests, later: Digests, late_writes: Callable[[int, int], list[str]]) -> None:
    """Compare two readings of RAM that should have stood still; raise `DataLossError` if it did not.

    `late_writes` says what is known of the writes to so many pages from a first one.
    """
    changed = np.flatnonzero(stopped != later)
    if changed.size:
        raise DataLossError(
            f"{changed.size} chunks of 2 MiB of the stopped machine's RAM changed after the last transfer, "
            f"the first is chunk {changed[0]}: it was written after the machine was stopped"
            + "".join(f"; {line}" for line in late_writes(int(changed[0]) * CHUNK_PAGES, CHUNK_PAGES))
        )
