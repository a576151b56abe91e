"""The life of a daemon process: one line that says where it listens, then service until a signal."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence

import grpc
from switchover.v1 import host_pb2

from common.host.host import Host, HostError
from common.host.network import Network
from common.host.operation import OnSigterm
from common.host.service import look
from common.ipc.channel import ClosedError, RequestError
from common.memory.allocator import tune_allocator
from common.rpc.server import Server
from common.signals import ending_signals

__all__ = ["fail", "serve"]

GRACE_SECONDS = 2.0
BUSY_SECONDS = 0.05


def fail(message: str, code: int = 1) -> int:
    """Say in one line why the daemon does not run; return its exit code (2: its options or machine file are wrong)."""
    print(f"switchover: {message}", file=sys.stderr)
    return code


def serve(
    host: Host,
    network: Network,
    register: Callable[[grpc.Server], None],
    services: Sequence[str],
    *,
    opening: Callable[[], str],
    closing: Callable[[], None] = lambda: None,
    busy: Callable[[], bool] = lambda: False,
    on_sigterm: OnSigterm = OnSigterm.ABORT,
) -> int:
    """Serve until SIGINT or SIGTERM; return the process's exit code.

    `opening` runs once the port is ours and returns what to say about the machine; `closing` runs at the end, before
    calls are cut off, and ends a migration that runs. To finish it means to wait first, as long as the daemon is `busy`
    or until a second signal. The machine goes on either way.
    """
    tune_allocator()
    with ending_signals() as told:
        try:
            scraped_at = None
            if network.metrics is not None:
                scraped_at = host.metrics.serve(network.metrics, network.tls, lambda: _look(host))
            server = Server(network.listen, register, services, host.security.server, host.security.access)
        except OSError as error:
            return fail(str(error))
        try:
            # Nobody is answered before it is known what this host owns.
            said = opening()
            server.start()
            print(f"switchover {host.role}: listening on {server.address}", flush=True)
            print(f"switchover {host.role}: {said}", flush=True)
            if scraped_at is not None:
                print(f"switchover {host.role}: metrics on {scraped_at}", flush=True)
            os.read(told, 1)
            host.ending = True
            if on_sigterm is OnSigterm.FINISH and busy():
                print(f"switchover {host.role}: ends after the migration; a second signal aborts it", flush=True)
                while busy() and not select.select([told], (), (), BUSY_SECONDS)[0]:
                    pass
            closing()
            if host.machine is not None:
                print(f"switchover {host.role}: the machine goes on", flush=True)
        except (HostError, RequestError, OSError, ValueError) as error:
            return fail(str(error))
        finally:
            host.events.end()
            server.stop(GRACE_SECONDS)
            host.close()
        return 0


def _look(host: Host) -> host_pb2.GetMachineResponse:
    try:
        return look(host)
    except (ClosedError, RequestError):
        return host_pb2.GetMachineResponse(role=host.role)  # its machine has just ended
