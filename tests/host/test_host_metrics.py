"""What Prometheus is answered, and who may ask."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from switchover.v1 import host_pb2

from common.host.metrics import STATES, Metrics
from common.host.network import Network
from common.rpc.tls import TlsError
from console.certs import make_certificates


def describe() -> host_pb2.GetMachineResponse:
    machine = host_pb2.Machine(name="m", state="paused", ram_bytes=64 << 20, ram_allocated_bytes=4096, incarnation=3)
    return host_pb2.GetMachineResponse(machine=machine, ownership="OWNER", migrating=True)


def scrape(url: str, context: ssl.SSLContext | None = None) -> dict[tuple[str, ...], float]:
    """Return each sample by its name and the values of its labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20, context=context) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_what_is_counted() -> None:
    metrics = Metrics()
    address = metrics.serve("127.0.0.1:0", None, describe)
    before = scrape(f"http://{address}")
    assert before["switchover_migrations_total", "failed"] == before["switchover_downtime_seconds_count",] == 0
    metrics.sent(3, 9000)
    metrics.received(2, 8192)
    metrics.dirty("default", 5)
    metrics.dirty("default", 2)
    metrics.arrived("revoked")
    metrics.ended(host_pb2.MigrationResult(result="completed", downtime_ms=250))
    metrics.ended(host_pb2.MigrationResult(result="failed"))  # before it stood still
    after = scrape(f"http://{address}")
    assert after["switchover_pages_total", "sent"] == 3 and after["switchover_page_bytes_total", "received"] == 8192
    assert after["switchover_dirty_pages_total", "default"] == 7
    assert after["switchover_arrivals_total", "revoked"] == after["switchover_migrations_total", "completed"] == 1
    assert (after["switchover_downtime_seconds_count",], after["switchover_downtime_seconds_sum",]) == (1, 0.25)
    assert after["switchover_downtime_seconds_bucket", "0.2"] == 0
    assert after["switchover_downtime_seconds_bucket", "0.3"] == 1
    assert {state: after["switchover_machine_state", "m", state] for state in STATES} == {
        state: float(state == "paused") for state in STATES
    }
    assert after["switchover_machine_incarnation", "m"] == 3 and after["switchover_migrating",] == 1
    assert (after["switchover_owner",], after["switchover_undecided",]) == (1, 0)


def test_two_daemons_of_a_process_count_apart() -> None:
    """As those of tests are."""
    first, second = Metrics(), Metrics()
    first.arrived("committed")
    address = second.serve("127.0.0.1:0", None, host_pb2.GetMachineResponse)
    found = scrape(f"http://{address}")
    assert found["switchover_arrivals_total", "committed"] == 0
    assert not any(name == "switchover_machine_state" for name, *_ in found)


def test_a_port_that_is_taken() -> None:
    address = Metrics().serve("127.0.0.1:0", None, describe)
    with pytest.raises(OSError, match=f"cannot listen on {address} for --metrics: "):
        Metrics().serve(address, None, describe)


def test_with_tls_whoever_has_a_certificate_may_ask(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["host1,localhost,127.0.0.1"], ["ops"])
    address = Metrics().serve("127.0.0.1:0", tmp_path / "host1", describe)
    context = ssl.create_default_context(cafile=tmp_path / "ops" / "ca-cert.pem")
    with pytest.raises((urllib.error.URLError, OSError)):
        scrape(f"https://{address}", context)
    context.load_cert_chain(tmp_path / "ops" / "client-cert.pem", tmp_path / "ops" / "client-key.pem")
    assert scrape(f"https://{address}", context)["switchover_owner",] == 1


def test_beyond_loopback_tls_or_a_word_is_needed(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["host1"], [])
    with pytest.raises(TlsError, match=r"^0\.0\.0\.0:0 can be reached from other hosts"):
        Network("127.0.0.1:0", metrics="0.0.0.0:0").secure()
    Network("127.0.0.1:0", metrics="127.0.0.1:0").secure()
    Network("127.0.0.1:0", metrics="0.0.0.0:0", insecure=True).secure()
    Network("127.0.0.1:0", tmp_path / "host1", metrics="0.0.0.0:0").secure()
