"""The ceiling of a gRPC lane: a bare stream of 1 MiB messages from one RAM file into another, and no more.

Channel options and allocator are those of our lanes. Each message is one copy out of RAM and one into it; all the rest
is gRPC's. Run as a program it is one end: `python -m benchmarks.plain_grpc receive FILE 1 ADDRESS` and `send`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import numpy as np

from benchmarks.plain import mapped
from common.memory.allocator import tune_allocator
from common.rpc.channel import BULK_OPTIONS, open_bulk_channel

__all__: list[str] = []

MESSAGE = 1 << 20
MESSAGES_AN_ACK = 8
METHOD = "/plain.Plain/Send"


class _Receiver(grpc.GenericRpcHandler):
    """Puts messages into memory, one behind the other, and acknowledges some of them."""

    def __init__(self, memory: memoryview) -> None:
        self.bytes = np.frombuffer(memory, np.uint8)
        self.told: dict[str, float] = {}

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(self._receive)

    def _receive(self, messages: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        began, cpu, done = time.monotonic(), time.process_time(), 0
        for number, message in enumerate(messages, 1):
            self.bytes[done : done + len(message)] = np.frombuffer(message, np.uint8)
            done += len(message)
            if not number % MESSAGES_AN_ACK or done == self.bytes.size:
                yield b"!"
        self.told = {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu}


def _send(memory: memoryview, address: str) -> dict[str, float]:
    # As ours is: what belongs to the batch, and its pages.
    messages = (b"".join((b"", memory[start : start + MESSAGE])) for start in range(0, len(memory), MESSAGE))
    with open_bulk_channel(address) as channel:
        grpc.channel_ready_future(channel).result()
        began, cpu = time.monotonic(), time.process_time()
        for _ in channel.stream_stream(METHOD)(messages):
            pass
        return {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu, "sent": len(memory)}


def _end(role: str, path: str, address: str) -> None:
    tune_allocator()
    with mapped(path) as memory:
        if role == "send":
            told = _send(memory, address)
        else:
            server = grpc.server(futures.ThreadPoolExecutor(2), options=BULK_OPTIONS)
            receiver = _Receiver(memory)
            server.add_generic_rpc_handlers((receiver,))
            print(server.add_insecure_port(f"{address}:0"), flush=True)
            server.start()
            while not receiver.told:
                time.sleep(0.01)
            server.stop(1).wait()
            told = receiver.told
            del receiver.bytes  # so that the memory can be let go
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    _end(sys.argv[1], sys.argv[2], sys.argv[4])
