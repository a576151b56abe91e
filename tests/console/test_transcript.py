"""The commands capture and replay as processes, between a real client and a real device."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.vfio.migration import DeviceState
from common.vfio_user.client import VfioUserClient
from common.vfio_user.transcript import read

CAPTURED = Path(__file__).parent.parent / "data" / "vfio_user" / "switchover-destination.jsonl"


def start(module: str, *arguments: object, at: Path | None = None) -> subprocess.Popen[str]:
    """Start a process, and wait until it listens."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while at is not None and not at.exists() and process.poll() is None:
        time.sleep(0.02)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def run(*arguments: object) -> tuple[int, str, str]:
    return finish(start("console", *arguments))


@contextmanager
def device(path: Path) -> Iterator[None]:
    """An nvme, new for each client."""
    process = start("common.devices", "nvme", "--name", "nvme0", "--socket", path, "--no-once", at=path)
    try:
        yield
    finally:
        process.terminate()
        finish(process)


def converse(path: Path, *, state: DeviceState = DeviceState.STOP_COPY) -> None:
    with VfioUserClient.connect(path, "nvme0", timeout=10) as client:
        assert client.region_read(7, 0, 4)
        client.set_state(state)


def test_what_was_captured_is_replayed_on_both_sides(tmp_path: Path) -> None:
    server, proxy, file = tmp_path / "device", tmp_path / "proxy", tmp_path / "talk.jsonl"
    with device(server):
        process = start("console", "capture", "--listen", proxy, "--connect", server, file, at=proxy)
        converse(proxy)
        code, out, err = finish(process)
        messages = len(file.read_bytes().splitlines())
        assert (code, err) == (0, f"switchover capture: listening on {proxy}\n")
        assert (
            out
            == f"{file}: {messages} messages, {messages // 2} of them commands; the client has closed the connection\n"
        )
        assert not proxy.exists()
        assert run("replay", file, "--as", "client", "--connect", server) == (0, f"{file}: equal\n", "")
        process = start("console", "replay", file, "--as", "server", "--listen", proxy, at=proxy)
        converse(proxy)
        assert finish(process)[:2] == (0, f"{file}: equal\n")
        process = start("console", "replay", file, "--as", "server", "--listen", proxy, "--json", at=proxy)
        converse(proxy, state=DeviceState.STOP)
        code, out, _ = finish(process)
        answer = json.loads(out)
        assert code == 1
        assert (answer["result"], answer["messages"]) == ("different", messages)
        assert answer["differences"] == [
            {
                "line": messages - 1,
                "command": "DEVICE_FEATURE",
                "kind": "fields",
                "text": "device_state 0x1 instead of 0x3",
            }
        ]


def test_data_count_only_where_they_are_asked_for(tmp_path: Path) -> None:
    server, proxy, file = tmp_path / "device", tmp_path / "proxy", tmp_path / "talk.jsonl"
    with device(server):
        process = start("console", "capture", "--listen", proxy, "--connect", server, file, "--json", at=proxy)
        converse(proxy)
        _, out, _ = finish(process)
        assert json.loads(out)["twin_socket"] is False
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        read_reply = next(row for row in rows if row["command"] == 9 and row["flags"] == 1)
        read_reply["body"] = read_reply["body"][:-2] + "ee"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ("replay", file, "--as", "client", "--connect", server)
        assert run(*arguments) == (0, f"{file}: equal (data: 1)\n", "")
        code, out, _ = run(*arguments, "--data")
        assert code == 1
        assert "REGION_READ: differs from byte 19 on" in out and out.endswith(f"{file}: different (data: 1)\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_capture_with_a_whole_file(tmp_path: Path, number: signal.Signals) -> None:
    server, proxy, file = tmp_path / "device", tmp_path / "proxy", tmp_path / "talk.jsonl"
    with device(server):
        process = start("console", "capture", "--listen", proxy, "--connect", server, file, at=proxy)
        with VfioUserClient.connect(proxy, "nvme0", timeout=10) as client:
            process.send_signal(number)
            code, out, _ = finish(process)
            assert client.closed.wait(10)
        assert code == 0
        with file.open("rb") as lines:
            messages = read(lines)
        assert f"{len(messages)} messages" in out and out.endswith("; told to end\n")
        assert len(messages) > 10
        # What was recorded before is kept.
        code, _, err = run("capture", "--listen", proxy, "--connect", server, file)
        assert code == 2 and f"{file}: is there already" in err and file.stat().st_size
        # Before a client has come.
        empty = tmp_path / "empty.jsonl"
        process = start("console", "capture", "--listen", proxy, "--connect", server, empty, at=proxy)
        process.send_signal(number)
        assert finish(process)[:2] == (0, f"{empty}: 0 messages, 0 of them commands; told to end\n")
        assert not proxy.exists()


def test_a_signal_ends_a_replay(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        path = tmp_path / "socket"
        process = start("console", "replay", CAPTURED, "--as", "server", "--listen", path, at=path)
        process.send_signal(number)
        code, out, err = finish(process)
        assert (code, out, err) == (130, "", f"switchover replay: listening on {path}\n")
        assert not path.exists()


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.jsonl", tmp_path / "file"
    broken.write_text('{"from": "client"}\n')
    other.write_text("precious")
    nobody = tmp_path / "nobody"
    gone = f"{nobody}: cannot connect: No such file"
    replay_client = ("--as", "client", "--connect", nobody)
    for arguments, code, text in (
        (("capture", "--listen", tmp_path / "a", "--connect", nobody, other), 6, gone),
        (("replay", CAPTURED, *replay_client), 6, gone),
        (("replay", broken, *replay_client), 2, f"{broken}: line 1: not an object of from"),
        (("replay", nobody, *replay_client), 2, f"{nobody}: No such file"),
        (("replay", tmp_path, *replay_client), 2, f"{tmp_path}: Is a directory"),
        (("replay", CAPTURED, "--as", "client", "--listen", nobody), 2, "--as client needs --connect"),
        (("replay", CAPTURED, "--as", "server", "--listen", other), 2, f"{other}: there is something else"),
        (("replay", CAPTURED, "--as", "server", "--listen", tmp_path / ("x" * 200)), 2, "too long"),
    ):  # fmt: skip
        found, out, err = run(*arguments)
        assert (found, out) == (code, ""), arguments
        assert text in err and err.count("\n") == 1, err
    assert other.read_text() == "precious"
