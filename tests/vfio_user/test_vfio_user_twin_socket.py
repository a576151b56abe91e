"""Our client and a server that sends its own commands on a socket of their own."""

from __future__ import annotations

import errno
import threading

import pytest
from twin_server import served

from common.vfio_user import codec
from common.vfio_user.capabilities import TwinSocket
from common.vfio_user.client import DeviceError, VfioUserClient
from common.vfio_user.codec import Command, DmaAccess


def test_dma_by_message_comes_on_the_twin_socket() -> None:
    written: list[tuple[int, bytes]] = []
    with served() as (sock, server, commands):
        with VfioUserClient(
            sock,
            "far0",
            on_dma_read=lambda iova, count: bytes([iova & 0xFF]) * count,
            on_dma_write=lambda iova, data: written.append((iova, bytes(data))),
        ):
            assert server.offered is not None
            assert server.offered.twin_socket == TwinSocket()
            reply = commands.request(Command.DMA_WRITE, [DmaAccess(0x1000, 4).pack(), b"data"])
            assert not reply.error
            reply = commands.request(Command.DMA_READ, [DmaAccess(0x2007, 3).pack()])
            assert bytes(reply.body[codec.DMA_ACCESS_SIZE :]) == b"\x07\x07\x07"
        assert written == [(0x1000, b"data")]


def test_the_device_is_gone_with_either_socket() -> None:
    gone = threading.Event()
    with served() as (sock, _, commands):
        client = VfioUserClient(sock, "far0", on_close=gone.set)
        commands.shutdown()
        assert gone.wait(5)
        with pytest.raises(DeviceError, match="far0"):
            client.get_irq_info(0)
        client.close()


def test_a_twin_socket_that_did_not_come() -> None:
    with served(fd_index=1) as (sock, _, _), pytest.raises(DeviceError, match="twin socket") as refused:
        VfioUserClient(sock, "far0")
    assert refused.value.errno == errno.EPROTO
