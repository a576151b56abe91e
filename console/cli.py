"""The command `switchover`: arguments in, calls out, exit codes back.

Whatever takes time to import (gRPC, daemons) is imported by the command that needs it, so that --help answers at once.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from common.machine.fields import ConfigError
from common.machine.quantities import parse_duration, parse_rate, parse_size
from console.daemon_commands import destination, host, source
from console.device_commands import capture, check, device, replay
from console.errors import CommandError
from console.exit_codes import ExitCode, exit_code_of
from console.handover_commands import forget, resolve
from console.options import Address, AsJson, Tls, parse_address, parse_directory, parse_patience, positive

__all__ = ["app", "main"]

app = typer.Typer(
    help="Live migration of running machines with VFIO and vfio-user devices, verified page by page.",
    epilog="Exit codes: 0 completed, 1 failed, 2 wrong usage, 3 cancelled, 4 not converged, 5 verification failed, "
    "6 daemon or device cannot be reached.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Verify(StrEnum):
    """When memory and devices are compared."""

    STRICT = "strict"
    DEFERRED = "deferred"
    OFF = "off"


class Compress(StrEnum):
    """How pages are compressed."""

    OFF = "off"
    LZ4 = "lz4"
    ZSTD = "zstd"
    AUTO = "auto"


class LaneKind(StrEnum):
    """How pages travel."""

    GRPC = "grpc"
    TCP = "tcp"


class OnTimeout(StrEnum):
    """What ends a migration that reaches a limit."""

    CANCEL = "cancel"
    SWITCH_OVER = "switch-over"


class OnMismatch(StrEnum):
    """What becomes of a machine that runs already when a difference is found."""

    PAUSE = "pause"
    CONTINUE = "continue"


VerifyOption = Annotated[
    Verify, typer.Option(help="Compare memory and devices before the machine runs, while it runs already, or not.")
]


for _daemon in (source, destination, host):
    app.command()(_daemon)


@app.command()
def migrate(
    *,
    source: Annotated[
        str, typer.Option(parser=parse_address, metavar="HOST:PORT", help="The daemon that holds the machine.")
    ],
    destination: Annotated[
        str, typer.Option(parser=parse_address, metavar="HOST:PORT", help="Where to, as the source reaches it.")
    ],
    max_downtime: Annotated[
        float,
        typer.Option(
            parser=positive(parse_duration), metavar="DURATION", help="Longest time that the machine may stand still."
        ),
    ] = "300ms",  # type: ignore[assignment]  # typer passes defaults through the parser, and shows them in --help
    bandwidth: Annotated[
        float | None,
        typer.Option(parser=positive(parse_rate), metavar="RATE", help="Most to send, for example 1Gbit/s."),
    ] = None,
    verify: VerifyOption = Verify.STRICT,
    timeout: Annotated[
        float | None,
        typer.Option(parser=positive(parse_duration), metavar="DURATION", help="Longest time before the switchover."),
    ] = None,
    max_rounds: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Most rounds of pre-copy.")] = None,
    on_timeout: Annotated[OnTimeout, typer.Option(help="What to do when such a limit is reached.")] = OnTimeout.CANCEL,
    auto_converge: Annotated[
        bool, typer.Option("--auto-converge", help="Slow the vCPUs down if the link cannot keep up.")
    ] = False,
    reconnect: Annotated[
        float,
        typer.Option(
            parser=parse_patience, metavar="DURATION", help="How long to wait for a broken network; 0: not at all."
        ),
    ] = "30s",  # type: ignore[assignment]  # typer parses defaults too
    lanes: Annotated[int, typer.Option(min=1, max=16, help="Streams that carry pages side by side.")] = 1,
    lane_kind: Annotated[
        LaneKind, typer.Option(help="What these are: gRPC streams, or TCP connections of their own.")
    ] = LaneKind.GRPC,
    compress: Annotated[
        Compress, typer.Option(help="Compress pages: not, with lz4 or zstd, or as link and cores make it fastest.")
    ] = Compress.OFF,
    on_mismatch: Annotated[
        OnMismatch, typer.Option(help="With --verify deferred: what to do with a machine whose memory differs.")
    ] = OnMismatch.PAUSE,
    tls: Tls = None,
    as_json: AsJson = False,
) -> int:
    """Move the machine at SOURCE to DESTINATION while it runs."""
    from rich.console import Console
    from switchover.v1.host_pb2 import Compression, MigrateRequest
    from switchover.v1.host_pb2 import OnTimeout as OnTimeoutMode
    from switchover.v1.migration_pb2 import LaneKind as LaneKindMode
    from switchover.v1.migration_pb2 import VerifyMode

    from console.daemon import daemon
    from console.migration import migrate as run
    from console.progress import open_progress

    if source == destination:
        raise CommandError(f"migrate: source and destination are both {source}", ExitCode.USAGE)
    request = MigrateRequest(
        destination=destination,
        max_downtime_ms=max_downtime * 1000,
        bandwidth_limit=bandwidth or 0,
        verify=VerifyMode.Value(f"VERIFY_MODE_{verify.name}"),
        timeout_s=timeout or 0,
        max_rounds=max_rounds or 0,
        on_timeout=OnTimeoutMode.Value(f"ON_TIMEOUT_{on_timeout.name}"),
        auto_converge=auto_converge,
        reconnect_s=reconnect,
        lanes=lanes,
        compression=Compression.Value(f"COMPRESSION_{compress.name}"),
        lane_kind=LaneKindMode.Value(f"LANE_KIND_{lane_kind.name}"),
        continue_on_mismatch=on_mismatch is OnMismatch.CONTINUE,
    )
    try:
        with daemon(source, tls) as stub:
            result = run(stub, request, open_progress(Console(stderr=True)))
    except CommandError as error:
        if as_json:
            _print_json({"result": "failed", "error": str(error), "reason": error.reason})
        raise
    if as_json:
        from console.report import report

        _print_json(report(result))
    else:
        from console.summary import print_summary

        print_summary(Console(), result, source)
    return exit_code_of(result)


@app.command()
def status(address: Address, *, tls: Tls = None, as_json: AsJson = False) -> None:
    """Show a daemon, its machine, and what would prevent a migration."""
    from rich.console import Console
    from switchover.v1.host_pb2 import GetMachineRequest

    from console.daemon import QUICK_CALL_S, daemon, plain_data
    from console.status import print_status

    with daemon(address, tls) as stub:
        answer = stub.GetMachine(GetMachineRequest(), timeout=QUICK_CALL_S)
    if as_json:
        _print_json(plain_data(answer))
    else:
        print_status(Console(), address, answer)


@app.command()
def cancel(address: Address, *, tls: Tls = None) -> None:
    """Cancel the migration that runs; the machine goes on where it is."""
    from switchover.v1.host_pb2 import CancelRequest

    from console.daemon import QUICK_CALL_S, daemon

    with daemon(address, tls) as stub:
        stub.Cancel(CancelRequest(), timeout=QUICK_CALL_S)
    typer.echo(f"{address}: the migration is being cancelled")


@app.command()
def pause(address: Address, *, tls: Tls = None) -> None:
    """Stop the machine's vCPUs and devices."""
    from switchover.v1.host_pb2 import PauseRequest

    from console.daemon import SLOW_CALL_S, daemon

    with daemon(address, tls) as stub:
        stub.Pause(PauseRequest(), timeout=SLOW_CALL_S)
    typer.echo(f"{address}: the machine is paused")


@app.command()
def resume(address: Address, *, tls: Tls = None) -> None:
    """Let a paused machine run again."""
    from switchover.v1.host_pb2 import ResumeRequest

    from console.daemon import SLOW_CALL_S, daemon

    with daemon(address, tls) as stub:
        stub.Resume(ResumeRequest(), timeout=SLOW_CALL_S)
    typer.echo(f"{address}: the machine runs")


@app.command()
def stop(address: Address, *, tls: Tls = None) -> None:
    """End the machine for good, as a power switch does."""
    from switchover.v1.host_pb2 import StopMachineRequest

    from console.daemon import SLOW_CALL_S, daemon

    with daemon(address, tls) as stub:
        stub.StopMachine(StopMachineRequest(), timeout=SLOW_CALL_S)
    typer.echo(f"{address}: the machine is stopped")


for _decision in (resolve, forget):
    app.command()(_decision)


@app.command()
def watch(address: Address, *, tls: Tls = None, as_json: AsJson = False) -> None:
    """Print what happens at a daemon, line by line, until Ctrl-C."""
    from switchover.v1.host_pb2 import WatchEventsRequest

    from console.daemon import daemon, plain_data
    from console.report import report
    from console.status import event_line

    with daemon(address, tls) as stub:
        try:
            for event in stub.WatchEvents(WatchEventsRequest()):
                if as_json:
                    line = plain_data(event)
                    if event.HasField("result"):
                        line["result"] = report(event.result)
                    print(json.dumps(line), flush=True)
                elif not event.HasField("progress") or event.progress.round_pages:
                    print(event_line(event), flush=True)
        except KeyboardInterrupt:
            return
    raise CommandError(f"{address}: the daemon has ended", ExitCode.UNREACHABLE)


@app.command()
def certs(
    directory: Annotated[Path, typer.Argument(parser=parse_directory, metavar="DIRECTORY", help="Where to put them.")],
    *,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,…", help="A host: the names and IP addresses by which others reach it."),
    ] = None,
    operator: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Somebody who calls daemons and is no host.")
    ] = None,
) -> None:
    """Make a private CA for a trial, and for each host and operator a directory for --tls."""
    from console.certs import CA, make_certificates

    if not (host or operator):
        raise CommandError("certs: name a --host or an --operator", ExitCode.USAGE)
    for made in make_certificates(directory, host or [], operator or []):
        typer.echo(f"{made}: copy it to {made.name}, and give --tls the copy there")
    typer.echo(f"{directory / CA}: keep it here; whoever has its key can make anybody's certificate")


for _tool in (device, check, capture, replay):
    app.command()(_tool)


@app.command()
def demo(
    *,
    verify: VerifyOption = Verify.STRICT,
    ram: Annotated[
        float | None,
        typer.Option(
            parser=positive(parse_size), metavar="SIZE", help="Guest RAM; by default, as much as there is data for."
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Migrate a machine between two daemons on this host, and show what that took."""
    from console.demo import run

    return run(verify=verify.name, ram=int(ram) if ram else None, as_json=as_json)


def _print_json(document: Mapping[str, Any]) -> None:
    print(json.dumps(document, indent=2))


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # as typer calls it
    if wanted:
        from importlib.metadata import version

        print(f"switchover {version('switchover')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[  # its callback does the work
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; whatever goes wrong is one line and an exit code."""
    try:
        code = app(prog_name="switchover", standalone_mode=False)
    except typer.TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "switchover")
        problem = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        code = _failure(f"{command}: {problem[0].lower()}{problem[1:]}; see {command} --help", ExitCode.USAGE)
    except ConfigError as error:
        code = _failure(f"switchover: {error}", ExitCode.USAGE)
    except CommandError as error:
        code = _failure(f"switchover: {error}", error.code)
    except OSError as error:
        code = _failure(f"switchover: {error}", ExitCode.FAILED)
    except Exception as error:  # noqa: BLE001  # the edge: a defect of ours is still one line for its victim
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}:{place.lineno}"
        code = _failure(f"switchover: defect: {type(error).__name__}: {error} ({where})", ExitCode.FAILED)
    sys.exit(code)


def _failure(line: str, code: ExitCode) -> ExitCode:
    print(line, file=sys.stderr)
    return code
