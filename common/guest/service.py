"""The vCPU process's only loop: requests of the machine, interrupts, steps.

While the vCPU runs, a request is answered after the current step. While it is paused the loop waits for requests only,
so that interrupts stay in their eventfds, where the machine finds them.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Mapping
from typing import Any

from common.guest.boot import parse
from common.guest.vcpu import Vcpu
from common.ipc.channel import ClosedError, Handler, Message, RequestError, answer_one, receive
from common.memory.write_journal import WriteJournal

__all__ = ["serve_vcpu"]

JOURNAL_LIMIT = 1 << 16


def serve_vcpu(vcpu: Vcpu, control: socket.socket) -> None:
    """Run the vCPU as the machine asks; return when the machine closes the connection."""
    handlers = _handlers(vcpu)
    with select.epoll() as epoll:
        epoll.register(control, select.EPOLLIN)
        watched: set[int] = set()
        while True:
            for fd in vcpu.interrupts.keys() - watched:
                epoll.register(fd, select.EPOLLIN)
                watched.add(fd)
            if vcpu.running and (wait_ns := vcpu.wait_ns()):
                # An epoll waits for whole milliseconds, which would be a clock tick; a select for microseconds.
                select.select([epoll], [], [], min(wait_ns / 1e9, 1.0))
            ready = [fd for fd, _ in epoll.poll(0)] if vcpu.running else [control.fileno()]
            if control.fileno() in ready:
                try:
                    answer_one(control, receive(control), handlers)
                except ClosedError:
                    return
            for fd in ready:
                if fd in vcpu.interrupts and vcpu.running:
                    vcpu.interrupt(fd)
            if vcpu.running:
                vcpu.step()


def _handlers(vcpu: Vcpu) -> dict[str, Handler]:
    received: list[int] = []  # more than one message can carry

    def descriptors(request: Message) -> None:
        received.extend(request.fds)

    def attach(request: Message) -> None:
        fds = received[:]
        received.clear()
        try:
            vcpu.attach(parse(request["boot"], len(fds)), fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def run(_: Message) -> None:
        vcpu.run()

    def pause(_: Message) -> dict[str, Any]:
        vcpu.pause()
        return vcpu.report()

    def state_out(_: Message) -> dict[str, Any]:
        return {"vcpu": vcpu.state_out()}

    def state_in(request: Message) -> None:
        vcpu.state_in(request["vcpu"])

    def dirty_log_start(_: Message) -> None:
        vcpu.memory.start_log()

    def dirty_log_stop(_: Message) -> None:
        vcpu.memory.stop_log()

    def dirty_log(_: Message) -> Message:
        return Message(payload=vcpu.memory.take_log().to_bytes())

    def journal_start(_: Message) -> None:
        vcpu.memory.journal = WriteJournal()

    def journal(request: Message) -> Message:
        kept = vcpu.memory.journal
        rows = kept.of(request["first"], request["pages"], JOURNAL_LIMIT).tobytes() if kept is not None else b""
        return Message(payload=rows)

    def throttle(request: Message) -> None:
        vcpu.throttle(request["percent"])

    def report(_: Message) -> dict[str, Any]:
        return vcpu.report()

    handlers: tuple[Handler, ...] = (
        *(descriptors, attach, run, pause, state_out, state_in),
        *(dirty_log_start, dirty_log_stop, dirty_log, journal_start, journal, throttle, report),
    )
    return {handler.__name__: _refusing(handler) for handler in handlers}


def _refusing(handler: Handler) -> Handler:
    """Refuse a request, EINVAL, where `handler` finds something wrong with it."""

    def handle(request: Message) -> Message | Mapping[str, Any] | None:
        try:
            return handler(request)
        except KeyError as error:
            raise RequestError("EINVAL", f"{error} is missing") from error
        except (TypeError, ValueError) as error:
            raise RequestError("EINVAL", str(error)) from error

    return handle
