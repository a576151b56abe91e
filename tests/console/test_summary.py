from __future__ import annotations

import io

import pytest
from fake_host import result
from rich.console import Console
from switchover.v1 import host_pb2 as pb

from console.summary import print_summary, sentences


def printed(ended: pb.MigrationResult) -> str:
    stream = io.StringIO()
    print_summary(Console(file=stream, width=160), ended, "a:1")
    return stream.getvalue()


def test_a_migration_that_went_well() -> None:
    outcome, verification, downtime, gap, ram, tracking = sentences(result(), "a:1")
    assert outcome == "Completed in 1.23 s: the machine has moved from a:1 to b:1."
    assert verification == (
        "Verified before the machine ran at the destination: all 16,384 pages of RAM, read back there, equal the "
        "source's, and so do nic0 and nvme0."
    )
    assert "stood still for 90.0 ms: 30.0 ms to be moved" in downtime and "60.0 ms to be compared" in downtime
    assert "a gap of 91.2 ms (± 0.50 ms)" in gap
    assert "32.4 MiB were sent for 16,484 pages, 8,192 of them zero" in ram and "7 vIOMMU mappings" in ram
    assert tracking == (
        'DMA in address space "default" was tracked by the devices\' own logs: every device logs its DMA; '
        "42 dirty pages were found so."
    )


def test_the_tables_hold_every_part() -> None:
    text = printed(result())
    assert "sending them" in text and "comparing memory and devices" in text
    assert "switch over: 10 pages" in text
    assert "nvme0" in text


@pytest.mark.parametrize(("rounds", "lines"), [(17, 17), (18, 17), (400, 17)])
def test_of_many_rounds_the_first_and_the_last_are_shown(rounds: int, lines: int) -> None:
    ended = result()
    del ended.rounds[:]
    ended.rounds.extend(pb.Round(number=number, decision=f"<{number}>") for number in range(rounds))
    text = printed(ended)
    assert "<0>" in text and f"<{rounds - 1}>" in text
    assert text.count("<") + text.count("more rounds") == lines
    assert (f"{rounds - 16} more rounds, in full with --json" in text) == (rounds > 17)


def test_verification_that_was_off_is_said() -> None:
    lines = sentences(result(verify="off", verified="false", downtime=pb.Downtime(pause=2)), "a:1")
    assert lines[1].startswith("Not verified: verification was off.")


def test_verification_after_the_start_and_devices_that_cannot_be_read() -> None:
    opaque = pb.DeviceResult(name="card", kind="vfio-user", verified="transport")
    line = sentences(result(verify="deferred", verified="transport", devices=[opaque]), "a:1")[1]
    assert line.startswith("Verified while the machine ran on")
    assert line.endswith("card cannot be read from outside: that every record arrived unchanged is all we know.")


def test_pages_that_differ_come_with_their_history() -> None:
    page = pb.PageMismatch(page=77, gpa=0x4D000, sent_in_rounds=[0, 1], could_have_written=["nic0 at IOVA 0xfe001000"])
    differs = pb.DeviceResult(name="gpu", verified="differs")
    text = printed(
        result(
            result="failed",
            error="memory differs",
            reason="DATA_LOSS",
            mismatches=[page],
            mismatched_pages=3,
            devices=[differs],
        )
    )
    assert "Failed after 1.23 s: memory differs [DATA_LOSS]." in text
    assert "NOT EQUAL: 3 pages of RAM differ and gpu differs at the destination." in text
    assert "page 77 at 0x4d000: sent in rounds 0, 1" in text
    assert "reported dirty by nobody" in text
    assert "could be written by nic0 at IOVA 0xfe001000" in text


@pytest.mark.parametrize(
    ("owner", "said"),
    [
        ("source", "The machine goes on at a:1."),
        ("destination", "The machine counts as the one of b:2, which has not said whether it runs."),
    ],
)
def test_what_an_operator_has_declared_is_not_what_the_destination_says(owner: str, said: str) -> None:
    ended = result(result="failed", error="declared", reason="RESOLVED", owner=owner, destination="b:2")
    assert sentences(ended, "a:1")[0] == f"Failed after 1.23 s: declared [RESOLVED]. {said}"


def test_a_migration_that_never_stopped_the_machine_has_no_downtime() -> None:
    ended = pb.MigrationResult(result="cancelled", error="asked to", total_ms=5, verify="strict", verified="false")
    assert sentences(ended, "a:1") == [
        "Cancelled after 5.00 ms: asked to. The machine goes on at a:1.",
        "Not verified: the migration ended before memory could be compared.",
    ]
    assert "downtime" not in printed(ended)


@pytest.mark.parametrize(("times", "said"), [(1, "once"), (3, "3 times")])
def test_a_connection_that_was_lost_is_told(times: int, said: str) -> None:
    lines = sentences(result(reconnects=times, disconnected_ms=12_345), "a:1")
    assert [line for line in lines if "connection" in line] == [
        f"The connection was lost and restored {said}, and there was none for 12.35 s in all; nothing was begun again."
    ]
    assert not any("connection" in line for line in sentences(result(), "a:1"))


@pytest.mark.parametrize("field", ["error", "destination"])
def test_a_daemon_does_not_steer_the_terminal(field: str) -> None:
    text = printed(result(**{field: "x\x1b[2Jy\n[bold]z[/bold]"}))
    assert "\x1b" not in text
    assert "x [2Jy [bold]z[/bold]" in text
