from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_host import SESSION, FakeHost, Serving, result, story
from switchover.v1 import host_pb2 as pb
from switchover.v1.migration_pb2 import LaneKind, VerifyMode

from common.rpc.errors import RefusalError
from console import cli
from console.exit_codes import ExitCode


def switchover(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["switchover", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


MIGRATE = ("migrate", "--source", "a:1", "--destination", "b:1")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "switchover: missing command; see switchover --help"),
        (("migrte",), "no such command 'migrte'"),
        (("migrate",), "missing option '--source'"),
        (("migrate", "--source", "a", "--destination", "b:1"), '"a" is not an address'),
        (("status", "a:65536"), '"a:65536" is not an address'),
        (("status",), "missing argument 'HOST:PORT'"),
        ((*MIGRATE, "--max-downtime", "300"), '"300" has no unit'),
        ((*MIGRATE, "--max-downtime", "0ms"), '"0ms" is not more than 0'),
        ((*MIGRATE, "--bandwidth", "1Gb/s"), 'unknown unit "Gb/s"'),
        ((*MIGRATE, "--timeout", "soon"), '"soon" is not a duration'),
        ((*MIGRATE, "--verify", "maybe"), "'--verify'"),
        ((*MIGRATE, "--on-timeout", "wait"), "'--on-timeout'"),
        ((*MIGRATE, "--reconnect", "30"), '"30" has no unit'),
        ((*MIGRATE, "--reconnect", "61m"), '"61m" is more than an hour'),
        ((*MIGRATE, "--lanes", "0"), "'--lanes'"),
        ((*MIGRATE, "--lane-kind", "udp"), "'--lane-kind'"),
        ((*MIGRATE, "--timeout", "0"), '"0" is not more than 0'),
        (("migrate", "--source", "a:1", "--destination", "a:1"), "source and destination are both a:1"),
        ((*MIGRATE, "--frobnicate"), "no such option: --frobnicate"),
        (("host", "--listen", "7700"), '"7700" is not an address'),
        (("host", "--devices", "nic,quantum"), "no such kind of device: quantum; there are: nic"),
        (("destination", "--max-reconnect", "2h"), '"2h" is more than an hour'),
        (("device", "nic"), "missing option '--socket'"),
        (("device", "nix", "--socket", "s"), 'must be "nic", "nvme", "sample" or "accelerator", not "nix"'),
        (("device", "nic", "--socket", "s", "--knob", "rate"), '--knob "rate" is not KEY=VALUE'),
        (("device", "nic", "--socket", "s", "--knob", "rate=fast"), '"fast" is not a rate'),
        (("device", "nic", "--socket", "s", "--knob", "memory=1MiB"), "it belongs to accelerator"),
        (("device", "nic", "--socket", "s", "--knob", "container=a"), "it is no knob"),
        (("demo", "--ram", "1G"), "did you mean GB or GiB?"),
        (("demo", "--ram", "1MiB"), 'machine.toml:4: "size" in [ram] must be from 64.0 MiB'),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str
) -> None:
    assert switchover(monkeypatch, *arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert problem in streams.err


@pytest.mark.parametrize("command", [("status", "a:1"), ("watch", "a:1"), ("stop", "a:1"), MIGRATE, ("host",)])
def test_certificates_are_where_the_option_or_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("SWITCHOVER_TLS", str(tmp_path / "environment"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for options, place in (((), "environment"), (("--tls", str(tmp_path / "option")), "option")):
        assert switchover(monkeypatch, *command, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"switchover: {tmp_path / place}: not a directory") and error.count("\n") == 1


def test_help_does_not_import_what_takes_time() -> None:
    code = "import sys; from console.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "migrate" in shown
    assert {"grpc", "numpy", "google.protobuf", "cryptography"}.isdisjoint(shown.splitlines()[-1].split())


def test_migrate_asks_for_what_it_was_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost(story(result()))
    with Serving(host) as address:
        options = "--max-downtime 20ms --bandwidth 1Gbit/s --verify deferred --timeout 1m --max-rounds 9 --lanes 2"
        flags = "--lane-kind tcp --on-timeout switch-over --auto-converge --compress zstd --on-mismatch continue --json"
        options += " --reconnect 0"
        arguments = ("migrate", "--source", address, "--destination", "b:1", *options.split(), *flags.split())
        assert switchover(monkeypatch, *arguments) == 0
    assert host.requests[0] == pb.MigrateRequest(
        destination="b:1",
        max_downtime_ms=20,
        bandwidth_limit=125_000_000,
        verify=VerifyMode.VERIFY_MODE_DEFERRED,
        timeout_s=60,
        max_rounds=9,
        on_timeout=pb.OnTimeout.ON_TIMEOUT_SWITCH_OVER,
        auto_converge=True,
        lanes=2,
        lane_kind=LaneKind.LANE_KIND_TCP,
        compression=pb.Compression.COMPRESSION_ZSTD,
        continue_on_mismatch=True,
    )
    streams = capsys.readouterr()
    assert json.loads(streams.out)["downtime_ms"] == 90.0
    assert "switchover" in streams.err


def test_migrate_without_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost(story(result(result="cancelled", reason="NOT_CONVERGED", error="too many dirty pages")))
    with Serving(host) as address:
        assert switchover(monkeypatch, "migrate", "--source", address, "--destination", "b:1") == 4
    assert host.requests[0] == pb.MigrateRequest(
        destination="b:1",
        max_downtime_ms=300,
        verify=VerifyMode.VERIFY_MODE_STRICT,
        on_timeout=pb.OnTimeout.ON_TIMEOUT_CANCEL,
        reconnect_s=30,
        lanes=1,
        lane_kind=LaneKind.LANE_KIND_GRPC,
        compression=pb.Compression.COMPRESSION_OFF,
    )
    assert "too many dirty pages [NOT_CONVERGED]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "request_type"),
    [
        ("cancel", pb.CancelRequest),
        ("pause", pb.PauseRequest),
        ("resume", pb.ResumeRequest),
        ("stop", pb.StopMachineRequest),
    ],
)
def test_commands_make_their_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, request_type: type[Any]
) -> None:
    host = FakeHost()
    with Serving(host) as address:
        assert switchover(monkeypatch, command, address) == 0
        assert [type(request) for request in host.requests] == [request_type]
        assert capsys.readouterr().out.startswith(f"{address}: the m")
        host.refusal = RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "NO_MACHINE", "there is no machine here")
        assert switchover(monkeypatch, command, address) == 1
    assert capsys.readouterr().err == f"switchover: {address}: there is no machine here [NO_MACHINE]\n"


def test_status_for_people_and_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = FakeHost()
    assert host.machine is not None
    host.machine.devices.add(name="nic0", kind="nic", state="RUNNING", migration=["STOP_COPY", "P2P"], dma_logging=True)
    host.machine.containers.add(name="default", tracking="device", reason="all log", mappings=1234)
    host.machine.programs.add(name="clock0", counters={"ticks": 10**12}, errors=["time went back"])
    host.machine.blockers.append("gpu does not support migration")
    with Serving(host) as address:
        assert switchover(monkeypatch, "status", address) == 0
        text = capsys.readouterr().out
        assert switchover(monkeypatch, "status", address, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        host.machine = None
        assert switchover(monkeypatch, "status", address, "--json") == 0
        assert json.loads(capsys.readouterr().out)["machine"] is None
    for part in (
        "is running",
        "STOP_COPY P2P",
        "1,234",
        "ticks 1,000,000,000,000",
        "time went back",
        "cannot migrate: gpu",
    ):
        assert part in text
    assert told["machine"]["programs"][0]["counters"] == {"ticks": 10**12}
    assert told["machine"]["devices"][0]["migration"] == ["STOP_COPY", "P2P"]


def test_watch_prints_an_event_per_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    events = story(result())
    with Serving(FakeHost(events, events)) as address:
        assert switchover(monkeypatch, "watch", address, "--json") == ExitCode.UNREACHABLE
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert switchover(monkeypatch, "watch", address) == ExitCode.UNREACHABLE
        text, said = capsys.readouterr()
    assert said == f"switchover: {address}: the daemon has ended\n"
    assert len(lines) == len(events) == text.count("\n")
    assert lines[0] == {"unix_ms": 1_000_000, "session_id": SESSION, "phase": "setup"}
    assert lines[2]["progress"]["devices"][0]["stop_copy_length"] == -1
    assert lines[-1]["result"]["verified"] is True
    assert "result: completed" in text and "device nic0: STOP_COPY" in text and "\x1b" not in text


def test_daemons_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Serving(None) as address:
        assert switchover(monkeypatch, "status", address) == 6
    assert "not a Switchover daemon" in capsys.readouterr().err
    assert switchover(monkeypatch, "migrate", "--source", address, "--destination", "b:1") == 6
    error = capsys.readouterr().err
    assert error.startswith(f"switchover: {address}: cannot be reached") and error.count("\n") == 1


def test_a_defect_is_still_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(address: str, tls: object) -> None:
        raise RuntimeError(f"no {address}")

    monkeypatch.setattr("console.daemon.daemon", broken)
    assert switchover(monkeypatch, "status", "a:1") == 1
    error = capsys.readouterr().err
    assert error.startswith("switchover: defect: RuntimeError: no a:1 (") and error.count("\n") == 1


def test_a_migration_that_is_refused_has_its_reason_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = FakeHost()
    host.refusal = RefusalError(grpc.StatusCode.ABORTED, "MIGRATION_RUNS", "one runs here already")
    with Serving(host) as address:
        assert switchover(monkeypatch, "migrate", "--source", address, "--destination", "b:1", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document.pop("error").startswith(address)
    assert document == {"result": "failed", "reason": "MIGRATION_RUNS"}
