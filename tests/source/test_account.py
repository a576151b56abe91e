from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from switchover.v1 import host_pb2, migration_pb2

from common.host.events import Events
from common.machine.client import DeviceConfig, DeviceInfo, Tracking
from common.machine.device import Pending
from source import account as account_module
from source.account import Account
from source.lanes import LaneStats
from source.policy import Action, Decision, RoundFacts

SESSION = "5e551075"


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def account(events: Events) -> Iterator[Account]:
    made = make(events)
    yield made
    made.close()


def make(events: Events, **request: object) -> Account:
    asked = host_pb2.MigrateRequest(
        destination="b:1",
        verify=migration_pb2.VERIFY_MODE_DEFERRED,
        **request,  # type: ignore[arg-type]  # members by name
    )

    def tell(progress: host_pb2.Progress) -> None:
        progress.MergeFrom(host_pb2.Progress(compression="lz4"))

    account = Account(events, SESSION, asked, tell)
    account.begin()
    return account


def told(events: Events) -> list[host_pb2.WatchEventsResponse]:
    """Return what a watcher of the session is told until its end."""
    return list(events.watch(SESSION, on_end=lambda _: True))


def facts(number: int, **changes: float) -> RoundFacts:
    members = {
        "elapsed_s": number + 1.5,
        "sent_bytes": 1 << 20,
        "dirty_bytes": 10 * 4096,
        "dirty_rate": 40960.0,
        "device_bytes": 0,
        "bandwidth": 1e6,
        "throttle_percent": 0,
    } | changes
    return RoundFacts(number=number, initial_data_loaded=True, **members)  # type: ignore[arg-type]  # by name


def test_the_result_is_the_last_event(events: Events) -> None:
    account = make(events)
    account.phase("setup")
    account.say("hello")
    account.result.result = "completed"
    account.close()
    seen = told(events)
    assert [event.WhichOneof("event") for event in seen if not event.HasField("progress")] == [
        "phase",
        "message",
        "result",
    ]
    assert seen[-1].result.result == "completed" and not account._teller.is_alive()
    assert {event.session_id for event in seen} == {SESSION}


def test_a_result_that_nobody_has_filled_in_claims_nothing(account: Account) -> None:
    assert account.result.verified == "false" and account.result.result == ""
    assert account.result.verify == "deferred" and account.result.guest_gap_ms == -1
    assert (account.result.session_id, account.result.destination) == (SESSION, "b:1")


def test_progress_is_what_has_been_acknowledged(monkeypatch: pytest.MonkeyPatch, events: Events) -> None:
    monkeypatch.setattr(account_module, "PROGRESS_SECONDS", 0.001)
    account = make(events)
    account.phase("precopy")
    account.round_begins(2, 1000)
    account.meter.applied(256, 1 << 20)
    published = threading.Event()
    watcher = events.watch("", on_end=lambda _: True)
    for event in watcher:
        if event.HasField("progress") and event.progress.sent_bytes:
            published.set()
            break
    watcher.close()  # type: ignore[attr-defined]  # it is a generator
    account.close()
    assert published.is_set()
    progress = event.progress
    assert (progress.phase, progress.round, progress.round_pages, progress.round_done_pages) == (
        "precopy",
        2,
        1000,
        256,
    )
    assert progress.compression == "lz4"
    assert progress.expected_downtime_ms == -1 and progress.bandwidth > 0


def test_a_round_starts_to_count_anew(account: Account) -> None:
    account.round_begins(0, 1000)
    account.meter.applied(256, 1 << 20)
    account.round_begins(1, 10)
    assert account.meter.round_pages == 0 and account.meter.total_bytes == 1 << 20


def test_ram_is_the_sum_of_all_rounds(account: Account) -> None:
    account.round_sent(LaneStats(1000, 200, 3_000_000), 1.0)
    account.round_sent(LaneStats(10, 0, 41_000), 0.01)
    ram = account.result.ram
    assert (ram.pages, ram.zero_pages, ram.transferred_bytes) == (1010, 200, 3_041_000)
    # Pages that are not zero, uncompressed, of the round that was long enough.
    assert account.meter.bandwidth == 800 * 4096


def test_rounds_are_told_with_their_time_and_what_followed(monkeypatch: pytest.MonkeyPatch, events: Events) -> None:
    moment = [50.0]
    monkeypatch.setattr(account_module, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    account = make(events)
    moment[0] += 0.5
    account.precopy_begins()
    stats = LaneStats(1000, 200, 3_000_000)
    for number, decision in enumerate(
        (Decision(Action.THROTTLE, "slower", 20), Decision(Action.SWITCH_OVER, "enough", 20))
    ):
        account.facts.append(facts(number, throttle_percent=account.throttle_percent))
        account.round_decided(account.facts[-1], stats, "lz4", decision)
    account.close()
    first, second = account.result.rounds
    assert (first.number, first.pages, first.zero_pages, first.sent_bytes) == (0, 1000, 200, 3_000_000)
    assert [first.ms, second.ms] == pytest.approx([1000, 1000])
    assert (first.dirty_pages, first.throttle_percent, first.decision) == (10, 0, "slower")
    assert (second.number, second.throttle_percent, second.decision) == (1, 20, "enough")
    assert account.result.throttle_percent == 20
    assert account._progress.expected_downtime_ms == pytest.approx(40.96)
    assert (account._progress.decision, account._progress.throttle_percent) == ("enough", 20)


def test_an_unknown_downtime_is_not_a_number_of_milliseconds(account: Account) -> None:
    account.precopy_begins()
    account.facts.append(facts(0, bandwidth=0.0))
    account.round_decided(account.facts[-1], LaneStats(), "none", Decision(Action.ITERATE, "", 0))
    assert account._progress.expected_downtime_ms == -1


def test_devices_and_tracking_are_told_by_name(account: Account) -> None:
    account.moves("uuid", 1 << 30, [DeviceInfo("nic0", "nic", 7, "RUNNING", comparable_dump=True)])
    account.moves("uuid", 1 << 30, [DeviceInfo("nvme0", "nvme", 1, "RUNNING", comparable_dump=True)])
    account.tracks([Tracking("default", "device", "all log"), Tracking("other", "perpetual", "none logs")])
    account.reported("default", 3)
    account.reported("other", 5)
    account.reported("default", 4)
    account.reported("vCPU", 1000)
    stream = SimpleNamespace(device=SimpleNamespace(name="nvme0"), precopy_bytes=0, stop_copy_bytes=99)
    account.moved([stream], [DeviceConfig("nic0", b"", Pending((0, 3), (0,)))])  # type: ignore[list-item]  # alike
    assert [(d.name, d.kind, d.verified) for d in account.result.devices] == [
        ("nic0", "nic", "not verified"),
        ("nvme0", "nvme", "not verified"),
    ]
    nic, nvme = account.result.devices
    assert (nic.pending_interrupts, nic.pending_doorbells, nic.stop_copy_bytes, nvme.stop_copy_bytes) == (2, 1, 0, 99)
    assert [(t.container, t.method, t.dirty_pages) for t in account.result.dirty_tracking] == [
        ("default", "device", 7),
        ("other", "perpetual", 5),
    ]


def test_a_part_of_the_downtime_is_measured_even_if_it_fails(monkeypatch: pytest.MonkeyPatch, events: Events) -> None:
    moment = [50.0]
    monkeypatch.setattr(account_module, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    account = make(events)
    with contextlib.suppress(KeyError), account.downtime("quiesce"):
        moment[0] += 0.25
        raise KeyError
    account.close()
    assert account.result.downtime.quiesce == pytest.approx(250)
    assert account.result.downtime.pause == 0
