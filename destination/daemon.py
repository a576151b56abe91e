"""The destination daemon: waits for a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
from switchover.v1 import host_pb2, host_pb2_grpc, migration_pb2

from common.host.daemon import fail, serve
from common.host.host import Host, HostError
from common.host.network import Network
from common.host.operation import AS_USUAL, Operation
from common.host.service import HostServicer
from common.logs import configure_logs
from common.machine.device_config import DEVICE_KINDS, Attachment
from common.rpc.tls import TlsError
from destination import service as arrivals
from destination.service import MigrationServicer

__all__ = ["run"]


def run(
    network: Network,
    state_dir: Path | None,
    device_kinds: Sequence[str] = DEVICE_KINDS,
    attachments: Mapping[str, Attachment] | None = None,
    *,
    operation: Operation = AS_USUAL,
) -> int:
    """Serve until a signal; return the exit code."""
    configure_logs(operation.log_format)
    try:
        host = Host("destination", state_dir, device_kinds, attachments, network.secure())
    except TlsError as error:
        return fail(str(error), 2)
    except (HostError, OSError) as error:
        return fail(str(error))
    servicer = MigrationServicer(host, network.lane_listen, operation.max_reconnect_s)

    def register(server: grpc.Server) -> None:
        host_pb2_grpc.add_HostServiceServicer_to_server(HostServicer(host), server)
        arrivals.register(servicer, server)

    return serve(
        host,
        network,
        register,
        [
            host_pb2.DESCRIPTOR.services_by_name["HostService"].full_name,
            migration_pb2.DESCRIPTOR.services_by_name["MigrationService"].full_name,
        ],
        opening=lambda: host.open_machine(None),
        closing=servicer.close,
        busy=servicer.is_busy,
        on_sigterm=operation.on_sigterm,
    )
