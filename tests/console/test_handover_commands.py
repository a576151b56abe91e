"""`switchover resolve` and `switchover forget`: nothing is decided without the operator's word."""

from __future__ import annotations

import io
import sys

import pytest
from fake_host import FakeHost, Serving
from switchover.v1 import host_pb2 as pb

from console import cli


def switchover(monkeypatch: pytest.MonkeyPatch, *arguments: str, answer: str | None = None) -> int:
    """Run the command; `answer` is typed at a terminal, None: there is none."""
    typed = io.StringIO(f"{answer}\n" if answer is not None else "")
    monkeypatch.setattr(typed, "isatty", lambda: answer is not None)
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(sys, "argv", ["switchover", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


COMMANDS = [
    (("resolve", "--owner", "here"), pb.ResolveHandoverRequest(owner=pb.OWNER_HERE), "is this host's, and goes on"),
    (("resolve", "--owner", "there"), pb.ResolveHandoverRequest(owner=pb.OWNER_THERE), "its copy here is kept"),
    (("forget",), pb.ForgetRequest(), "the machine is forgotten"),
]


@pytest.mark.parametrize(("command", "request_", "said"), COMMANDS)
@pytest.mark.parametrize("answer", ["yes", "no", "", None])
def test_an_operator_says_yes_or_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    request_: object,
    said: str,
    answer: str | None,
) -> None:
    host = FakeHost()
    host.ownership = "GONE" if command == ("forget",) else "COMMITTING"
    with Serving(host) as address:
        code = switchover(monkeypatch, *command, address, answer=answer)
        streams = capsys.readouterr()
        if answer == "yes":
            assert code == 0 and host.requests[1:] == [request_] and said in streams.out
            return
        assert host.requests[1:] == [] and not streams.out.strip()
        assert (code, "--yes" in streams.err) == ((2, True) if answer is None else (1, False))
        assert switchover(monkeypatch, *command, address, "--yes") == 0
    assert host.requests[2:] == [request_]


def test_nobody_is_asked_about_a_machine_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = FakeHost()
    host.ownership = "OWNER"
    with Serving(host) as address:
        assert switchover(monkeypatch, "forget", address) == 1
    assert "not forgotten: it is this host's" in capsys.readouterr().err
    assert len(host.requests) == 1


def test_what_is_decided_is_not_asked_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = FakeHost()
    with Serving(host) as address:
        assert switchover(monkeypatch, "resolve", "--owner", "here", address, "--yes") == 1
    assert capsys.readouterr().err == f"switchover: {address}: no handover is undecided here [DECIDED]\n"
    assert len(host.requests) == 1


def test_status_says_that_nobody_knows_whose_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = FakeHost()
    host.ownership = "COMMITTING"
    with Serving(host) as address:
        assert switchover(monkeypatch, "status", address) == 0
    assert "not decided until b:1 answers" in " ".join(capsys.readouterr().out.split())
