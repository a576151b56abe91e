"""What a daemon tells Prometheus: counters that migrations move, and its machine as it is when it is asked.

Names and meanings are in README.md. Nothing is served unless the operator says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from switchover.v1 import host_pb2

from common.rpc.tls import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY

__all__ = ["Metrics"]

DOWNTIME_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STATES = ("running", "paused", "incoming", "handing over", "moved", "failed")


class Metrics:
    """A registry of this daemon's own; migrations call what counts for them."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._migrations = Counter("switchover_migrations", "Migrations that left.", ["outcome"], registry=registry)
        self._arrivals = Counter("switchover_arrivals", "Migrations that came.", ["outcome"], registry=registry)
        self._reconnects = Counter("switchover_reconnects", "Connections that were restored.", registry=registry)
        self._downtime = Histogram(
            "switchover_downtime_seconds",
            "Time in which a machine that left ran nowhere.",
            buckets=DOWNTIME_BUCKETS,
            registry=registry,
        )
        moved_bytes = Counter("switchover_page_bytes", "Bytes of page batches.", ["direction"], registry=registry)
        moved_pages = Counter("switchover_pages", "Pages, zero pages too.", ["direction"], registry=registry)
        # To look a label up takes as long as to count.
        self._sent, self._received = (
            (moved_pages.labels(direction), moved_bytes.labels(direction)) for direction in ("sent", "received")
        )
        self._dirty = Counter(
            "switchover_dirty_pages", "Pages that a collection found dirty.", ["source"], registry=registry
        )
        for outcome in ("completed", "cancelled", "failed"):
            self._migrations.labels(outcome)
        for outcome in ("committed", "revoked"):
            self._arrivals.labels(outcome)

    def sent(self, pages: int, size: int) -> None:
        """Count pages that were sent and applied, and the bytes that it took."""
        sent_pages, sent_bytes = self._sent
        sent_pages.inc(pages)
        sent_bytes.inc(size)

    def received(self, pages: int, size: int) -> None:
        """Count pages that were applied here."""
        received_pages, received_bytes = self._received
        received_pages.inc(pages)
        received_bytes.inc(size)

    def dirty(self, source: str, pages: int) -> None:
        """Count what a collection found in an address space, or of the vCPUs."""
        self._dirty.labels(source).inc(pages)

    def ended(self, result: host_pb2.MigrationResult) -> None:
        """Count a migration that left, or tried to."""
        self._migrations.labels(result.result).inc()
        self._reconnects.inc(result.reconnects)
        if result.downtime_ms:
            self._downtime.observe(result.downtime_ms / 1000)

    def arrived(self, outcome: str) -> None:
        """Count a migration that came: committed or revoked."""
        self._arrivals.labels(outcome).inc()

    def serve(self, listen: str, tls: Path | None, describe: Callable[[], host_pb2.GetMachineResponse]) -> str:
        """Answer scrapes at HOST:PORT, with TLS to whoever has a certificate of the CA; return the address.

        `describe` is asked for the machine at each of them. OSError: the port cannot be had.
        """
        self.registry.register(_Machine(describe))
        host, _, port = listen.rpartition(":")
        try:
            server, _ = start_http_server(
                int(port),
                host.strip("[]"),
                self.registry,
                certfile=str(tls / SERVER_CERTIFICATE) if tls is not None else None,
                keyfile=str(tls / SERVER_KEY) if tls is not None else None,
                client_cafile=str(tls / CA_CERTIFICATE) if tls is not None else None,
                client_auth_required=tls is not None,
            )
        except OSError as error:
            raise OSError(f"cannot listen on {listen} for --metrics: {error.strerror or error}") from error
        return f"{host}:{server.server_port}"


class _Machine(Collector):
    def __init__(self, describe: Callable[[], host_pb2.GetMachineResponse]) -> None:
        self._describe = describe

    def collect(self) -> Iterator[Metric]:
        status = self._describe()
        machine = status.machine
        state = GaugeMetricFamily("switchover_machine_state", "1 for the machine's state.", labels=["machine", "state"])
        if status.HasField("machine"):
            for name in STATES:
                state.add_metric([machine.name, name], float(machine.state == name))
        yield state
        for name, what, value in (
            ("switchover_machine_ram_bytes", "Size of guest RAM.", machine.ram_bytes),
            ("switchover_machine_ram_allocated_bytes", "Guest RAM that holds data.", machine.ram_allocated_bytes),
            ("switchover_machine_incarnation", "Grows with every handover.", machine.incarnation),
        ):
            family = GaugeMetricFamily(name, what, labels=["machine"])
            if status.HasField("machine"):
                family.add_metric([machine.name], float(value))
            yield family
        yield GaugeMetricFamily(
            "switchover_owner", "Whether this host owns its machine.", float(status.ownership == "OWNER")
        )
        undecided = float(status.ownership == "COMMITTING")
        yield GaugeMetricFamily("switchover_undecided", "Whether nobody knows yet who owns the machine.", undecided)
        yield GaugeMetricFamily("switchover_migrating", "Whether a migration runs.", float(status.migrating))
