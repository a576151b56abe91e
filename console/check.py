"""The command `check`: runs the conformance checks, and reports to people, to programs, and to test harnesses."""

from __future__ import annotations

import json
import signal
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from common.conformance.check import Check, Outcome, Result
from common.conformance.lab import run
from common.conformance.probe import Limits
from common.conformance.suite import CHECKS, SUBJECTS
from common.conformance.target import CommandTarget, SocketTarget, Target, UnreachableError
from console.daemon import printable
from console.errors import CommandError
from console.exit_codes import ExitCode

__all__ = ["check", "document", "junit", "selected"]

_STYLES = {Outcome.PASS: "green", Outcome.FAIL: "bold red", Outcome.UNKNOWN: "yellow"}
_NAME_WIDTH = max(len(item.full_name) for item in CHECKS)


def check(
    socket: Path | None,
    command: str | None,
    *,
    only: Sequence[str],
    answer: float,
    as_json: bool,
    junit_file: Path | None,
) -> ExitCode:
    """Check the server at `socket`, or those that `command` starts; `answer`: seconds that it has for an answer.

    `only`: patterns of names of checks. Raise `CommandError`.
    """
    target, name = _target(socket, command)
    checks = selected(only)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # servers that were started are ended
    console = Console(stderr=as_json, highlight=False)
    results = []
    with ExitStack() as stack:
        try:  # before there is anything that could be lost
            out = None if junit_file is None else stack.enter_context(junit_file.open("w", encoding="utf-8"))
        except OSError as error:
            raise CommandError(f"check: --junit {junit_file}: {error.strerror}", ExitCode.USAGE) from None
        try:
            for result in run(checks, target, Limits(answer=answer)):
                _print_result(console, result)
                results.append(result)
        except UnreachableError as error:
            raise CommandError(f"there is no server to check: {error}", ExitCode.UNREACHABLE) from None
        _print_summary(console, results)
        if as_json:
            print(json.dumps(document(name, results), indent=2), flush=True)
        if out is not None:
            out.write(junit(name, results))
    return ExitCode.FAILED if any(result.outcome is Outcome.FAIL for result in results) else ExitCode.COMPLETED


def _target(socket: Path | None, command: str | None) -> tuple[Target, str]:
    if (socket is None) == (command is None):
        raise CommandError(
            "check: give SOCKET or --command, one of the two; see switchover check --help", ExitCode.USAGE
        )
    if socket is not None:
        return SocketTarget(socket), str(socket)
    assert command is not None
    try:
        return CommandTarget(command), command
    except ValueError as error:
        raise CommandError(f"check: --command: {error}", ExitCode.USAGE) from None


def selected(patterns: Sequence[str]) -> list[Check]:
    """Return the checks whose name, or subject, is like one of the patterns; all without patterns."""
    if not patterns:
        return list(CHECKS)
    for pattern in patterns:
        if not any(_is_like(item, pattern) for item in CHECKS):
            raise CommandError(
                f'check: no check is called "{pattern}" (subjects: {", ".join(SUBJECTS)})', ExitCode.USAGE
            )
    return [item for item in CHECKS if any(_is_like(item, pattern) for pattern in patterns)]


def _is_like(item: Check, pattern: str) -> bool:
    return fnmatch(item.full_name, pattern) or item.subject == pattern


def document(target: str, results: Sequence[Result]) -> dict[str, Any]:
    """Return the report for programs."""
    return {
        "target": target,
        **{str(outcome): sum(result.outcome is outcome for result in results) for outcome in Outcome},
        "checks": [
            {
                "name": result.check.full_name,
                "outcome": str(result.outcome),
                "detail": result.detail,
                "specification": result.check.sentence,
                "sent": result.sent,
                "received": result.received,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }


def junit(target: str, results: Sequence[Result]) -> str:
    """Return the report for test harnesses: JUnit XML, in which an unknown outcome is a skipped test."""
    counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in Outcome}
    suite = ET.Element(
        "testsuite",
        name=f"switchover check {_xml(target)}",
        tests=str(len(results)),
        failures=str(counts[Outcome.FAIL]),
        errors="0",
        skipped=str(counts[Outcome.UNKNOWN]),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=f"vfio-user.{result.check.subject}",
            name=result.check.name,
            time=f"{result.seconds:.3f}",
        )
        if result.outcome is Outcome.FAIL:
            failure = ET.SubElement(case, "failure", message=_xml(result.detail))
            failure.text = _xml("\n".join(_explanation(result)))
        elif result.outcome is Outcome.UNKNOWN:
            ET.SubElement(case, "skipped", message=_xml(result.detail))
    text: str = ET.tostring(suite, encoding="unicode")
    return f"<?xml version='1.0' encoding='utf-8'?>\n{text}\n"


def _explanation(result: Result) -> list[str]:
    return [
        f"specification: {result.check.sentence}",
        f"last sent:     {result.sent or '-'}",
        f"last received: {result.received or 'nothing'}",
    ]


def _xml(text: str) -> str:
    # Control characters, which XML cannot carry, may be in a server's last words.
    return "\n".join(printable(line) for line in text.split("\n"))


def _print_result(console: Console, result: Result) -> None:
    style = _STYLES[result.outcome]
    line = Text(f"{result.outcome:8}", style=style)
    line.append(f"{result.check.full_name:{_NAME_WIDTH}}  ", style="bold" if result.outcome is Outcome.FAIL else "")
    line.append(printable(result.detail), style="" if result.outcome is Outcome.FAIL else "dim")
    console.print(line, soft_wrap=True)
    if result.outcome is Outcome.FAIL:
        for explanation in _explanation(result):
            console.print(Text(f"        {printable(explanation)}"), soft_wrap=True)


def _print_summary(console: Console, results: Sequence[Result]) -> None:
    counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in Outcome}
    outcome = Outcome.FAIL if counts[Outcome.FAIL] else Outcome.PASS
    run = "1 check" if len(results) == 1 else f"{len(results)} checks"
    console.print(
        Text(
            f"{run}: {counts[Outcome.PASS]} pass, {counts[Outcome.FAIL]} fail, {counts[Outcome.UNKNOWN]} unknown.",
            style=_STYLES[outcome],
        )
    )
