from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.devices.stream import RECORD_PAGES, DeviceMemory, LoadStream, RecordFormat, SaveStream

PAGE = 4096
PAGES = RECORD_PAGES + 44
IDENTITY = b"a device"

actions = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 3 << 20)),
        st.tuples(st.just("write"), st.integers(0, PAGES * PAGE - 1), st.binary(min_size=1, max_size=10_000)),
    ),
    max_size=8,
)


@settings(max_examples=12, deadline=None)
@given(actions, st.integers(5000, 2_000_000))
def test_whatever_is_written_meanwhile_arrives(actions: list[tuple[object, ...]], piece: int) -> None:
    source, target = DeviceMemory(PAGES * PAGE), DeviceMemory(PAGES * PAGE)
    saving, loading = SaveStream(IDENTITY, source), LoadStream(IDENTITY, target)
    stream = b""
    for action in actions:
        info = saving.info()
        if action[0] == "read":
            assert isinstance(action[1], int)
            got = bytes(saving.read(action[1]))
            stream += got
            assert len(got) == min(action[1], info.initial_bytes + info.dirty_bytes)
        else:
            assert isinstance(action[1], int) and isinstance(action[2], bytes)
            source.write(action[1], action[2][: PAGES * PAGE - action[1]])
        assert saving.info().initial_bytes <= info.initial_bytes
    left = saving.remaining(b"the state")
    saving.finish(b"the state")
    assert saving.remaining(b"") == left
    rest = bytes(saving.read(100 << 20))
    assert len(rest) == left
    assert not len(saving.read(1))
    stream += rest
    for at in range(0, len(stream), piece):
        loading.write(stream[at : at + piece])
    assert loading.finish() == b"the state"
    assert (source.bytes == target.bytes).all()


def test_the_length_of_a_whole_stream_is_known_before() -> None:
    memory = DeviceMemory(PAGES * PAGE)
    saving = SaveStream(IDENTITY, memory)
    saving.finish(b"state")
    assert len(saving.read(100 << 20)) == RecordFormat(IDENTITY, memory).length(b"state")


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=900), st.integers(0, 600))
def test_dirty_bytes_are_those_of_the_records_that_follow(dirty: list[bool], more: int) -> None:
    memory = DeviceMemory((len(dirty) + more) * PAGE)
    memory.dirty[: len(dirty)] = dirty
    memory.dirty[len(dirty) :] = True
    expected, total = memory.dirty_bytes(memory.dirty.size), 0
    while (run := memory.next_run())[1]:
        first, pages = run
        assert pages <= RECORD_PAGES and memory.dirty[first : first + pages].all()
        memory.dirty[first : first + pages] = False
        total += pages * PAGE + 32
    assert not memory.dirty.any()
    assert total == expected


def test_marks_every_page_that_a_write_touches() -> None:
    memory = DeviceMemory(4 * PAGE)
    memory.write(PAGE - 1, b"12")
    assert np.flatnonzero(memory.dirty).tolist() == [0, 1]
    memory.write(3 * PAGE, b"1")
    assert np.flatnonzero(memory.dirty).tolist() == [0, 1, 3]


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 200))
def test_noise_is_refused_and_never_an_accident(noise: bytes, keep: int) -> None:
    saving = SaveStream(IDENTITY, None)
    saving.finish(b"state")
    good = bytes(saving.read(1000))
    loading = LoadStream(IDENTITY, None)
    data = good[:keep] + noise
    loading.write(data)
    if data == good:
        assert loading.finish() == b"state"
    else:
        with pytest.raises(ValueError):
            loading.finish()


def test_every_flipped_bit_of_a_state_is_seen() -> None:
    saving = SaveStream(IDENTITY, None)
    saving.finish(b"state")
    good = bytes(saving.read(1000))
    for bit in range(len(good) * 8):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        loading = LoadStream(IDENTITY, None)
        loading.write(data)
        with pytest.raises(ValueError):
            loading.finish()


def test_a_whole_state_of_another_device_is_refused_for_its_identity() -> None:
    saving = SaveStream(b"b device", None)
    saving.finish(b"state")
    loading = LoadStream(IDENTITY, None)
    loading.write(saving.read(1000))
    with pytest.raises(ValueError, match="another device"):
        loading.finish()
