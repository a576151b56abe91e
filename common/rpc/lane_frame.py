"""What is said on a TCP page lane, as bytes: no socket here. docs/protocol.md has it byte for byte.

The source says hello with its token. Then batches go one way, each a header of fixed size, run numbers, zero bits and
payload, and acks come back the other way. All numbers are little-endian. Sizes are checked when a header is read, so
that nothing is allocated for what cannot be; whether the batch makes sense is not looked at: see
`common.memory.pages.check`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.ipc.channel import Buffer
from common.memory.compression import MAX_UNIT_PAGES
from common.memory.pages import MAX_PAGES, MAX_PAYLOAD, MAX_RUNS, PageBatch

__all__ = [
    "HEADER_SIZE",
    "HELLO_SIZE",
    "TOKEN_SIZE",
    "AckReader",
    "Header",
    "LaneRefusedError",
    "pack_ack",
    "pack_batch",
    "pack_end",
    "pack_hello",
    "pack_refusal",
    "parse_header",
    "parse_hello",
]

TOKEN_SIZE = 32
MAX_REASON = 1024
_MAGIC = b"SWPL"
_VERSION = 1
_HELLO = struct.Struct(f"<4sI{TOKEN_SIZE}s")
_HEADER = struct.Struct("<QIIIIQIIII")
_ACK = struct.Struct("<Q")
_REFUSED = 0xFFFF_FFFF_FFFF_FFFF
_REASON = struct.Struct("<H")
HELLO_SIZE = _HELLO.size
HEADER_SIZE = _HEADER.size


class LaneRefusedError(Exception):
    """The destination has ended the lane; `reason` is for programs, the text for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Header:
    """A batch that is coming: what `PageBatch` has of its own, and how long its parts are."""

    sequence: int
    round: int
    encoding: int
    runs: int
    zero_bytes: int
    payload_bytes: int
    unchanged_bytes: int
    equal_bytes: int
    delta_bytes: int
    equal_to: int

    @property
    def body_bytes(self) -> int:
        """Size of page numbers and bits, which come before the payload."""
        return self.runs * 16 + self.equal_to * 8 + sum(self._bits)

    @property
    def _bits(self) -> tuple[int, int, int, int]:
        return self.zero_bytes, self.unchanged_bytes, self.equal_bytes, self.delta_bytes

    def batch(self, body: bytes, payload: Sequence[Buffer]) -> PageBatch:
        """Return the batch that has this header."""
        end = self.runs * 16 + self.equal_to * 8
        bits = []
        for size in self._bits:
            bits.append(body[end : end + size])
            end += size
        zero, unchanged, equal, delta = bits
        return PageBatch(
            sequence=self.sequence,
            round=self.round,
            encoding=self.encoding,
            run_first=np.frombuffer(body, "<u8", self.runs),
            run_pages=np.frombuffer(body, "<u8", self.runs, self.runs * 8),
            zero=zero,
            payload=payload,
            unchanged=unchanged,
            equal=equal,
            delta=delta,
            equal_to=np.frombuffer(body, "<u8", self.equal_to, self.runs * 16),
        )


def pack_hello(token: bytes) -> bytes:
    """Return what the source begins with."""
    return _HELLO.pack(_MAGIC, _VERSION, token)


def parse_hello(data: Buffer) -> bytes:
    """Return the token of a hello of `HELLO_SIZE` bytes; ValueError if it is none, or of another version."""
    magic, version, token = _HELLO.unpack(data)
    if magic != _MAGIC:
        raise ValueError("no page lane: it does not begin as one")
    if version != _VERSION:
        raise ValueError(f"a page lane of version {version}, not {_VERSION}")
    return bytes(token)


def pack_batch(batch: PageBatch) -> list[Buffer]:
    """Return a batch in parts; those of the payload are its own."""
    bits = (batch.zero, batch.unchanged, batch.equal, batch.delta)
    header = _HEADER.pack(
        *(batch.sequence, batch.round, batch.encoding, batch.run_first.size, len(batch.zero), batch.payload_bytes),
        *(*map(len, bits[1:]), batch.equal_to.size),
    )
    words = (batch.run_first, batch.run_pages, batch.equal_to)
    return [
        b"".join((header, *(numbers.astype("<u8", copy=False).tobytes() for numbers in words), *bits)),
        *batch.payload,
    ]


def pack_end() -> bytes:
    """Return what the source ends with when all has been acknowledged."""
    return bytes(HEADER_SIZE)


def parse_header(data: Buffer) -> Header | None:
    """Return the header in `HEADER_SIZE` bytes, None for the end; ValueError if no batch can be as large."""
    header = Header(*_HEADER.unpack(data))
    if not any(data):
        return None
    if header.runs > MAX_RUNS:
        raise ValueError(f"a batch has {header.runs} runs, more than {MAX_RUNS}")
    bits = ("zero", header.zero_bytes), ("unchanged", header.unchanged_bytes)
    for name, size in (*bits, ("equal", header.equal_bytes), ("delta", header.delta_bytes)):
        if size > MAX_PAGES // 8:
            raise ValueError(f"a batch has {size} bytes of {name} bits, more than {MAX_PAGES // 8}")
    if header.equal_to > MAX_UNIT_PAGES:
        raise ValueError(f"a batch has {header.equal_to} pages that equal others, more than {MAX_UNIT_PAGES}")
    if header.payload_bytes > MAX_PAYLOAD:
        raise ValueError(f"a batch has {header.payload_bytes} bytes of payload, more than {MAX_PAYLOAD}")
    return header


def pack_ack(sequence: int) -> bytes:
    """Return the destination's word that every batch up to this one is in guest RAM; 0 welcomes the lane."""
    return _ACK.pack(sequence)


def pack_refusal(reason: str, message: str) -> bytes:
    """Return the destination's last word on a lane that it ends."""
    text = f"{reason} {message}".encode()[:MAX_REASON]
    return _ACK.pack(_REFUSED) + _REASON.pack(len(text)) + text


class AckReader:
    """Takes what comes from the destination, in whatever pieces."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[int]:
        """Yield the acks that are complete; raise `LaneRefusedError` for a refusal."""
        self._pending += data
        while len(self._pending) >= _ACK.size:
            (sequence,) = _ACK.unpack_from(self._pending)
            if sequence == _REFUSED:
                self._refuse(self._pending[_ACK.size :])
                return
            self._pending = self._pending[_ACK.size :]
            yield sequence

    def _refuse(self, rest: bytes) -> None:
        if len(rest) < _REASON.size:
            return
        (size,) = _REASON.unpack_from(rest)
        if len(rest) - _REASON.size < size <= MAX_REASON:
            return
        reason, _, message = rest[_REASON.size : _REASON.size + size].decode(errors="replace").partition(" ")
        raise LaneRefusedError(reason, message)
