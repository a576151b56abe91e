"""SendPagesRequest by hand: the bytes that protobuf would produce, without its copies.

protobuf keeps `bytes` fields as objects of its own, so each mebibyte of pages would be copied once more on either side.
Here a message is one join of its parts, and what is parsed refers to the bytes that came. Any protobuf
implementation reads and writes the same: migration.proto is the contract.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.ipc.channel import Buffer
from common.memory.pages import PageBatch

__all__ = ["parse", "serialize"]

# Wire types.
_VARINT, _I64, _LEN, _START_GROUP, _END_GROUP, _I32 = range(6)
# Field numbers.
_SEQUENCE, _ROUND, _ENCODING, _RUN_FIRST, _RUN_PAGES, _ZERO, _PAYLOAD, _UNCHANGED, _DELTA, _EQUAL, _EQUAL_TO, _MORE = (
    range(1, 13)
)
_MAX_GROUP_DEPTH = 100


def serialize(batch: PageBatch) -> bytes:
    """Return the message of a batch; the payload is copied once."""
    parts: list[Buffer] = []
    for number, value in ((_SEQUENCE, batch.sequence), (_ROUND, batch.round), (_ENCODING, batch.encoding)):
        _append_number(parts, number, value)
    _append_words(parts, _RUN_FIRST, batch.run_first)
    _append_words(parts, _RUN_PAGES, batch.run_pages)
    _append_bytes(parts, _ZERO, (batch.zero,))
    _append_bytes(parts, _PAYLOAD, batch.payload)
    _append_bytes(parts, _UNCHANGED, (batch.unchanged,))
    _append_bytes(parts, _DELTA, (batch.delta,))
    _append_bytes(parts, _EQUAL, (batch.equal,))
    _append_words(parts, _EQUAL_TO, batch.equal_to)
    _append_number(parts, _MORE, batch.more)
    return b"".join(parts)


def _append_number(parts: list[Buffer], number: int, value: int) -> None:
    if value:
        parts.append(_varint(number << 3 | _VARINT) + _varint(value))


def _append_words(parts: list[Buffer], number: int, words: npt.NDArray[np.uint64]) -> None:
    if words.size:
        parts += (_length(number, words.size * 8), words.astype("<u8", copy=False).tobytes())


def _append_bytes(parts: list[Buffer], number: int, pieces: Sequence[Buffer]) -> None:
    if size := sum(map(len, pieces)):
        parts += (_length(number, size), *pieces)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _length(number: int, size: int) -> bytes:
    return _varint(number << 3 | _LEN) + _varint(size)


def parse(data: bytes) -> PageBatch:
    """Return the batch of a message; its payload is a view of `data`.

    Fields may come in any order, split and repeated as protobuf allows; unknown ones are skipped. `ValueError` if the
    bytes are no message. Whether the batch makes sense is not looked at: see `common.memory.pages.check`.
    """
    return _Parser(data).batch()


class _Parser:
    """A position in a message."""

    __slots__ = ("_data", "_end", "_position", "_view")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._view = memoryview(data)
        self._position = 0
        self._end = len(data)

    def batch(self) -> PageBatch:
        numbers = dict.fromkeys((_SEQUENCE, _ROUND, _ENCODING, _MORE), 0)
        words: dict[int, list[memoryview]] = {_RUN_FIRST: [], _RUN_PAGES: [], _EQUAL_TO: []}
        chunks = dict.fromkeys((_ZERO, _PAYLOAD, _UNCHANGED, _DELTA, _EQUAL), self._view[:0])
        while self._position < self._end:
            number, kind = self._tag()
            if kind == _VARINT and number in numbers:
                numbers[number] = self._varint()
            elif kind == _LEN and number in words:
                packed = self._take(self._varint())
                if len(packed) % 8:
                    raise ValueError("a packed field of 8-byte numbers has a size that is no multiple of 8")
                words[number].append(packed)
            elif kind == _I64 and number in words:
                words[number].append(self._take(8))
            elif kind == _LEN and number in chunks:
                chunks[number] = self._take(self._varint())
            else:
                self._skip(number, kind)
        encoding = numbers[_ENCODING] & 0xFFFF_FFFF
        return PageBatch(
            sequence=numbers[_SEQUENCE],
            round=numbers[_ROUND] & 0xFFFF_FFFF,
            # An enum is an int32: what does not fit is cut, the rest has a sign.
            encoding=encoding - (encoding >> 31 << 32),
            run_first=_words(words[_RUN_FIRST]),
            run_pages=_words(words[_RUN_PAGES]),
            zero=bytes(chunks[_ZERO]),
            payload=(chunks[_PAYLOAD],) if chunks[_PAYLOAD] else (),
            unchanged=bytes(chunks[_UNCHANGED]),
            equal=bytes(chunks[_EQUAL]),
            delta=bytes(chunks[_DELTA]),
            equal_to=_words(words[_EQUAL_TO]),
            more=bool(numbers[_MORE]),
        )

    def _tag(self) -> tuple[int, int]:
        begin = self._position
        tag = self._varint()
        number, kind = tag >> 3, tag & 7
        if not number or tag > 0xFFFF_FFFF or self._position - begin > 5 or kind > _I32:
            raise ValueError(f"a message has the impossible tag {tag:#x}")
        return number, kind

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            if self._position >= self._end:
                raise ValueError("a message ends inside a number")
            byte = self._data[self._position]
            self._position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF
        raise ValueError("a message has a number of more than 10 bytes")

    def _take(self, size: int) -> memoryview:
        begin = self._position
        if size > self._end - begin:
            raise ValueError(f"a message ends {size - (self._end - begin)} bytes too early")
        self._position = begin + size
        return self._view[begin : self._position]

    def _skip(self, number: int, kind: int) -> None:
        """Skip an unknown field; groups, which nobody writes any more, with all that is in them."""
        open_groups: list[int] = []
        while True:
            if kind == _VARINT:
                self._varint()
            elif kind == _I64:
                self._take(8)
            elif kind == _LEN:
                self._take(self._varint())
            elif kind == _I32:
                self._take(4)
            elif kind == _START_GROUP:
                open_groups.append(number)
                if len(open_groups) > _MAX_GROUP_DEPTH:
                    raise ValueError("a message has groups that are nested too deeply")
            elif not open_groups or open_groups.pop() != number:
                raise ValueError(f"a message ends group {number}, which was not begun")
            if not open_groups:
                return
            number, kind = self._tag()


def _words(pieces: list[memoryview]) -> npt.NDArray[np.uint64]:
    joined = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    return np.frombuffer(joined, "<u8")
