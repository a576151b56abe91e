from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from switchover.v1.migration_pb2 import PageEncoding, SendPagesRequest

from common.memory.pages import Encoding, PageBatch
from common.rpc.page_batch import parse, serialize

u64 = st.integers(0, 2**64 - 1)
words = st.lists(u64, max_size=20)
messages = st.builds(
    SendPagesRequest,
    sequence=u64,
    round=st.integers(0, 2**32 - 1),
    encoding=st.sampled_from([0, 1, 2, 3, 2**31 - 1]),
    run_first=words,
    run_pages=words,
    zero=st.binary(max_size=200),
    payload=st.binary(max_size=20_000),
    unchanged=st.binary(max_size=200),
    delta=st.binary(max_size=200),
    equal=st.binary(max_size=200),
    equal_to=words,
    more=st.booleans(),
)


def batch_of(message: SendPagesRequest, payload: list[bytes]) -> PageBatch:
    return PageBatch(
        message.sequence,
        message.round,
        message.encoding,
        np.array(message.run_first, np.uint64),
        np.array(message.run_pages, np.uint64),
        message.zero,
        payload,
        message.unchanged,
        message.equal,
        message.delta,
        np.array(message.equal_to, np.uint64),
        message.more,
    )


def assert_same(batch: PageBatch, message: SendPagesRequest) -> None:
    assert (batch.sequence, batch.round, batch.encoding) == (message.sequence, message.round, message.encoding)
    assert batch.run_first.tolist() == list(message.run_first)
    assert batch.run_pages.tolist() == list(message.run_pages)
    assert batch.zero == message.zero and batch.more == message.more
    assert b"".join(batch.payload) == message.payload


def test_the_encodings_are_those_of_the_contract() -> None:
    assert {f"PAGE_ENCODING_{item.name}": item.value for item in Encoding} == {
        name: number for name, number in PageEncoding.items() if number
    }


@given(messages, st.lists(st.integers(0, 20_000), max_size=3))
def test_serializes_to_the_bytes_of_protobuf(message: SendPagesRequest, cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 20_000]
    parts = [message.payload[low:high] for low, high in itertools.pairwise(bounds)]
    assert serialize(batch_of(message, parts)) == message.SerializeToString()


@given(messages)
def test_parses_the_bytes_of_protobuf(message: SendPagesRequest) -> None:
    assert_same(parse(message.SerializeToString()), message)


def test_the_payload_is_a_view_of_the_message() -> None:
    data = SendPagesRequest(payload=bytes(100)).SerializeToString()
    (payload,) = parse(data).payload
    assert isinstance(payload, memoryview) and payload.obj is data


def test_an_empty_message_is_an_empty_batch() -> None:
    assert_same(parse(b""), SendPagesRequest())
    assert parse(b"").payload == ()


def varint(value: int, pad: int = 0) -> bytes:
    """A number, with `pad` bytes more than it needs."""
    encoded = bytearray()
    while value > 0x7F or pad:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
        if not value:
            encoded += b"\x80" * (pad - 1) if pad > 1 else b""
            pad = 0
    encoded.append(value)
    return bytes(encoded)


def some_field(dice: random.Random) -> bytes:
    """A field as protobuf allows it, or almost."""
    number = dice.choice([1, 2, 3, 4, 5, 6, 7, 8, 100_000])
    kind = dice.choice([0, 1, 2, 2, 5] if dice.random() < 0.9 else [3, 4, 6, 7])
    tag = varint(number << 3 | kind, dice.choice([0] * 9 + [2]))
    if kind == 0:
        return tag + varint(dice.getrandbits(dice.choice([1, 31, 33, 64, 64, 69])), dice.choice([0, 0, 0, 3]))
    if kind == 1:
        return tag + dice.randbytes(8)
    if kind == 5:
        return tag + dice.randbytes(4)
    if kind == 2:
        data = dice.randbytes(dice.choice([0, 8, 16, 40, dice.randrange(20)]))
        return tag + varint(len(data) + (dice.random() < 0.02)) + data
    if kind == 3:
        inner = b"".join(some_field(dice) for _ in range(dice.randrange(3)))
        return tag + inner + (varint(number << 3 | 4) if dice.random() < 0.9 else b"")
    return tag


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_reads_whatever_protobuf_allows_as_protobuf_does(dice: random.Random) -> None:
    for _ in range(10):
        data = b"".join(some_field(dice) for _ in range(dice.randrange(6)))
        try:
            batch = parse(data)
        except ValueError:
            continue
        # What is read here is valid there too, and means the same.
        assert_same(batch, SendPagesRequest.FromString(data))


WORD = bytes(range(8))
WELL_FORMED = {
    "unpacked numbers": b"\x21" + WORD + b"\x21" + WORD + b"\x29" + WORD,
    "packed and unpacked numbers": b"\x22\x08" + WORD + b"\x21" + WORD + b"\x22\x10" + WORD * 2,
    "the last of several": b"\x08\x01\x08\x02\x3a\x01a\x3a\x02bc\x32\x01d\x32\x00",
    "another order": b"\x3a\x01a\x08\x01",
    "unknown fields": b"\x40\x01\x49" + WORD + b"\x52\x03abc\x5d" + WORD[:4] + b"\x08\x05",
    "an unknown group": b"\x43\x08\x07\x4b\x4c\x44\x08\x05",
    "known numbers of another type": b"\x0a\x01a\x25" + WORD[:4] + b"\x38\x05",
    "a number longer than it need be": b"\x08\x85\x80\x00",
    "numbers that are cut": b"\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x18\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("name", list(WELL_FORMED))
def test_variants_of_the_same_message(name: str) -> None:
    assert_same(parse(WELL_FORMED[name]), SendPagesRequest.FromString(WELL_FORMED[name]))


MALFORMED = {
    "an end inside a number": b"\x08\x80",
    "an end after a tag": b"\x08",
    "a number of 11 bytes": b"\x08" + b"\x80" * 10 + b"\x00",
    "a field that is longer than the message": b"\x3a\x05abcd",
    "a size of 2**64 - 1": b"\x3a" + b"\xff" * 9 + b"\x01",
    "a packed field of 9 bytes": b"\x22\x09" + bytes(9),
    "an end inside an 8-byte number": b"\x21" + bytes(7),
    "an end inside a 4-byte number": b"\x45" + bytes(3),
    "field number 0": b"\x00\x00",
    "wire type 6": b"\x46",
    "wire type 7": b"\x47",
    "a tag past 32 bits": b"\x80\x80\x80\x80\x10\x00",
    "a tag of 6 bytes": b"\x88\x80\x80\x80\x80\x00\x00",
    "a group without end": b"\x43\x08\x01",
    "a group with another's end": b"\x43\x4c",
    "groups that are too deep": b"\x43" * 101 + b"\x44" * 101,
}


@pytest.mark.parametrize("name", list(MALFORMED))
def test_malformed_messages_are_refused_as_protobuf_refuses_them(name: str) -> None:
    with pytest.raises(DecodeError):
        SendPagesRequest.FromString(MALFORMED[name])
    with pytest.raises(ValueError, match=r"message|packed"):
        parse(MALFORMED[name])


def test_an_end_of_a_group_that_was_not_begun_is_refused() -> None:
    with pytest.raises(ValueError, match="not begun"):
        parse(b"\x08\x01\x44")


@given(st.binary(max_size=60))
def test_noise_is_read_or_refused(data: bytes) -> None:
    try:
        batch = parse(data)
    except ValueError:
        return
    assert_same(batch, SendPagesRequest.FromString(data))
