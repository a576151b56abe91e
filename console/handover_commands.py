"""The commands that decide about a machine in the place of a host that cannot: never without the operator's word."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from console.errors import CommandError
from console.exit_codes import ExitCode
from console.options import Address, Tls

__all__ = ["forget", "resolve"]

Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]


class Owner(StrEnum):
    """Whose a machine is."""

    HERE = "here"
    THERE = "there"


def resolve(
    address: Address,
    *,
    owner: Annotated[
        Owner, typer.Option(help="Who owns the machine: the source, which goes on with it, or its destination.")
    ],
    yes: Yes = False,
    tls: Tls = None,
) -> None:
    """Say who owns a machine whose destination was lost for good in the handover.

    A source that has sent COMMIT stands still until its destination says
    whether it has taken the machine. If that will never answer again, you can
    answer for it. In any other state this is refused.

    --owner here: the machine goes on at the source, where it stopped. Say so
    only if it does not run at the destination and never will: its host is off,
    or nothing of the machine was left there. Two machines that run at once,
    with the same addresses and disks, destroy each other's data.

    --owner there: the source gives it up. The copy stays, stopped, until
    switchover forget drops it.
    """
    from switchover.v1.host_pb2 import GetMachineRequest, ResolveHandoverRequest
    from switchover.v1.host_pb2 import Owner as OwnerOfMachine

    from console.daemon import QUICK_CALL_S, SLOW_CALL_S, daemon, printable

    with daemon(address, tls) as stub:
        status = stub.GetMachine(GetMachineRequest(), timeout=QUICK_CALL_S)
        if status.ownership != "COMMITTING":
            raise CommandError(f"{address}: no handover is undecided here [DECIDED]", ExitCode.FAILED)
        peer = printable(status.peer)
        if owner is Owner.HERE:
            _confirm(f"The machine will go on at {address}. It must not run at {peer}, now or later.", yes=yes)
        else:
            _confirm(f"{address} will give the machine up, whether or not it runs at {peer}.", yes=yes)
        request = ResolveHandoverRequest(owner=OwnerOfMachine.Value(f"OWNER_{owner.name}"))
        stub.ResolveHandover(request, timeout=SLOW_CALL_S)
    if owner is Owner.HERE:
        typer.echo(f"{address}: the machine is this host's, and goes on")
    else:
        typer.echo(f"{address}: the machine is {peer}'s; its copy here is kept")


def forget(address: Address, *, yes: Yes = False, tls: Tls = None) -> None:
    """Drop what a host has kept of a machine that is not its own, or that has failed.

    That is the copy of a machine that has moved, which is kept if it did not
    start at the destination, if its memory differs there, or if an operator has
    said whose it is; a machine that has failed; and the record that keeps a
    machine that has moved from being started here again. Afterwards the host
    takes any machine, this one too.

    It is refused for a machine that is this host's and has not failed
    (switchover stop ends that), and as long as who owns it is not decided
    (switchover resolve). What is dropped cannot be had back.
    """
    from switchover.v1.host_pb2 import ForgetRequest, GetMachineRequest

    from common.host.ownership import why_kept
    from common.machine.record import Ownership
    from console.daemon import QUICK_CALL_S, SLOW_CALL_S, daemon, printable

    with daemon(address, tls) as stub:
        status = stub.GetMachine(GetMachineRequest(), timeout=QUICK_CALL_S)
        reason = why_kept(
            Ownership(status.ownership) if status.ownership else None,
            state=status.machine.state if status.HasField("machine") else None,
        )
        if reason is not None:
            raise CommandError(f"{address}: not forgotten: {reason}", ExitCode.FAILED)
        if status.HasField("machine"):
            what = f'Machine "{status.machine.name}", which is {status.machine.state} at {address}, will be dropped.'
        else:
            what = f"{address} will start the machine of its record again if it is told to."
        where = f" It has moved to {status.gone_to}." if status.gone_to else ""
        _confirm(printable(what + where), yes=yes)
        stub.Forget(ForgetRequest(), timeout=SLOW_CALL_S)
    typer.echo(f"{address}: the machine is forgotten")


def _confirm(consequence: str, *, yes: bool) -> None:
    """Return if the operator wants it."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{consequence} Say --yes if that is what you want.", ExitCode.USAGE)
    typer.echo(consequence, err=True)
    if typer.prompt("Type yes to do it", default="", show_default=False, err=True) != "yes":
        raise CommandError("nothing was done", ExitCode.FAILED)
