"""The sample device: its registers, its state, and the conversation that libvfio-user's client has with it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from captures import DESTINATION, SOURCE, load
from device_rig import PATIENCE, Rig

from common.datasheets import sample
from common.vfio.feature import Range
from common.vfio.migration import DeviceState
from common.vfio_user.client import DeviceError
from common.vfio_user.codec import Command, Header, RegionAccess, Version
from common.vfio_user.description import IrqFlags, IrqInfo, RegionInfo
from common.vfio_user.transcript import Recorded

S = DeviceState
PAGE = 4096
SIZE = sample.MEMORY_SIZE + sample.TIMER_SIZE


@pytest.fixture
def device(rig: Callable[..., Rig]) -> Rig:
    made = rig("sample")
    made.client.set_irqs(0, IrqFlags.DATA_EVENTFD | IrqFlags.ACTION_TRIGGER, 0, 1, fds=[made.irq])
    return made


def arm(device: Rig, seconds: int) -> int:
    """Set the timer; return the time that was set."""
    due = int(time.time()) + seconds
    device.write(sample.TIMER, due, 8)
    return due


def timer(device: Rig) -> int:
    return int.from_bytes(device.client.region_read(sample.TIMER_BAR, sample.TIMER, 8), "little", signed=True)


def quiet(device: Rig) -> bool:
    try:
        os.eventfd_read(device.irq)
    except BlockingIOError:
        return True
    return False


def test_the_timer_interrupts_and_then_there_is_dma(device: Rig) -> None:
    memory: dict[int, bytes] = {}
    device.client.on_dma_write = lambda iova, data: memory.update({iova: bytes(data)})
    device.client.on_dma_read = lambda iova, count: memory[iova] + memory[iova + 1024]
    for page in (2, 5, 9):
        device.map_ram(page * PAGE, PAGE, page * PAGE)
    device.client.logging_start(PAGE, [Range(0, 16 * PAGE)])
    before = time.time()
    due = arm(device, 1)
    assert device.interrupted()
    assert due <= time.time() and before < due
    device.wait(lambda: len(memory) == 4)
    assert b"".join(memory.values()) == sample.DMA_CONTENT
    assert list(memory) == [2 * PAGE + at for at in range(0, PAGE, 1024)]
    assert device.ram.mmap[5 * PAGE : 6 * PAGE] == sample.DMA_CONTENT
    assert not any(device.ram.mmap[9 * PAGE : 10 * PAGE])
    assert device.client.logging_report(0, 16 * PAGE, PAGE).tolist() == [1 << 2 | 1 << 5]


def test_a_time_that_has_gone_by_is_now_and_reading_acknowledges(device: Rig) -> None:
    unmask = IrqFlags.DATA_NONE | IrqFlags.ACTION_UNMASK
    arm(device, -5)
    assert device.interrupted()
    device.client.set_irqs(0, unmask, 0, 1)
    assert device.interrupted()
    assert timer(device) in {5, 6}
    device.client.set_irqs(0, unmask, 0, 1)
    assert quiet(device)
    arm(device, 0)
    assert device.interrupted()


@pytest.mark.parametrize(("offset", "data"), [(0, bytes(4)), (4, bytes(4)), (0, bytes(7) + b"\x80"), (0, bytes(16))])
def test_what_is_no_time_is_refused(device: Rig, offset: int, data: bytes) -> None:
    due = arm(device, 100)
    with pytest.raises(DeviceError) as refused:
        device.client.region_write(sample.TIMER_BAR, offset, data)
    assert refused.value.errno == errno.EINVAL
    assert timer(device) - (int(time.time()) - due) in {-1, 0}


def test_the_memory_ends_before_its_bar(device: Rig) -> None:
    device.client.region_write(sample.MEMORY_BAR, sample.MEMORY_SIZE - 4, b"the last")
    bar = device.client.region_read(sample.MEMORY_BAR, 0, sample.MEMORY_BAR_SIZE)
    assert bar == bytes(sample.MEMORY_SIZE - 4) + b"the " + bytes(PAGE)
    device.client.reset()
    assert not any(device.client.region_read(sample.MEMORY_BAR, 0, sample.MEMORY_BAR_SIZE))


def test_without_bus_mastering_there_is_an_interrupt_and_no_dma(device: Rig) -> None:
    device.map_ram()
    device.bus_master(on=False)
    arm(device, 0)
    assert device.interrupted()
    device.client.set_state(S.STOP)
    assert not any(device.ram.mmap[: 16 * PAGE])


def test_the_state_is_memory_and_timer_wherever_reading_begins(device: Rig, rig: Callable[..., Rig]) -> None:
    device.client.region_write(sample.MEMORY_BAR, 0, b"first")
    due = arm(device, 1000)
    device.client.set_state(S.PRE_COPY)
    info = device.client.precopy_info()
    assert (info.initial_bytes, info.dirty_bytes) == (sample.MEMORY_SIZE, 0)
    before = device.drain(5000)
    assert len(before) == sample.MEMORY_SIZE and before[:5] == b"first"
    assert device.client.precopy_info().initial_bytes == 0
    device.client.region_write(sample.MEMORY_BAR, 0, b"second")
    device.client.set_state(S.STOP_COPY)
    assert device.client.stop_copy_length() == SIZE
    state = device.drain(1000)
    assert device.client.stop_copy_length() == 0
    assert len(state) == SIZE and state[:6] == b"second" and state[-8:] == due.to_bytes(8, "little")
    for stream in (state, before + state):
        target = rig("sample")
        target.load(stream)
        assert target.dump() == state
        assert target.client.region_read(sample.MEMORY_BAR, 0, 6) == b"second"
        # The clock of a stopped device stands still, so two of them can be compared.
        assert timer(target) == -due


def test_a_timer_that_has_fired_does_not_fire_again_elsewhere(device: Rig, rig: Callable[..., Rig]) -> None:
    fired, late = arm(device, 0), int(time.time()) - 3
    assert device.interrupted()
    state = device.dump()
    assert int.from_bytes(state[-8:], "little", signed=True) == -fired
    for timed, fires in ((state, False), (state[:-8] + late.to_bytes(8, "little"), True)):
        target = rig("sample")
        target.client.set_irqs(0, IrqFlags.DATA_EVENTFD | IrqFlags.ACTION_TRIGGER, 0, 1, fds=[target.irq])
        target.load(timed)
        target.client.set_state(S.RUNNING)
        if fires:
            assert target.interrupted()
        else:
            time.sleep(0.1)
            assert quiet(target)


def test_pre_copy_that_was_left_early_is_completed(device: Rig, rig: Callable[..., Rig]) -> None:
    device.client.set_state(S.PRE_COPY)
    begun = bytes(device.client.mig_data_read(77))
    device.client.region_write(sample.MEMORY_BAR, 0, b"second")
    device.client.set_state(S.STOP_COPY)
    left = sample.MEMORY_SIZE - 77 + SIZE
    assert device.client.stop_copy_length() == left
    rest = device.drain(1000)
    assert len(rest) == left
    target = rig("sample")
    target.load(begun + rest)
    assert target.client.region_read(sample.MEMORY_BAR, 0, 6) == b"second"


@pytest.mark.parametrize(
    "size", [0, SIZE - 1, SIZE + 1, sample.MEMORY_SIZE + SIZE - 1, sample.MEMORY_SIZE + SIZE + 1, 2 * SIZE]
)
def test_a_state_of_another_length_is_refused(device: Rig, size: int) -> None:
    with pytest.raises(DeviceError) as refused:
        device.load(bytes(size))
    assert refused.value.errno == errno.EINVAL
    assert device.client.get_state() == S.ERROR


# libvfio-user's own client: what it sent once is sent again, and what it got then is compared with what it gets now.


@pytest.fixture
def served(tmp_path: Path) -> Iterator[socket.socket]:
    path = tmp_path / "sample.sock"
    process = subprocess.Popen([sys.executable, "-m", "common.devices", "sample", "--name", "s", "--socket", str(path)])
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        yield sock
    assert process.wait(PATIENCE) == 0


class Replay:
    """The client's side of a conversation; its times are in the future again."""

    def __init__(self, sock: socket.socket, delays: list[int]) -> None:
        self.sock = sock
        self.delays = delays
        self.due = 0
        self.memory = os.memfd_create("memory")  # not sealed: it can shrink
        os.ftruncate(self.memory, 16 * PAGE)
        self.irq = os.eventfd(0)
        self.last: Recorded | None = None

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.irq)

    def send(self, message: Recorded) -> None:
        body = message.body
        writes_timer = (
            message.header.command == Command.REGION_WRITE and RegionAccess.unpack(body).region == sample.TIMER_BAR
        )
        if writes_timer or self._ends_the_state(message):
            self.due = int(time.time()) + self.delays.pop(0)
            body = body[:-8] + self.due.to_bytes(8, "little")
        header = message.header._replace(size=16 + len(body))
        fd = self.memory if message.header.command == Command.DMA_MAP else self.irq
        socket.send_fds(self.sock, [header.pack() + body], [fd] * message.fds)
        self.last = message

    def receive(self) -> tuple[Header, bytes]:
        header = Header.unpack(self._exactly(16), 1 << 20)
        return header, self._exactly(header.size - 16)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            assert part, "the device has hung up"
            data += part
        return data

    @staticmethod
    def _ends_the_state(message: Recorded) -> bool:
        return (
            message.header.command == Command.MIG_DATA_WRITE
            and not message.header.is_reply
            and len(message.body) == 8 + 8
        )

    def check(self, expected: Recorded, body: bytes) -> None:
        """Compare a message of the device's with the captured one, where that does not say what is theirs only."""
        theirs = expected.body
        command = self.last
        assert command is not None
        match expected.header.command:
            case Command.VERSION:
                ours, other = Version.unpack(body), Version.unpack(theirs)
                assert (ours.major, ours.minor, ours.capabilities) == (other.major, other.minor, other.capabilities)
            case Command.DEVICE_GET_REGION_INFO:
                ours, other = RegionInfo.unpack(body)[0], RegionInfo.unpack(theirs)[0]
                assert ours.index == other.index and ours.flags & 3 == other.flags & 3 and ours.size >= other.size
            case Command.DEVICE_GET_IRQ_INFO:
                ours, other = IrqInfo.unpack(body), IrqInfo.unpack(theirs)
                # They count interrupts for errors and requests, which nothing of theirs raises.
                assert ours.index == other.index and ours.count == (other.count if other.index < 3 else 0)
            case Command.REGION_READ if RegionAccess.unpack(command.body).region == 7:
                ids = [
                    slice(16, 20),
                    slice(16 + 0x2C, 16 + 0x30),
                    slice(16 + 0x3D, 16 + 0x3E),
                ]  # device, subsystem, pin
                assert [body[part] for part in ids] == [theirs[part] for part in ids]
            case Command.REGION_READ if RegionAccess.unpack(command.body).region == sample.TIMER_BAR:
                assert body[:16] == theirs[:16] and int.from_bytes(body[16:], "little", signed=True) in {-1, 0}
            case Command.MIG_DATA_READ if theirs[4:8] == (SIZE % 1024).to_bytes(4, "little"):
                # The last piece ends with the timer, and is padded: the client insists on it.
                assert body == theirs[:8] + self.due.to_bytes(8, "little") + theirs[16:]
            case Command.DEVICE_FEATURE if command.body[4:6] == b"\x08\x00" and command.body[8:16] == bytes(8):
                # Page 0 was written by message: theirs leaves that to the client, ours has logged it.
                assert body[:-8] == theirs[:-8] and body[-8] == 1
            case _:
                assert body == theirs, Command(expected.header.command).name


@pytest.mark.parametrize(("conversation", "delays"), [(SOURCE, [1, 1000]), (DESTINATION, [3])])
def test_answers_libvfio_users_client_as_its_own_server(
    served: socket.socket, conversation: Path, delays: list[int]
) -> None:
    replay = Replay(served, delays)
    asked = 0
    for message in load(conversation):
        if message.sender == "client":
            replay.send(message)
            continue
        header, body = replay.receive()
        assert header == message.header._replace(size=header.size)
        replay.check(message, body)
        asked += not message.header.is_reply
    assert asked == 8  # writes and reads by message
    assert os.eventfd_read(replay.irq) == 1
    page = PAGE if conversation == SOURCE else 9 * PAGE
    assert os.pread(replay.memory, PAGE, page) == sample.DMA_CONTENT
    assert not delays
    replay.close()
