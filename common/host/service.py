"""HostService: the machine of this daemon, for an operator. Moving it away is added by the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
from switchover.v1 import host_pb2, host_pb2_grpc

from common.host.host import Host
from common.ipc.channel import RequestError
from common.machine.record import Ownership
from common.rpc.errors import RefusalError

__all__ = ["VERSION", "HostServicer", "look"]

VERSION = "0.1.0"


def look(host: Host) -> host_pb2.GetMachineResponse:
    """Describe a daemon and its machine."""
    machine = host.machine
    record = host.record()
    return host_pb2.GetMachineResponse(
        role=host.role,
        version=VERSION,
        machine=machine.describe() if machine is not None else None,
        session_id=host.session_id,
        migrating=host.migrating,
        gone_to=host.gone_to if not host.migrating else "",
        ownership=record.ownership if record is not None else "",
        peer=record.peer if record is not None else "",
    )


class HostServicer(host_pb2_grpc.HostServiceServicer):
    """What every daemon answers."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def GetMachine(
        self, request: host_pb2.GetMachineRequest, context: grpc.ServicerContext
    ) -> host_pb2.GetMachineResponse:
        """Describe daemon and machine."""
        return look(self.host)

    def Migrate(self, request: host_pb2.MigrateRequest, context: grpc.ServicerContext) -> host_pb2.MigrateResponse:
        """Refuse: only a source moves machines away."""
        raise self._not_a_source()

    def Cancel(self, request: host_pb2.CancelRequest, context: grpc.ServicerContext) -> host_pb2.CancelResponse:
        """Refuse: a migration is cancelled where it started."""
        raise self._not_a_source()

    def ResolveHandover(
        self, request: host_pb2.ResolveHandoverRequest, context: grpc.ServicerContext
    ) -> host_pb2.ResolveHandoverResponse:
        """Refuse: it is at the source that a machine waits for a decision."""
        raise self._not_a_source()

    def _not_a_source(self) -> RefusalError:
        return RefusalError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "NOT_A_SOURCE",
            f"this daemon is a {self.host.role}; migrations start, and are cancelled or resolved, at a source or host",
        )

    def Pause(self, request: host_pb2.PauseRequest, context: grpc.ServicerContext) -> host_pb2.PauseResponse:
        """Pause the machine."""
        self._steer(self.host.require_machine().pause)
        self.host.events.publish(machine_state="paused")
        return host_pb2.PauseResponse()

    def Resume(self, request: host_pb2.ResumeRequest, context: grpc.ServicerContext) -> host_pb2.ResumeResponse:
        """Let the machine run."""
        self._steer(self.host.require_machine().resume)
        self.host.events.publish(machine_state="running")
        return host_pb2.ResumeResponse()

    def _steer(self, change: Callable[[], None]) -> None:
        """Pause or resume the machine, also beside a migration; the machine itself refuses it in the switchover."""
        try:
            change()
        except RequestError as error:
            if error.reason != "EBUSY":
                raise
            raise RefusalError(grpc.StatusCode.ABORTED, "MIGRATION_RUNS", str(error)) from error

    def StopMachine(
        self, request: host_pb2.StopMachineRequest, context: grpc.ServicerContext
    ) -> host_pb2.StopMachineResponse:
        """End the machine."""
        if self.host.machine is None:
            self.host.require_machine()  # says where it went; the copy of one that has gone may be stopped
        with self.host.not_migrating():
            record = self.host.record()
            gone = record is not None and record.ownership is Ownership.GONE
            self.host.release(Ownership.RELEASED if gone else Ownership.OFF)
        self.host.events.publish(machine_state="off")
        return host_pb2.StopMachineResponse()

    def Forget(self, request: host_pb2.ForgetRequest, context: grpc.ServicerContext) -> host_pb2.ForgetResponse:
        """Let go of what is kept here."""
        with self.host.not_migrating():
            self.host.forget()
        self.host.events.publish(machine_state="forgotten")
        return host_pb2.ForgetResponse()

    def WatchEvents(
        self, request: host_pb2.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[host_pb2.WatchEventsResponse]:
        """Tell what happens."""
        yield from self.host.events.watch(request.session_id, on_end=context.add_callback)
