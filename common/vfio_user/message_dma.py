"""DMA by message: what a device asks its client for, carried out by the client.

The commands come on the connection on which the client asks too, or, where a server has a twin socket, on one of their
own: libvfio-user loses its place if a command of its client crosses one of its own on the same socket.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from common.vfio.feature import Buffer
from common.vfio_user import codec
from common.vfio_user.capabilities import MAX_TRANSFER
from common.vfio_user.codec import Command, DmaAccess
from common.vfio_user.transport import Connection, ConnectionLostError, Message

__all__ = ["DmaTarget", "serve_dma"]


class DmaTarget(Protocol):
    """Who carries out a device's DMA; an OSError is the answer that the device gets, EINVAL where there is None."""

    name: str
    on_dma_read: Callable[[int, int], Buffer] | None
    on_dma_write: Callable[[int, memoryview], None] | None


def serve_dma(connection: Connection, target: DmaTarget, on_end: Callable[[], None]) -> threading.Thread:
    """Begin to answer a device's commands on a connection, in a thread, which calls `on_end` when the device goes."""
    thread = threading.Thread(
        target=_serve, args=(connection, target, on_end), name=f"vfio-user {target.name}", daemon=True
    )
    thread.start()
    return thread


def _serve(connection: Connection, target: DmaTarget, on_end: Callable[[], None]) -> None:
    try:
        while (command := connection.next_command()) is not None:
            _answer(connection, target, command)
    except ConnectionLostError:
        pass
    finally:
        connection.shutdown()
        on_end()


def _answer(connection: Connection, target: DmaTarget, command: Message) -> None:
    command.close_fds()
    try:
        parts = _carry_out(target, command)
    except OSError as error:
        connection.reply(command, error=error.errno or errno.EIO)
    except ValueError:
        connection.reply(command, error=errno.EINVAL)
    except BaseException:
        connection.reply(command, error=errno.EIO)
        raise
    else:
        connection.reply(command, parts)


def _carry_out(target: DmaTarget, command: Message) -> Sequence[Buffer]:
    access = DmaAccess.unpack(command.body)
    data = memoryview(command.body)[codec.DMA_ACCESS_SIZE :]
    if not 0 < access.size <= MAX_TRANSFER or access.iova + access.size > 1 << 64:
        raise ValueError(f"DMA of 0x{access.size:x} bytes at 0x{access.iova:x}")
    if command.header.command == Command.DMA_READ and target.on_dma_read is not None:
        return [access.pack(), target.on_dma_read(access.iova, access.size)]
    if command.header.command == Command.DMA_WRITE and target.on_dma_write is not None and len(data) == access.size:
        target.on_dma_write(access.iova, data)
        return [access.pack()]
    raise ValueError(f"command {command.header.command} is not possible")
