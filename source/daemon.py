"""The source daemon: runs a machine, and moves it away when told."""

from __future__ import annotations

from pathlib import Path

from switchover.v1 import host_pb2, host_pb2_grpc

from common.host.daemon import fail, serve
from common.host.host import Host, HostError
from common.host.network import Network
from common.host.operation import AS_USUAL, Operation
from common.logs import configure_logs
from common.machine.config import parse
from common.machine.fields import ConfigError
from common.rpc.tls import TlsError
from source.service import SourceServicer

__all__ = ["run"]


def run(network: Network, machine: Path | None, state_dir: Path | None, *, operation: Operation = AS_USUAL) -> int:
    """Serve until a signal; return the exit code."""
    configure_logs(operation.log_format)
    try:
        spec = parse(machine) if machine is not None else None
        host = Host("source", state_dir, security=network.secure())
    except (ConfigError, TlsError) as error:
        return fail(str(error), 2)
    except (HostError, OSError) as error:
        return fail(str(error))
    servicer = SourceServicer(host)
    return serve(
        host,
        network,
        lambda server: host_pb2_grpc.add_HostServiceServicer_to_server(servicer, server),
        [host_pb2.DESCRIPTOR.services_by_name["HostService"].full_name],
        opening=lambda: servicer.open_machine(spec),
        closing=servicer.close,
        busy=lambda: host.migrating,
        on_sigterm=operation.on_sigterm,
    )
