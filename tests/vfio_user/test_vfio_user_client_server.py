"""Client and server against each other."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable

import numpy as np
import pytest
from fake_device import FakeDevice, connected, serving

from common.iommu.device import IommuDirtyDevice
from common.vfio import feature as vfio
from common.vfio.feature import DeviceFeature, LoggingReport, PrecopyInfo, Range
from common.vfio.migration import DeviceState, MigrationFlags
from common.vfio_user import codec
from common.vfio_user.capabilities import Capabilities, Extension
from common.vfio_user.client import DeviceError, VfioUserClient
from common.vfio_user.codec import Command, DmaUnmap, Feature, Header, MigData, RegionAccess, Version
from common.vfio_user.description import Area, IoEventFd, IrqInfo, IrqSet, RegionFlags, RegionInfo
from common.vfio_user.server import VfioUserServer, listen

S = DeviceState
PAGE = 4096
EVENTFD_TRIGGER = 0x24


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(DeviceError) as caught:
        call()
    assert str(caught.value).startswith("fake0: ")
    return caught.value.errno


# What a device is


def test_a_client_learns_what_the_device_is() -> None:
    device = FakeDevice()
    with connected(device) as client:
        assert client.regions == device.regions
        assert client.irqs == device.irqs
        assert client.extension == Extension()
        assert client.migration_flags == 7
        assert client.dma_logging
        assert client.get_irq_info(2) == IrqInfo(2, 1, 40)


def test_a_region_that_can_be_mapped_comes_with_its_descriptor() -> None:
    fd = os.memfd_create("bar")
    os.pwrite(fd, b"content", 0)
    device = FakeDevice()
    flags = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
    device.regions[1] = RegionInfo(1, flags, 0x3000, 0, (Area(0, 0x1000), Area(0x2000, 0x1000)), fd)
    device.regions[2] = RegionInfo(2, flags, 0x1000, 0x4000, (), fd)
    with connected(device) as client:
        assert client.regions[1].areas == device.regions[1].areas
        assert client.regions[2].offset == 0x4000
        for index in (1, 2):
            received = client.regions[index].fd
            assert received is not None
            assert os.pread(received, 7, 0) == b"content"
    os.close(fd)


def test_ioeventfds() -> None:
    device = FakeDevice()
    fd = os.eventfd(3)
    device.eventfds = [IoEventFd(0x800, 4, fd), IoEventFd(0x900, 8, fd, 1, 77)]
    with connected(device) as client:
        first, second = client.get_region_io_fds(0)
        assert (first.offset, first.size, second.flags, second.datamatch) == (0x800, 4, 1, 77)
        assert first.fd == second.fd != fd
        assert os.eventfd_read(first.fd) == 3
        os.close(first.fd)
        assert client.get_region_io_fds(1) == []
        assert refused(lambda: client.get_region_io_fds(2)) == errno.EINVAL
    os.close(fd)


def test_a_device_without_migration() -> None:
    device = FakeDevice()
    device.migration_flags = MigrationFlags(0)
    with connected(device) as client:
        assert client.migration_flags == 0
        assert not client.dma_logging
        assert refused(client.get_state) == errno.EINVAL


def test_a_device_without_extension_is_asked_for_nothing_of_it() -> None:
    device = FakeDevice()
    device.extension = Extension(precopy_info=False, data_size=False)
    with connected(device) as client:
        assert client.precopy_info() is None
        assert client.stop_copy_length() is None


@pytest.mark.parametrize("state", [S.STOP, S.STOP_COPY, S.RESUMING, S.PRE_COPY_P2P])
def test_a_state_that_an_earlier_client_left_is_undone(state: DeviceState) -> None:
    device = FakeDevice()
    device.state = state
    with connected(device) as client:
        assert client.get_state() is S.RUNNING
        assert len(client.regions) == 9


def test_a_device_in_error_is_reset() -> None:
    device = FakeDevice()
    device.state = S.ERROR
    with connected(device):
        assert device.resets == 1


# Operation


def test_regions() -> None:
    device = FakeDevice()
    with connected(device) as client:
        client.region_write(0, 0x10, b"1234")
        assert client.region_read(0, 0x0E, 8) == b"\0\x001234\0\0"
        assert refused(lambda: client.region_read(0, 0xFFF, 2)) == errno.EINVAL
        assert refused(lambda: client.region_read(3, 0, 1)) == errno.EINVAL
        assert refused(lambda: client.region_read(99, 0, 1)) == errno.EINVAL
        assert refused(lambda: client.region_read(0, 0, 0)) == errno.EINVAL
        assert client.region_read(0, 0x10, 4) == b"1234"


def test_accesses_larger_than_a_message() -> None:
    device = FakeDevice()
    data = os.urandom((2 << 20) + 12345)
    with connected(device) as client:
        client.region_write(1, 100, data)
        assert client.region_read(1, 100, len(data)) == data


def test_a_refusal_says_what_was_refused() -> None:
    device = FakeDevice()
    with connected(device) as client:
        device.refuse = errno.ENODEV
        with pytest.raises(DeviceError) as caught:
            client.region_read(0, 0x10, 4)
        assert caught.value.errno == errno.ENODEV
        assert str(caught.value) == "fake0: REGION_READ region 0 offset 0x10 size 0x4: No such device"
        with pytest.raises(DeviceError, match="fake0: DMA_UNMAP iova 0x5000 size 0x1000: No such file"):
            client.dma_unmap(0x5000, 0x1000)


def test_mappings() -> None:
    device = FakeDevice()
    fd = os.memfd_create("ram")
    os.pwrite(fd, b"page", 0x3000)
    with connected(device) as client:
        client.dma_map(0x1000, 0x2000, 3, fd, 0x3000)
        client.dma_map(0x8000, 0x1000, codec.DMA_READABLE)
        assert device.mappings == {0x1000: (0x2000, 3, 0x3000, b"page"), 0x8000: (0x1000, 1, 0, None)}
        assert client.dma_unmap(0x1000, 0x2000) is None
        assert refused(lambda: client.dma_unmap(0x8000, 0x2000)) == errno.ENOENT
        assert refused(lambda: client.dma_map(2**64 - 4096, 8192, 3)) == errno.EINVAL
        assert refused(lambda: client.dma_map(0x9000, 0, 3)) == errno.EINVAL
        assert refused(lambda: client.dma_map(0x9000, 0x1000, 0x10)) == errno.EINVAL
        assert list(device.mappings) == [0x8000]
    os.close(fd)


def test_an_unmapping_brings_the_dirty_pages() -> None:
    device = FakeDevice()
    with connected(device) as client:
        client.dma_map(0x10000, 70 * PAGE, 3)
        assert client.logging_start(PAGE, [Range(0, 1 << 30)]) == PAGE
        device.log.mark(0x10000 + 65 * PAGE, 1)
        words = client.dma_unmap(0x10000, 70 * PAGE, bitmap=True)
        assert words is not None and words.tolist() == [0, 2]
        assert not device.mappings


def test_an_unmapping_that_cannot_bring_dirty_pages_still_unmaps() -> None:
    device = FakeDevice()
    with connected(device) as client:
        client.dma_map(0x10000, PAGE, 3)
        client.dma_map(1 << 40, 1 << 36, 3)
        assert client.dma_unmap(0x10000, PAGE, bitmap=True) is None  # the log is not started
        assert client.dma_unmap(1 << 40, 1 << 36, bitmap=True) is None  # the bitmap would be 2 MiB
        assert not device.mappings


def test_interrupts() -> None:
    device = FakeDevice()
    fds = [os.eventfd(0) for _ in range(40)]
    with connected(device) as client:
        client.set_irqs(2, EVENTFD_TRIGGER, 0, 40, fds=fds)
        assert [call[2:4] for call in device.irq_calls] == [(start, 8) for start in range(0, 40, 8)]
        assert [os.eventfd_read(fd) for fd in fds] == [start + 1 for start in range(0, 40, 8) for _ in range(8)]
        device.irq_calls.clear()
        client.set_irqs(2, EVENTFD_TRIGGER, 3, 1)
        client.set_irqs(2, 0x21, 0, 0)
        client.set_irqs(2, 0x22, 1, 3, b"\1\0\1")
        assert device.irq_calls == [
            (2, 0x24, 3, 1, b"", 0), (2, 0x21, 0, 0, b"", 0), (2, 0x22, 1, 3, b"\1\0\1", 0),
        ]  # fmt: skip
        assert refused(lambda: client.set_irqs(2, EVENTFD_TRIGGER, 39, 2, fds=fds[:2])) == errno.EINVAL
        assert refused(lambda: client.set_irqs(2, 0x22, 0, 3, b"\1")) == errno.EINVAL
        assert refused(lambda: client.set_irqs(2, EVENTFD_TRIGGER, 0, 0)) == errno.EINVAL
        assert refused(lambda: client.set_irqs(9, 0x21, 0, 0)) == errno.EINVAL
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("state", list(S)[1:])
def test_a_reset_ends_in_running(state: DeviceState) -> None:
    device = FakeDevice()
    with connected(device) as client:
        device.state = state
        client.reset()
        assert device.resets == 1
        assert client.get_state() is S.RUNNING


# Migration


def test_states() -> None:
    device = FakeDevice()
    with connected(device) as client:
        for state in (S.PRE_COPY, S.STOP_COPY, S.STOP, S.RESUMING, S.RUNNING_P2P):
            client.set_state(state)
            assert client.get_state() is state
        client.set_state(S.STOP_COPY)
        with pytest.raises(DeviceError, match="set state PRE_COPY: Invalid argument"):
            client.set_state(S.PRE_COPY)
        assert refused(lambda: client.set_state(S.ERROR)) == errno.EINVAL


def test_the_state_is_read_to_its_end_and_written() -> None:
    device = FakeDevice()
    state = os.urandom(2_500_000)
    with connected(device) as client:
        assert refused(lambda: client.mig_data_read(100)) == errno.EINVAL
        device.stream = state
        client.set_state(S.PRE_COPY)
        assert client.precopy_info() == PrecopyInfo(len(state), 7)
        assert client.stop_copy_length() == len(state)
        parts = [bytes(client.mig_data_read(1000))]
        client.set_state(S.STOP_COPY)
        assert refused(client.precopy_info) == errno.EINVAL
        while part := client.mig_data_read(4 << 20):
            parts.append(bytes(part))
        assert [len(part) for part in parts] == [1000, 1 << 20, 1 << 20, len(state) - 1000 - (2 << 20)]
        assert b"".join(parts) == state
        assert refused(lambda: client.mig_data_write(b"x")) == errno.EINVAL
        client.set_state(S.RESUMING)
        client.mig_data_write(state)
        assert device.written == state


def test_the_log() -> None:
    device = FakeDevice()
    with connected(device) as client:
        assert refused(lambda: client.logging_report(0, PAGE, PAGE)) == errno.EINVAL
        ranges = [Range(n << 20, 1 << 20) for n in range(0, 512, 2)]
        assert client.logging_start(8192, ranges) == PAGE
        assert refused(lambda: client.logging_start(PAGE, ranges)) == errno.EINVAL
        device.log.mark(0x5000, 1)
        words = client.logging_report(0, 100 * PAGE, PAGE)
        assert words.dtype == np.uint64 and words.tolist() == [1 << 5, 0]
        assert not client.logging_report(0, 100 * PAGE, PAGE).any()
        client.logging_stop()
        assert not device.log.active
        assert refused(lambda: client.logging_start(PAGE, [])) == errno.EINVAL
        assert refused(lambda: client.logging_start(PAGE, [Range(0, PAGE)] * 257)) == errno.E2BIG


def test_dirty_bits_of_an_iommu_are_not_the_devices_log() -> None:
    device = FakeDevice()
    device.extension = Extension(iommu_dirty=True)
    with connected(device) as client:
        assert isinstance(client, IommuDirtyDevice)
        client.logging_start(PAGE, [Range(0, 1 << 30)])
        assert refused(lambda: client.iommu_dirty_report(0, PAGE, PAGE)) == errno.EINVAL
        assert client.iommu_dirty_start(8192) == PAGE
        assert refused(lambda: client.iommu_dirty_start(PAGE)) == errno.EINVAL
        device.iommu.mark(0x5000, 1)
        device.log.mark(0x7000, 1)
        assert client.iommu_dirty_report(0, 100 * PAGE, PAGE).tolist() == [1 << 5, 0]
        assert not client.iommu_dirty_report(0, 100 * PAGE, PAGE).any()
        client.iommu_dirty_stop()
        assert not device.iommu.active
        assert client.logging_report(0, 100 * PAGE, PAGE).tolist() == [1 << 7, 0]


def test_without_the_extension_there_is_no_iommu_to_ask() -> None:
    device = FakeDevice()
    device.iommu.start(PAGE, [Range(0, 1 << 30)])
    with connected(device) as client:
        assert refused(lambda: client.iommu_dirty_start(PAGE)) == errno.EINVAL
        assert refused(client.iommu_dirty_stop) == errno.EINVAL
        assert device.iommu.active
        assert refused(lambda: client.iommu_dirty_report(0, PAGE, PAGE)) == errno.EINVAL


def test_a_report_that_is_too_large_for_a_message_is_not_asked_for() -> None:
    with connected(FakeDevice()) as client:
        assert refused(lambda: client.logging_report(0, 1 << 40, PAGE)) == errno.E2BIG


def test_a_refused_report_clears_nothing() -> None:
    device = FakeDevice()
    device.log.start(PAGE, [Range(0, 1 << 50)])
    device.log.mark(0, PAGE)
    with serving(device) as sock:
        raw = RawClient(sock)
        raw.ask(Command.VERSION, VERSION)
        number = DeviceFeature.DMA_LOGGING_REPORT | vfio.FEATURE_GET

        def report(length: int) -> tuple[Header, bytes]:
            body = LoggingReport(0, length, PAGE).pack()
            room = codec.FEATURE_SIZE + len(body) + vfio.bitmap_bytes(length, PAGE)
            return raw.ask(Command.DEVICE_FEATURE, Feature(room, number).pack() + body)

        assert report(1 << 40)[0].error == errno.EINVAL
        assert report(PAGE)[1][-8:] == (1).to_bytes(8, "little")


STOPPED = {
    S.STOP: {"region_read", "region_write"},
    S.STOP_COPY: {"mig_data_read"},
    S.RESUMING: {"region_read", "region_write", "set_irqs", "dma_map", "dma_unmap", "mig_data_write", "info", "io_fds"},
}


@pytest.mark.parametrize("state", STOPPED, ids=lambda state: state.name)
@pytest.mark.parametrize("strict", [True, False])
def test_what_a_stopped_device_does(state: DeviceState, *, strict: bool) -> None:
    device = FakeDevice()
    calls: dict[str, Callable[[VfioUserClient], object]] = {
        "region_read": lambda client: client.region_read(0, 0, 4),
        "region_write": lambda client: client.region_write(0, 0, b"1234"),
        "set_irqs": lambda client: client.set_irqs(2, 0x21, 0, 0),
        "dma_map": lambda client: client.dma_map(0, PAGE, 3),
        "dma_unmap": lambda client: client.dma_unmap(0, PAGE),
        "mig_data_read": lambda client: client.mig_data_read(1),
        "mig_data_write": lambda client: client.mig_data_write(b"1"),
        "info": lambda client: client.get_irq_info(0),
        "io_fds": lambda client: client.get_region_io_fds(0),
    }
    allowed = STOPPED[state] if strict else calls.keys() - {"mig_data_read", "mig_data_write"} | STOPPED[state]
    with serving(device, strict=strict) as sock, VfioUserClient(sock, "fake0") as client:
        client.set_state(state)
        for name, call in calls.items():
            if name in allowed:
                call(client)
            else:
                assert refused(lambda call=call: call(client)) == errno.EINVAL, name  # type: ignore[misc]


# DMA by message


class Memory:
    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)

    def read(self, iova: int, count: int) -> bytes:
        if iova + count > len(self.bytes):
            raise OSError(errno.EFAULT, "not mapped")
        return bytes(self.bytes[iova : iova + count])

    def write(self, iova: int, data: memoryview) -> None:
        self.read(iova, len(data))
        self.bytes[iova : iova + len(data)] = data


def test_dma_while_nobody_asks() -> None:
    device, memory = FakeDevice(), Memory(4 << 20)
    data = os.urandom((2 << 20) + 77)
    with connected(device, on_dma_read=memory.read, on_dma_write=memory.write):
        assert device.dma is not None
        device.dma.dma_write(5, data)
        assert memory.bytes[5 : 5 + len(data)] == data
        assert device.dma.dma_read(5, len(data)) == data
        with pytest.raises(OSError, match="DMA_WRITE iova 0x400000 size 0x1: Bad address"):
            device.dma.dma_write(4 << 20, b"x")


def test_dma_of_a_client_that_takes_none() -> None:
    device = FakeDevice()
    with connected(device):
        assert device.dma is not None
        with pytest.raises(OSError) as caught:
            device.dma.dma_read(0, 1)
        assert caught.value.errno == errno.EINVAL


def test_dma_that_a_command_waits_for() -> None:
    """As when a device's engine holds its lock for a step of work, and a command has to wait for that lock."""
    device, memory = FakeDevice(), Memory(1 << 20)
    engine = threading.Lock()
    began = threading.Event()

    def step() -> None:
        assert device.dma is not None
        with engine:
            began.set()
            for number in range(300):
                device.dma.dma_write(number, bytes([number % 256]))

    def slow_unmap() -> None:
        with engine:
            device.mappings.clear()

    device.dma_unmap = lambda *_: slow_unmap()  # type: ignore[method-assign,assignment,return-value]
    with connected(device, on_dma_write=memory.write) as client:
        client.dma_map(0, PAGE, 3)
        worker = threading.Thread(target=step)
        worker.start()
        began.wait(10)
        client.dma_unmap(0, PAGE)
        worker.join(10)
        assert not worker.is_alive()
        assert bytes(memory.bytes[:300]) == bytes(n % 256 for n in range(300))


def test_a_device_that_writes_to_its_own_region_through_the_client() -> None:
    device = FakeDevice()
    with connected(device) as client:
        client.on_dma_write = lambda iova, data: client.region_write(0, iova, data)
        client.on_dma_read = lambda iova, count: client.region_read(0, iova, count)
        done = threading.Event()

        def engine() -> None:
            assert device.dma is not None
            for number in range(100):
                device.dma.dma_write(8, struct.pack("<Q", number))
                assert device.dma.dma_read(8, 8) == struct.pack("<Q", number)
            done.set()

        worker = threading.Thread(target=engine)
        worker.start()
        reads = 0
        while not done.is_set() and worker.is_alive():
            client.region_read(0, 0, 4)
            reads += 1
        worker.join(10)
        assert done.is_set() and reads


def test_many_threads_and_dma_at_once() -> None:
    device, memory = FakeDevice(), Memory(1 << 20)
    errors: list[Exception] = []

    def run(work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - looked at in the test
                errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    with connected(device, on_dma_read=memory.read, on_dma_write=memory.write) as client:

        def access(slot: int) -> Callable[[], None]:
            def work() -> None:
                for number in range(200):
                    data = struct.pack("<IQ", slot, number)
                    client.region_write(0, slot * 16, data)
                    assert client.region_read(0, slot * 16, 12) == data

            return work

        def dma() -> None:
            assert device.dma is not None
            for number in range(200):
                device.dma.dma_write(number * 8, struct.pack("<Q", number))
                assert device.dma.dma_read(number * 8, 8) == struct.pack("<Q", number)

        for thread in [run(access(1)), run(access(2)), run(access(3)), run(dma)]:
            thread.join(20)
            assert not thread.is_alive()
    assert not errors


# Ends


def test_a_device_that_goes() -> None:
    ours, theirs = socket.socketpair()
    server = VfioUserServer(FakeDevice(), theirs)
    thread = threading.Thread(target=server.serve)
    thread.start()
    told = threading.Semaphore(0)
    with VfioUserClient(ours, "fake0", on_close=told.release) as client:
        server.shutdown()
        thread.join(10)
        assert client.closed.wait(10)
        assert refused(lambda: client.region_read(0, 0, 4)) == errno.ENOTCONN
        assert told.acquire(timeout=10)
    assert not told.acquire(blocking=False)  # once


def test_a_client_that_goes() -> None:
    device = FakeDevice()
    with connected(device, on_close=lambda: pytest.fail("the client closed it itself")):
        assert not device.gone.is_set()
    assert device.gone.wait(10)
    assert device.dma is not None
    with pytest.raises(ConnectionError):
        device.dma.dma_write(0, b"x")


def test_nothing_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    device = FakeDevice()
    fd = os.memfd_create("bar")
    device.regions[1] = RegionInfo(1, RegionFlags(7), 0x1000, 0, (Area(0, 0x1000),), fd)
    device.eventfds = [IoEventFd(0, 4, fd)]
    with connected(device) as client:
        client.dma_map(0, PAGE, 3, fd)
        for item in client.get_region_io_fds(0):
            os.close(item.fd)
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_listening_socket_is_there_only_when_it_listens(tmp_path: object) -> None:
    path = tmp_path / "device.sock"  # type: ignore[operator]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_by_somebody:
        left_by_somebody.bind(str(path))
    with listen(path) as listening:
        assert path.stat().st_mode & 0o777 == 0o600
        assert [entry.name for entry in tmp_path.iterdir()] == ["device.sock"]  # type: ignore[attr-defined]

        def serve() -> None:
            VfioUserServer(FakeDevice(), listening.accept()[0]).serve()

        thread = threading.Thread(target=serve)
        thread.start()
        with VfioUserClient.connect(path, "fake0", timeout=10) as client:
            assert client.get_state() is S.RUNNING
        thread.join(10)


def test_a_socket_that_is_not_there(tmp_path: object) -> None:
    with pytest.raises(DeviceError, match=r"fake0: connect .*: No such file"):
        VfioUserClient.connect(tmp_path / "none", "fake0")  # type: ignore[operator]


# What a client of no good will sends


class RawClient:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(10)

    def ask(self, command: int, body: bytes = b"", flags: int = 0) -> tuple[Header, bytes]:
        self.sock.sendall(Header(1, command, 16 + len(body), flags).pack() + body)
        header = Header.unpack(self.sock.recv(16, socket.MSG_WAITALL), codec.MAX_REPLY_SIZE)
        size = header.size - 16
        return header, self.sock.recv(size, socket.MSG_WAITALL) if size else b""

    def error(self, command: int, body: bytes = b"") -> int:
        return self.ask(command, body)[0].error


VERSION = Version(0, 2, Capabilities(1, 4096)).pack()


def test_refused_inputs_leave_the_server_as_it_was() -> None:
    with serving(FakeDevice()) as sock:
        raw = RawClient(sock)
        assert raw.error(Command.DEVICE_GET_INFO, bytes(16)) == errno.EINVAL  # before VERSION
        assert raw.error(Command.VERSION, b"\0") == errno.EINVAL
        assert raw.error(Command.VERSION, b"\1\0\0\0") == errno.EINVAL
        assert raw.error(Command.VERSION, VERSION) == 0
        assert raw.error(Command.VERSION, VERSION) == errno.EINVAL
        for command in (0, 14, *Command, 19, 0xFFFF):
            expected = 0 if command == Command.DEVICE_RESET else errno.EINVAL
            assert raw.error(command) == expected, command
            assert raw.error(command, b"\xff" * 7) == expected, command
        assert raw.error(Command.REGION_WRITE, RegionAccess(0, 0, 4).pack() + b"123") == errno.EINVAL
        assert raw.error(Command.REGION_WRITE, RegionAccess(0, 0, 4).pack() + b"12345") == errno.EINVAL
        assert raw.error(Command.REGION_READ, RegionAccess(2**64 - 1, 0, 2).pack()) == errno.EINVAL
        assert raw.error(Command.REGION_READ, RegionAccess(0, 1, (1 << 20) + 1).pack()) == errno.EINVAL
        assert raw.error(Command.REGION_READ, RegionAccess(0, 0, 4).pack()) == 0


def test_the_version_is_the_lower_one() -> None:
    for minor, expected in ((0, 0), (2, 2), (9, 2)):
        with serving(FakeDevice()) as sock:
            _, body = RawClient(sock).ask(Command.VERSION, struct.pack("<HH", 0, minor))
            assert struct.unpack_from("<HH", body) == (0, expected)


GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18


@pytest.mark.parametrize(
    ("flags", "argsz", "payload", "expected"),
    [
        (1 | GET, 16, b"", 0),
        (1 | GET, 15, b"", errno.EINVAL),
        (1 | SET, 16, bytes(8), errno.EINVAL),
        (1, 16, b"", errno.EINVAL),
        (1 | GET | SET, 16, b"", errno.EINVAL),
        (2 | GET | SET, 16, bytes(8), errno.EINVAL),
        (1 | PROBE, 8, b"", 0),
        (1 | PROBE | GET, 8, b"", 0),
        (1 | PROBE | SET, 8, b"", errno.EINVAL),
        (6 | PROBE, 7, b"", errno.EINVAL),
        (2 | SET, 16, struct.pack("<Ii", 2, -1), 0),
        (2 | SET, 15, struct.pack("<Ii", 2, -1), errno.EINVAL),
        (2 | SET, 16, struct.pack("<Ii", 8, -1), errno.EINVAL),
        (2 | SET, 12, b"1234", errno.EINVAL),
        (6 | SET, 8, b"", errno.EINVAL),
        (6 | SET, 24, struct.pack("<QII", 4096, 2**32 - 1, 0), errno.E2BIG),
        (8 | GET, 32, b"", errno.EINVAL),
        (8 | GET, 39, struct.pack("<QQQ", 0, 4096, 4096), errno.EINVAL),
        (8 | GET, 2**32 - 1, struct.pack("<QQQ", 0, 2**63, 4096), errno.EINVAL),
        (10 | GET, 64, b"", errno.EINVAL),
        (0x8001 | GET, 24, b"", errno.EINVAL),
        (1 | 1 << 20 | GET, 16, b"", errno.EINVAL),
    ],
)
def test_features_are_asked_rightly_or_refused(flags: int, argsz: int, payload: bytes, expected: int) -> None:
    with serving(FakeDevice()) as sock:
        raw = RawClient(sock)
        raw.ask(Command.VERSION, VERSION)
        assert raw.error(Command.DEVICE_FEATURE, Feature(argsz, flags).pack() + payload) == expected


def test_migration_data_are_padded_to_what_was_asked_for() -> None:
    device = FakeDevice()
    with serving(device) as sock:
        raw = RawClient(sock)
        raw.ask(Command.VERSION, VERSION)
        device.state, device.stream = S.STOP_COPY, b"abc"
        assert raw.ask(Command.MIG_DATA_READ, MigData(8).pack())[1] == MigData(3).pack() + b"abc" + bytes(5)
        assert raw.ask(Command.MIG_DATA_READ, MigData(8).pack())[1] == MigData(0).pack() + bytes(8)
        assert raw.error(Command.MIG_DATA_READ, MigData(4097).pack()) == errno.EINVAL  # more than the client takes
        assert raw.error(Command.MIG_DATA_READ, MigData(0).pack()) == errno.EINVAL
        device.state = S.RESUMING
        assert raw.error(Command.MIG_DATA_WRITE, MigData(4).pack() + b"abc") == errno.EINVAL
        assert raw.error(Command.MIG_DATA_WRITE, MigData(4).pack() + b"abcd") == 0
        assert device.written == b"abcd"


def test_unmappings_of_everything_and_with_impossible_bitmaps() -> None:
    device = FakeDevice()
    with serving(device) as sock:
        raw = RawClient(sock)
        raw.ask(Command.VERSION, VERSION)
        device.log.start(PAGE, [Range(0, 1 << 40)])
        device.mappings = {0: (PAGE, 3, 0, None), 1 << 39: (1 << 38, 3, 0, None)}
        for request in (
            DmaUnmap(1, 0, PAGE, PAGE, 16), DmaUnmap(1, 0, PAGE, 100, 8), DmaUnmap(1, 1 << 39, 1 << 38, PAGE, 8 << 20)
        ):  # fmt: skip
            assert raw.error(Command.DMA_UNMAP, request.pack()) == errno.EINVAL
        assert len(device.mappings) == 2
        request = DmaUnmap(codec.UNMAP_ALL, 0, 0)
        assert raw.ask(Command.DMA_UNMAP, request.pack())[1] == request.pack()
        assert not device.mappings


def test_commands_that_want_no_reply_get_none_even_if_refused() -> None:
    device = FakeDevice()
    with serving(device) as sock:
        raw = RawClient(sock)
        raw.ask(Command.VERSION, VERSION)
        for offset in (0, 4, 0x1000):
            body = RegionAccess(offset, 0, 4).pack() + b"abcd"
            sock.sendall(Header(9, Command.REGION_WRITE, 16 + len(body), 0x10).pack() + body)
        header, body = raw.ask(Command.REGION_READ, RegionAccess(0, 0, 8).pack())
        assert header.message_id == 1 and body[16:] == b"abcdabcd"


def test_more_descriptors_than_vectors_are_refused_and_closed() -> None:
    device = FakeDevice()
    with serving(device) as sock:
        raw = RawClient(sock)
        raw.ask(Command.VERSION, VERSION)
        reader, writer = os.pipe()
        body = IrqSet(2, EVENTFD_TRIGGER, 0, 1).pack()  # type: ignore[arg-type]
        socket.send_fds(sock, [Header(1, 8, 16 + len(body)).pack() + body], [writer, writer])
        os.close(writer)
        assert Header.unpack(sock.recv(16), 16).error == errno.EINVAL
        assert os.read(reader, 1) == b""  # nobody holds the other end any more
        os.close(reader)
