"""The host daemon: both roles in one, so that machines come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
from switchover.v1 import host_pb2, host_pb2_grpc, migration_pb2

from common.host.daemon import fail, serve
from common.host.host import Host, HostError
from common.host.network import Network
from common.host.operation import AS_USUAL, Operation
from common.logs import configure_logs
from common.machine.attachments import attachments_of
from common.machine.config import parse
from common.machine.device_config import DEVICE_KINDS, Attachment
from common.machine.fields import ConfigError
from common.rpc.tls import TlsError
from destination import service as arrivals
from destination.service import MigrationServicer
from source.service import SourceServicer

__all__ = ["run"]


def run(
    network: Network,
    machine: Path | None,
    state_dir: Path | None,
    device_kinds: Sequence[str] = DEVICE_KINDS,
    attachments: Mapping[str, Attachment] | None = None,
    *,
    operation: Operation = AS_USUAL,
) -> int:
    """Serve until a signal; return the exit code."""
    configure_logs(operation.log_format)
    try:
        spec = parse(machine) if machine is not None else None
        # A machine that comes back finds its devices where its own file says.
        known = {**(attachments_of(spec) if spec is not None else {}), **(attachments or {})}
        host = Host("host", state_dir, device_kinds, known, network.secure())
    except (ConfigError, TlsError) as error:
        return fail(str(error), 2)
    except (HostError, OSError) as error:
        return fail(str(error))
    outgoing = SourceServicer(host)
    incoming = MigrationServicer(host, network.lane_listen, operation.max_reconnect_s)

    def register(server: grpc.Server) -> None:
        host_pb2_grpc.add_HostServiceServicer_to_server(outgoing, server)
        arrivals.register(incoming, server)

    def close() -> None:
        outgoing.close()
        incoming.close()

    return serve(
        host,
        network,
        register,
        [
            host_pb2.DESCRIPTOR.services_by_name["HostService"].full_name,
            migration_pb2.DESCRIPTOR.services_by_name["MigrationService"].full_name,
        ],
        opening=lambda: outgoing.open_machine(spec),
        closing=close,
        busy=incoming.is_busy,
        on_sigterm=operation.on_sigterm,
    )
