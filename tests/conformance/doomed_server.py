"""A server that comes to harm, as a process: python doomed_server.py HOW SOCKET."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from common.vfio_user.capabilities import Capabilities
from common.vfio_user.codec import FLAG_REPLY, HEADER_SIZE, Command, DmaAccess, Header, Version
from common.vfio_user.description import DeviceInfo, IrqInfo, RegionFlags, RegionInfo

READ_WRITE = RegionFlags.READ | RegionFlags.WRITE


def main(how: str, path: str) -> None:
    if how == "early":
        print("cannot find my configuration", file=sys.stderr)
        sys.exit(3)
    if how == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)
    while True:
        serve(how, listener.accept()[0])


def serve(how: str, client: socket.socket) -> None:
    bar = os.memfd_create("bar")
    os.ftruncate(bar, 4096)
    region = RegionInfo(0, READ_WRITE | RegionFlags.MMAP, 4096)
    while data := client.recv(HEADER_SIZE, socket.MSG_WAITALL):
        header = Header.unpack(data, 1 << 21)
        body = client.recv(header.size - HEADER_SIZE, socket.MSG_WAITALL) if header.size > HEADER_SIZE else b""
        fds = []
        reply = b""
        error = 0
        if header.command == Command.VERSION:
            reply = Version(0, 2, Capabilities()).pack()
        elif header.command == Command.DEVICE_GET_INFO:
            harm(how, client, bar)
            reply = DeviceInfo(2, 9, 5).pack()
        elif header.command == Command.DEVICE_GET_REGION_INFO:
            index = body[8]
            reply = (region if index == 0 else RegionInfo(index)).pack(4096)
            fds = [bar] if index == 0 else []
        elif header.command == Command.DEVICE_GET_IRQ_INFO:
            reply = IrqInfo(body[8]).pack()
        elif header.command == Command.REGION_READ:
            reply = body[:16] + bytes(int.from_bytes(body[12:16], "little"))
        else:
            error = 22
        flags = FLAG_REPLY | (0x20 if error else 0)
        answer = Header(header.message_id, header.command, HEADER_SIZE + len(reply), flags, error).pack() + reply
        socket.send_fds(client, [answer], fds)
        if how == "truncate":
            os.ftruncate(bar, 0)  # under whoever has mapped it by now
    os.close(bar)
    client.close()


def harm(how: str, client: socket.socket, bar: int) -> None:
    if how == "die":
        print("assertion failed: everything", file=sys.stderr, flush=True)
        os.abort()
    if how == "signal":
        os.kill(os.getpid(), signal.SIGRTMIN + 3)
    if how in {"hang", "child"}:
        time.sleep(60)
    while how == "loop":
        client.sendall(Header(1, Command.DMA_READ, HEADER_SIZE + 16).pack() + DmaAccess(0, 64).pack())
    if how == "garbage":
        client.sendall(b"\xff" * 64)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
