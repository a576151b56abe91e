"""A daemon without machines that answers as told: imported by tests, and run as a program by those of the demo."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any

import grpc
from switchover.v1 import host_pb2 as pb
from switchover.v1.host_pb2_grpc import HostServiceServicer, add_HostServiceServicer_to_server

from common.rpc.errors import RefusalError, status_of

SESSION = "5e551075"


def result(**changes: Any) -> pb.MigrationResult:
    """A migration that went well."""
    ended = pb.MigrationResult(
        result="completed",
        verified="true",
        verify="strict",
        destination="b:1",
        machine_uuid="6f2c9e0a-0000-4000-8000-000000000001",
        session_id=SESSION,
        total_ms=1234.5,
        downtime_ms=90.0,
        downtime=pb.Downtime(
            pause=1, quiesce=2, last_sync=3, last_ram=4, devices=5, verification=60, handover=7, start=8
        ),
        guest_gap_ms=91.25,
        guest_gap_error_ms=0.5,
        rounds=[
            pb.Round(number=0, pages=16384, zero_pages=8192, sent_bytes=33_554_432, ms=700, dirty_pages=100),
            pb.Round(number=1, pages=100, sent_bytes=409_600, ms=5, dirty_pages=10, decision="switch over: 10 pages"),
        ],
        ram=pb.RamResult(
            bytes=64 << 20, transferred_bytes=33_964_032, pages=16484, zero_pages=8192, downtime_bytes=40_960
        ),
        devices=[
            pb.DeviceResult(name="nic0", kind="nic", precopy_bytes=4096, stop_copy_bytes=512, verified="compared"),
            pb.DeviceResult(name="nvme0", kind="nvme", stop_copy_bytes=2048, verified="compared"),
        ],
        dirty_tracking=[
            pb.TrackingResult(container="default", method="device", reason="every device logs its DMA", dirty_pages=42)
        ],
        mappings=7,
    )
    ended.MergeFrom(pb.MigrationResult(**changes))
    return ended


def story(ended: pb.MigrationResult) -> list[pb.WatchEventsResponse]:
    """The events of a short migration, 100 ms apart, with 40 reports of progress in each of two rounds."""
    events: list[dict[str, Any]] = [{"phase": "setup"}, {"phase": "precopy"}]
    for number, pages in enumerate((16384, 100)):
        for step in range(40):
            progress = pb.Progress(
                phase="precopy", round=number, round_pages=pages, round_done_pages=pages * step // 40
            )
            progress.expected_downtime_ms = 55.0
            progress.devices.add(name="nic0", state="PRE_COPY", sent_bytes=10, stop_copy_length=-1)
            events.append({"progress": progress})
    events += [
        {"device_state": pb.DeviceStateEvent(name="nic0", state="STOP_COPY")},
        {"message": "worth\x1b[31m a line"},
        {"phase": "switchover"},
        {"phase": "done"},
        {"result": ended},
    ]
    return [
        pb.WatchEventsResponse(unix_ms=1_000_000 + 100 * number, session_id=SESSION, **event)
        for number, event in enumerate(events)
    ]


class FakeHost(HostServiceServicer):
    """Records requests; `streams` are the events of one WatchEvents after the other, an exception breaks one off."""

    def __init__(self, *streams: Iterable[pb.WatchEventsResponse | Exception]) -> None:
        self.streams = list(streams)
        self.requests: list[Any] = []
        self.cancelled = threading.Event()
        self.machine: pb.Machine | None = pb.Machine(name="m", uuid="u", state="running", ram_bytes=64 << 20)
        self.ownership = "OWNER"
        self.refusal: RefusalError | None = None

    def _note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.refusal is not None:
            context.abort_with_status(status_of(self.refusal))

    def GetMachine(self, request: pb.GetMachineRequest, context: grpc.ServicerContext) -> pb.GetMachineResponse:  # noqa: N802
        self._note(request, context)
        return pb.GetMachineResponse(
            role="host", version="9", machine=self.machine, ownership=self.ownership, peer="b:1"
        )

    def Migrate(self, request: pb.MigrateRequest, context: grpc.ServicerContext) -> pb.MigrateResponse:  # noqa: N802
        self._note(request, context)
        return pb.MigrateResponse(session_id=SESSION)

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelResponse:  # noqa: N802
        self._note(request, context)
        self.cancelled.set()
        return pb.CancelResponse()

    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.PauseResponse:  # noqa: N802
        self._note(request, context)
        return pb.PauseResponse()

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeResponse:  # noqa: N802
        self._note(request, context)
        return pb.ResumeResponse()

    def StopMachine(self, request: pb.StopMachineRequest, context: grpc.ServicerContext) -> pb.StopMachineResponse:  # noqa: N802
        self._note(request, context)
        return pb.StopMachineResponse()

    def ResolveHandover(  # noqa: N802
        self, request: pb.ResolveHandoverRequest, context: grpc.ServicerContext
    ) -> pb.ResolveHandoverResponse:
        self._note(request, context)
        return pb.ResolveHandoverResponse()

    def Forget(self, request: pb.ForgetRequest, context: grpc.ServicerContext) -> pb.ForgetResponse:  # noqa: N802
        self._note(request, context)
        return pb.ForgetResponse()

    def WatchEvents(  # noqa: N802
        self, request: pb.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchEventsResponse]:
        self._note(request, context)
        for event in self.streams.pop(0):
            if isinstance(event, Exception):
                context.abort(grpc.StatusCode.UNAVAILABLE, str(event))
            yield event


class Serving:
    """A context manager that serves a `FakeHost` and gives its address."""

    def __init__(self, host: FakeHost | None) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        if host is not None:
            add_HostServiceServicer_to_server(host, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> str:
        self._server.start()
        return f"127.0.0.1:{self._port}"

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()


if __name__ == "__main__":
    # As `python -m console host …` of the demo: a daemon whose machine outlives it, and which is slow to say hello.
    orphan = subprocess.Popen(["sleep", "600"], start_new_session=True)
    fake = FakeHost(story(result()))
    assert fake.machine is not None
    fake.machine.pid = orphan.pid
    fake.machine.programs.add(
        name="clock0", counters={"ticks": 12}, errors=sys.argv[1:2] if "wrong" in sys.argv[1] else []
    )
    with Serving(fake) as address:
        print(f"switchover host: listening on {address}", flush=True)
        threading.Event().wait()
