"""Transcripts as files: what is written is read, and what is no conversation is refused by its line."""

import io
import json

import pytest
from captures import DATA, DESTINATION, QEMU, SOURCE, load

from common.vfio_user.codec import Header
from common.vfio_user.difference import compare
from common.vfio_user.transcript import Recorded, TranscriptError, name_of, pair, read, write

ASKED = {"from": "client", "id": 7, "command": 9, "flags": 0, "error": 0, "fds": 0, "body": "00ff"}


def lines(*rows: object) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def problem(content: list[bytes]) -> str:
    with pytest.raises(TranscriptError) as caught:
        read(content)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.jsonl")), ids=lambda path: path.stem)
def test_what_is_written_is_what_was_read(path) -> None:
    file = io.BytesIO()
    for message in load(path):
        write(file, message)
    assert file.getvalue() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"from": "proxy"}, '"from" is neither "client" nor "server"'),
        ({"id": 65536}, '"id" is not a number from 0 to 65535'),
        ({"id": -1}, '"id" is not a number'),
        ({"command": "9"}, '"command" is not a number'),
        ({"error": True}, '"error" is not a number'),
        ({"fds": 254}, '"fds" is not a number from 0 to 253'),
        ({"flags": 2}, '"flags" is neither that of a command nor of a reply: 2'),
        ({"body": "0"}, '"body" is not hexadecimal'),
        ({"body": None}, '"body" is not hexadecimal'),
        ({"body": "00" * (17 << 20)}, '"body" has 17825792 bytes'),
        ({"time": 1}, "not an object of from, id, command, flags, error, fds, body"),
        ({"from": "server", "flags": 1, "id": 8}, "a reply to no REGION_READ with this id"),
        ({"from": "client", "flags": 1}, "a reply to no REGION_READ with this id"),
        ({"from": "server", "flags": 1, "command": 999}, "a reply to no command 999 with this id"),
    ],
)
def test_malformed_messages_are_told_by_their_line(change: dict[str, object], text: str) -> None:
    assert problem(lines(ASKED, ASKED | change)).startswith(f"line 2: {text}")


def test_malformed_lines() -> None:
    good = lines(ASKED)[0]
    assert problem([good, b"{\n"]) == "line 2: not JSON"
    assert problem([b"[" * 100_000 + b"\n"]) == "line 1: not JSON"
    assert problem([b"[1]\n"]).startswith("line 1: not an object of")
    assert problem([good, good[:20]]) == "line 2: the file ends within it"
    assert problem([good, good.strip()]) == "line 2: the file ends within it"
    assert problem([b"\xff\xfe\n"]) == "line 1: not JSON"
    assert read([]) == []


def test_a_reply_is_to_the_oldest_command_that_it_fits() -> None:
    both = (ASKED, ASKED, ASKED | {"from": "server"})
    answers = (ASKED | {"flags": 1}, ASKED | {"from": "server", "flags": 33, "error": 22})
    assert pair(read(lines(*both, *answers))) == {2: 3, 0: 4}


@pytest.mark.parametrize("path", [SOURCE, DESTINATION, QEMU], ids=lambda path: path.stem)
def test_bytes_of_captured_messages_count(path) -> None:
    for number, message in enumerate(load(path), start=1):
        assert compare(number, message, message.header, message.fds, message.body) == []
        for at in {*range(min(len(message.body), 64)), *range(max(len(message.body) - 8, 0), len(message.body))}:
            other = bytearray(message.body)
            other[at] ^= 1
            found = compare(number, message, message.header, message.fds, other)
            assert len(found) == 1 and found[0].line == number and found[0].kind in ("fields", "data"), (number, at)
        longer = compare(number, message, message.header, message.fds, message.body + b"\0")
        assert [its.kind for its in longer] == ["fields"]
        more = compare(number, message, message.header, message.fds + 1, message.body)
        assert [its.kind for its in more] == ["descriptors"]
        if message.header.is_reply:
            refused = message.header._replace(flags=0x21, error=95 if not message.header.error else 0)
            expected = [] if message.header.error == 22 else ["status"]
            assert [its.kind for its in compare(number, message, refused, message.fds, message.body)] == expected


def test_differences_are_told_in_the_protocol_s_names() -> None:
    info = Recorded("server", Header(1, 4, 32, 1), 0, bytes.fromhex("10000000030000000900000005000000"))
    (found,) = compare(12, info, info.header, 0, bytes.fromhex("10000000030000000800000005000000"))
    assert (found.line, found.command, found.text) == (12, "DEVICE_GET_INFO", "num_regions 0x8 instead of 0x9")
    (found,) = compare(12, info, info.header._replace(flags=0x21, error=19), 0, b"")
    assert (found.kind, found.text) == ("status", "ENODEV (No such device) instead of success")
    state = Recorded("client", Header(1, 16, 32, 0), 0, bytes.fromhex("100000000200020002000000ffffffff"))
    (found,) = compare(3, state, state.header, 0, bytes.fromhex("100000000200020004000000ffffffff"))
    assert (found.kind, found.text) == ("fields", "device_state 0x4 instead of 0x2")
    assert name_of(18) == "MIG_DATA_WRITE" and name_of(14) == "command 14"
