"""A network between two daemons that can be broken: a TCP forwarder that a test controls."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Self

__all__ = ["Direction", "FaultProxy"]

Direction = Literal["there", "back"]
CHUNK = 64 << 10
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, no time


class FaultProxy:
    """Listens at `address` and passes on to HOST:PORT what comes, and back what is answered.

    All faults are for connections that there are and for those that come, until `heal`: `cut` resets them, `stall`
    keeps their bytes, `drop` loses the bytes of one direction, `slow` delays them and limits their rate. What `stall`
    has kept is passed on afterwards, even if the other side has hung up meanwhile, as a network may do.
    """

    def __init__(self, target: str, at: int = 0, on: str = "127.0.0.1") -> None:
        """Listen at port `at`, 0: any, of the address `on`."""
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._connections: set[_Connection] = set()
        self._cut = False
        self._dropped: frozenset[Direction] = frozenset()
        self._delay = 0.0
        self._rate: float | None = None
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._listener = socket.create_server((on, at), backlog=128)
        self.address = f"{on}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self._server: asyncio.Server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, sock=self._listener), self._loop
        ).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Reset all connections, and those that come."""

        def cut() -> None:
            self._cut = True
            self._flows.set()
            for connection in self._connections:
                connection.reset()

        self._do(cut)

    def stall(self) -> None:
        """Pass nothing on, and keep what comes as far as buffers go."""
        self._do(self._flows.clear)

    def drop(self, *directions: Direction) -> None:
        """Lose what goes in these directions: connections are half open."""

        def drop() -> None:
            self._dropped = frozenset(directions)

        self._do(drop)

    def slow(self, *, delay: float = 0.0, rate: float | None = None) -> None:
        """Pass everything on `delay` seconds later, and at most `rate` bytes per second in a direction."""

        def slow() -> None:
            self._delay, self._rate = delay, rate

        self._do(slow)

    def heal(self) -> None:
        """Be a good network; connections that have lost bytes are reset, for TCP would have sent them again."""

        def heal() -> None:
            self._cut, self._dropped, self._delay, self._rate = False, frozenset(), 0.0, None
            self._flows.set()
            for connection in self._connections:
                if connection.has_lost:
                    connection.reset()

        self._do(heal)

    def close(self) -> None:
        """End all connections and the proxy."""
        self.cut()

        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, change: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            if self._cut:
                connection.reset()
                return
            await self._flows.wait()
            with contextlib.suppress(OSError):
                other_reader, other_writer = await asyncio.open_connection(*self._target)
                connection.writers.append(other_writer)
                await asyncio.gather(
                    self._carry(reader, other_writer, "there", connection),
                    self._carry(other_reader, writer, "back", connection),
                )
        finally:
            connection.close()
            self._connections.discard(connection)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: Direction,
        connection: _Connection,
    ) -> None:
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        arriving = asyncio.ensure_future(self._arrive(on_the_way, writer, direction, connection))
        try:
            while data := await reader.read(CHUNK):
                await on_the_way.put((time.monotonic() + self._delay, data))
            await on_the_way.put((0.0, b""))
            await arriving
        finally:
            arriving.cancel()

    async def _arrive(
        self,
        on_the_way: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        direction: Direction,
        connection: _Connection,
    ) -> None:
        while True:
            due, data = await on_the_way.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self._flows.wait()
            if not data:
                if writer.can_write_eof() and direction not in self._dropped:
                    writer.write_eof()
                return
            if direction in self._dropped:
                connection.has_lost = True
                continue
            writer.write(data)
            await writer.drain()
            if self._rate is not None:
                await asyncio.sleep(len(data) / self._rate)


class _Connection:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.has_lost = False

    def reset(self) -> None:
        for writer in self.writers:
            sock: Any = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
