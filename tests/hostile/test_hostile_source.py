"""A source that cheats, against a real destination: it is refused, and nothing of it stays."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial

import grpc
import lz4.block
import pytest
import zstandard
from hostile_source import VCPU, HostileSource, for_ever, page, refused
from rig import Daemon, Rig, assert_completed, machine_toml, wait_for
from switchover.v1 import host_pb2, host_pb2_grpc
from switchover.v1 import migration_pb2 as pb
from traces import Traces, said_nothing_wrong

from common.rpc.channel import open_channel

Cheat = Callable[[HostileSource], set[str]]
BAD = {"BAD_REQUEST"}
END = pb.DEVICE_STATE_KIND_END
DATA = pb.DEVICE_STATE_KIND_STOP_COPY_DATA


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope="module")
def destination(rig: Rig) -> Daemon:
    daemon = rig.start("destination")
    # What a daemon opens with its first session, it keeps.
    with closing(HostileSource(daemon.address)) as source:
        source.prepare()
        source.abort()
    wait_for(lambda: len(rig.processes()) == 1, "the first session does not end")
    return daemon


def batch(**members: object) -> bytes:
    fields = {"sequence": 1, "encoding": 1, "run_first": [0], "run_pages": [1], "zero": b"\1", **members}
    return pb.SendPagesRequest(**fields).SerializeToString()  # type: ignore[arg-type]


def pages(*messages: bytes, lane: int | str = 0, lanes: int = 1) -> Cheat:
    def cheat(source: HostileSource) -> set[str]:
        source.prepare(lanes=lanes)
        return {refused(lambda: source.pages(messages, lane))}

    return cheat


def prepares(**changes: object) -> Cheat:
    return lambda source: {refused(lambda: source.stub.Prepare(source.prepare_request(**changes), timeout=60))}


def finishes(**changes: object) -> Cheat:
    def cheat(source: HostileSource) -> set[str]:
        source.prepare()
        return {refused(lambda: source.finish(**changes))}

    return cheat


def maps(*mappings: pb.Mapping) -> Cheat:
    def cheat(source: HostileSource) -> set[str]:
        source.prepare("nic")
        return {refused(lambda: source.mappings([pb.SendMappingsRequest(sequence=1, added=mappings)]))}

    return cheat


def mapping(iova: int = 0, size: int = 4096, container: str = "default", gpa: int = 0) -> pb.Mapping:
    its = pb.MappingRange(container=container, iova=iova, size=size)
    return pb.Mapping(range=its, gpa=gpa, readable=True, writable=True)


def records(*kinds: int, data: bytes = b"", name: str = "nic0", first: int = 1) -> Cheat:
    said = [pb.SendDeviceStateRequest(sequence=first + at, kind=kind, data=data) for at, kind in enumerate(kinds)]  # type: ignore[arg-type]

    def cheat(source: HostileSource) -> set[str]:
        source.prepare("nic")
        return {refused(lambda: source.records(name, said))}

    return cheat


def loads_garbage(source: HostileSource) -> set[str]:
    source.prepare("nic")
    said = [
        pb.SendDeviceStateRequest(sequence=1, kind=DATA, data=b"\xff" * (1 << 20)),
        pb.SendDeviceStateRequest(sequence=2, kind=END),
    ]
    list(source.records("nic0", said))
    device = pb.DeviceConfig(name="nic0", record_sequence=2, config_space=bytes(256))
    return {refused(lambda: source.finish(devices=[device]))}


def commits_before_the_data(source: HostileSource) -> set[str]:
    source.prepare()
    return {refused(source.commit)}


def commits_another_incarnation(source: HostileSource) -> set[str]:
    source.prepare()
    source.finish()
    return {refused(partial(source.commit, incarnation)) for incarnation in (0, 2, (1 << 64) - 1)}


def sends_pages_after_the_end(source: HostileSource) -> set[str]:
    source.prepare()
    source.finish()
    return {refused(lambda: source.pages([page(0)]))}


def uses_paths_as_sessions(source: HostileSource) -> set[str]:
    found = set()
    for name in ("../../x", "/etc/passwd", "", "a" * 65, ".", "a/b", "a\0b", "é"):
        source.session = name
        found |= {
            refused(lambda: source.stub.Prepare(source.prepare_request(), timeout=20)),
            refused(lambda: source.stub.Resolve(pb.ResolveRequest(session_id=source.session), timeout=20)),
            refused(lambda: source.stub.GetSession(pb.GetSessionRequest(session_id=source.session), timeout=20)),
        }
        assert refused(source.finish) == refused(source.commit) == "NO_SESSION"
        source.abort()
    return found


def opens_a_lane_twice(source: HostileSource) -> set[str]:
    source.prepare()
    first = source.pages(for_ever(page(0)))
    next(first)
    second = {refused(lambda: source.pages([page(0)]))}
    return second | {refused(lambda: first)} - {"WRONG_STATE", "CANCELLED"}


def leaves_streams_open(source: HostileSource) -> set[str]:
    source.prepare()
    with ExitStack() as held:
        channels = [held.enter_context(closing(HostileSource(source.address))) for _ in range(4)]
        streams = []
        for number, other in enumerate(channels * 20):
            other.session = source.session
            streams.append(other.pages(for_ever(), lane=number % 2))
        found = {refused(lambda stream=stream: stream) for stream in streams[1:]}
        streams[0].cancel()  # type: ignore[attr-defined]
    return found - {"CANCELLED", "NO_SESSION", "WRONG_STATE", "TOO_MANY_STREAMS"}


def prepares_many_at_once(source: HostileSource) -> set[str]:
    with ExitStack() as held, ThreadPoolExecutor(20) as pool:
        others = [held.enter_context(closing(HostileSource(source.address))) for _ in range(20)]

        def prepare(other: HostileSource) -> str:
            try:
                other.prepare()
            except grpc.RpcError:
                return refused(lambda: other.stub.Prepare(other.prepare_request(), timeout=60))
            return ""

        found = list(pool.map(prepare, others))
        assert found.count("") == 1
        others[found.index("")].abort()
        return set(found) - {""}


def sends_while_it_is_prepared(source: HostileSource) -> set[str]:
    with ThreadPoolExecutor(4) as pool:
        preparing = pool.submit(lambda: refused(lambda: source.stub.Prepare(source.prepare_request(), timeout=60)))
        found = set()
        while "BAD_REQUEST" not in found and not preparing.done():
            found |= {refused(lambda: source.mappings([])), refused(source.finish), refused(lambda: source.pages([]))}
        preparing.result()
    return found - {"NO_SESSION", "WRONG_STATE"}


def reconnects(generation: int, **prepared: object) -> Cheat:
    def cheat(source: HostileSource) -> set[str]:
        source.prepare(**prepared)
        request = pb.ReconnectRequest(session_id=source.session, generation=generation)
        return {refused(lambda: source.stub.Reconnect(request, timeout=20))}

    return cheat


def goes_on_in_an_old_generation(source: HostileSource) -> set[str]:
    source.prepare(features=["reconnect"], reconnect_s=60)
    request = pb.ReconnectRequest(session_id=source.session, generation=(1 << 64) - 1)
    assert not source.stub.Reconnect(request, timeout=20).lanes[0].applied_sequence
    return {refused(lambda: source.pages([page(0)])), refused(lambda: source.stub.Reconnect(request, timeout=20))}


def sends_many_streams(source: HostileSource) -> set[str]:
    source.session = "nosuchsession"
    streams = [source.pages(for_ever()) for _ in range(2000)]
    # Who does not know yet how many a connection may have is told REFUSED_STREAM, which gRPC calls UNAVAILABLE.
    too_many = {"TOO_MANY_STREAMS", "RESOURCE_EXHAUSTED", "UNREACHABLE"}
    return {refused(lambda stream=stream: stream) for stream in streams} - too_many


def packed(size: int) -> bytes:
    return lz4.block.compress(bytes(size), store_size=False)


HUGE_FINISH = {
    "a million devices": finishes(devices=[pb.DeviceConfig(name="nic0")] * 1_000_000),
    "a million lanes": finishes(lane_sequences=[0] * 1_000_000),
    "deep": finishes(vcpu_json="[" * 500_000),
    "long": finishes(vcpu_json=json.dumps(VCPU) + " " * (2 << 20)),
    "infinite": finishes(vcpu_json='{"runs": 1e999}'),
}
CHEATS: dict[str, tuple[Cheat, set[str]]] = {
    "a gap": (pages(page(0, 2)), BAD),
    "a repetition": (pages(page(0), page(0)), BAD),
    "pages outside RAM": (pages(page(64 << 20 >> 12)), BAD),
    "pages beyond 64 bits": (pages(batch(run_first=[(1 << 64) - 1], run_pages=[2])), BAD),
    "a run of all": (pages(batch(run_pages=[(1 << 64) - 1])), BAD),
    "pages of another lane": (pages(page(512), lanes=2), BAD),
    "a lane that is none": (pages(page(0), lane=1), BAD),
    "a lane without a number": (pages(page(0), lane="x"), BAD),
    "a bomb": (pages(batch(encoding=2, zero=b"\0", payload=packed(255 << 20))), BAD),
    "a bomb in its place": (pages(batch(encoding=2, zero=b"\0", payload=packed(1 << 20)[:4000])), BAD),
    "a bomb of zstd": (pages(batch(encoding=3, zero=b"\0", payload=zstandard.compress(bytes(255 << 20)))), BAD),
    "a page as it was never sent": (pages(batch(zero=b"\0", unchanged=b"\1")), BAD),
    "a difference to what was never sent": (pages(batch(zero=b"\0", delta=b"\1", payload=bytes(4096))), BAD),
    "a page that equals none": (pages(batch(zero=b"\0", equal=b"\1", equal_to=[1 << 63])), BAD),
    "a page that equals one of another lane": (
        pages(page(0), batch(sequence=2, run_first=[1], zero=b"\0", equal=b"\1", equal_to=[512]), lanes=2),
        BAD,
    ),
    "no message": (pages(b"\xff" * 1000), BAD),
    "a message that is too long": (pages(bytes(65 << 20)), {"RESOURCE_EXHAUSTED"}),
    "a description of 2 MiB": (prepares(machine_json=" " * (2 << 20)), BAD),
    "a description of 65 MiB": (prepares(machine_json=" " * (65 << 20)), {"RESOURCE_EXHAUSTED"}),
    "a million devices": (prepares(machine_json='{"device":[' + "{}," * 300_000 + "{}]}"), BAD),
    "RAM of 4 EiB": (prepares(machine_json=json.dumps({"name": "m", "ram": {"size": 1 << 62}})), BAD),
    "data outside RAM": (prepares(data_first=[1 << 40], data_pages=[1]), BAD),
    "a million lanes": (prepares(lanes=1_000_000), BAD),
    "the end before the beginning": (lambda source: {refused(source.finish)}, {"NO_SESSION"}),
    "the end without its devices": (finishes(devices=[pb.DeviceConfig(name="nic0")]), BAD),
    "the end without its pages": (finishes(lane_sequences=[5]), BAD),
    **{f"the end with {name}": (cheat, BAD) for name, cheat in HUGE_FINISH.items()},
    "another vCPU": (finishes(vcpu_json='{"runs": 1}'), {"CANNOT_LOAD"}),
    "a commit before the data": (commits_before_the_data, {"NOT_READY"}),
    "a commit of another incarnation": (commits_another_incarnation, {"WRONG_INCARNATION"}),
    "pages after the end": (sends_pages_after_the_end, {"WRONG_STATE"}),
    "paths as sessions": (uses_paths_as_sessions, BAD),
    "a device that is none": (records(END, name="../nic0"), BAD),
    "records after the end": (records(END, END), BAD),
    "a gap between records": (records(END, first=2), BAD),
    "a record of no kind": (records(77), BAD),
    "a record without data": (records(DATA), BAD),
    "a state that is none": (loads_garbage, {"CANNOT_LOAD"}),
    "mappings of nobody": (maps(mapping(container="../x")), {"CANNOT_LOAD"}),
    "mappings that overlap": (maps(mapping(), mapping()), {"CANNOT_LOAD"}),
    "a mapping beyond the width": (maps(mapping(iova=1 << 60)), {"CANNOT_LOAD"}),
    "a mapping beyond 64 bits": (maps(mapping(iova=(1 << 64) - 4096, size=8192)), {"CANNOT_LOAD"}),
    "a mapping of nothing": (maps(mapping(size=0)), {"CANNOT_LOAD"}),
    "a mapping to nowhere": (maps(mapping(gpa=1 << 50)), {"CANNOT_LOAD"}),
    "a hundred thousand mappings": (maps(*(mapping(iova=at << 12) for at in range(100_000))), BAD),
    "a reconnect that was not agreed": (reconnects(1), BAD),
    "a reconnect to the beginning": (reconnects(0, features=["reconnect"], reconnect_s=60), {"OLD_GENERATION"}),
    "an old generation": (goes_on_in_an_old_generation, {"OLD_GENERATION"}),
    "a session for ever": (prepares(features=["reconnect"], reconnect_s=1e9), BAD),
    "a lane twice": (opens_a_lane_twice, BAD),
    "streams without end": (leaves_streams_open, BAD),
    "many at once": (prepares_many_at_once, {"MIGRATION_RUNS"}),
    "too early": (sends_while_it_is_prepared, BAD),
    "two thousand streams": (sends_many_streams, {"NO_SESSION"}),
}


QUICK = (  # most of the others build a machine first
    *(
        "pages outside RAM",
        "a bomb",
        "a description of 2 MiB",
        "a million devices",
        "RAM of 4 EiB",
        "paths as sessions",
    ),
    *("the end with a million devices", "a commit of another incarnation", "two thousand streams"),
    *("a state that is none", "mappings of nobody"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix) for name in CHEATS]
)
def test_a_cheat_is_refused_and_leaves_nothing(rig: Rig, destination: Daemon, name: str) -> None:
    cheat, expected = CHEATS[name]
    before = Traces(rig, destination)
    with closing(HostileSource(destination.address)) as source:
        try:
            assert cheat(source) == expected
        finally:
            source.abort()
    before.are_gone()


def test_what_is_committed_stays_committed(rig: Rig, destination: Daemon) -> None:
    before = Traces(rig, destination)
    with closing(HostileSource(destination.address)) as source:
        source.prepare("nic")
        list(source.records("nic0", saved_nic()))
        device = pb.DeviceConfig(name="nic0", record_sequence=2, config_space=bytes(256))
        source.finish(devices=[device])
        assert source.commit().state == source.commit().state == pb.SESSION_STATE_RUNNING
        assert refused(lambda: source.commit(7)) == "WRONG_INCARNATION"
        assert refused(source.abort) == "COMMITTED"
        assert refused(lambda: source.stub.Prepare(source.prepare_request(), timeout=20)) == "SESSION_ENDED"
        resolved = source.stub.Resolve(pb.ResolveRequest(session_id=source.session), timeout=20)
        assert resolved.state == pb.SESSION_STATE_RUNNING
        assert destination.look().machine.state == "running"
    wait_for(lambda: not destination.look().migrating, "it does not settle")
    destination.stub.StopMachine(host_pb2.StopMachineRequest(), timeout=20)
    before.are_gone()


def saved_nic() -> list[pb.SendDeviceStateRequest]:
    from common.devices.__main__ import build
    from common.vfio.migration import DeviceState

    knobs = {"rate": 20_000_000, "packet": 1500}
    nic = build("nic", "nic0", knobs)
    nic.set_state(DeviceState.STOP_COPY)
    data = bytes(nic.mig_data_read(1 << 20))
    nic.disconnected()
    kinds = ((DATA, data), (END, b""))
    return [pb.SendDeviceStateRequest(sequence=at, kind=kind, data=its) for at, (kind, its) in enumerate(kinds, 1)]


@pytest.mark.matrix
def test_calls_that_never_bring_their_request(rig: Rig, destination: Daemon) -> None:
    before = Traces(rig, destination)
    with ExitStack() as held:
        calls = []
        for _ in range(3):
            channel = held.enter_context(open_channel(destination.address))
            ask = channel.stream_unary("/switchover.v1.HostService/GetMachine")
            calls += [ask.future(for_ever(), timeout=60) for _ in range(80)]
        # All of them end, one way or the other, and meanwhile nobody is left without a word.
        assert {refused(call.result) for call in calls} <= {"CANCELLED", "RESOURCE_EXHAUSTED"}
    before.are_gone()


@pytest.mark.matrix
def test_watchers_are_counted(rig: Rig, destination: Daemon) -> None:
    before = Traces(rig, destination)
    with ExitStack() as held:
        stub = host_pb2_grpc.HostServiceStub(held.enter_context(open_channel(destination.address)))
        watchers = [stub.WatchEvents(host_pb2.WatchEventsRequest(), timeout=60) for _ in range(60)]
        ends = {refused(lambda watcher=watcher: watcher) for watcher in watchers if _ends_soon(watcher)}
        assert ends == {"TOO_MANY_STREAMS"}
        assert destination.look().role == "destination"
        for watcher in watchers:
            watcher.cancel()
    before.are_gone()


def _ends_soon(stream: grpc.Call) -> bool:
    """Return whether a stream has ended once the daemon has answered a call that came after it."""
    deadline = time.monotonic() + 1.0
    while stream.is_active() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not stream.is_active()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = struct.pack(">I", 0)[1:] + b"\x04\x00" + bytes(4)
SLOW = {
    "nothing": b"",
    "half a preface": PREFACE[:12],
    "a preface without settings": PREFACE,
    "no pongs": PREFACE + SETTINGS,
    "half a frame": PREFACE + SETTINGS + b"\x00\x40\x00\x00",
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: x\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.matrix
def test_connections_that_say_nothing_are_hung_up(rig: Rig, destination: Daemon) -> None:
    before = Traces(rig, destination)
    ended: dict[str, bool] = {}

    def trickle(name: str, said: bytes) -> None:
        with socket.create_connection(("127.0.0.1", int(destination.port))) as sock:
            sock.settimeout(1.0)
            deadline = time.monotonic() + 60
            for at in range(10_000):
                try:
                    sock.sendall(said[at : at + 1] if name != "no pongs" else said if at == 0 else b"")
                    if not sock.recv(4096) or time.monotonic() > deadline:
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            ended[name] = time.monotonic() < deadline

    threads = [threading.Thread(target=trickle, args=item) for item in SLOW.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        assert destination.look().role == "destination"
        thread.join()
    assert ended == dict.fromkeys(SLOW, True)
    before.are_gone()


def test_a_crowd_of_connections(rig: Rig, destination: Daemon) -> None:
    before = Traces(rig, destination)
    with ExitStack() as held:
        for _ in range(900):
            held.enter_context(socket.create_connection(("127.0.0.1", int(destination.port)), timeout=20))
        assert destination.look().role == "destination"  # by the connection that was there before
    wait_for(lambda: _answers(destination.address), "nobody is let in after the crowd")
    before.are_gone()


def _answers(address: str) -> bool:
    with open_channel(address) as channel:
        try:
            host_pb2_grpc.HostServiceStub(channel).GetMachine(host_pb2.GetMachineRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return True


def test_after_all_that_a_good_machine_comes(rig: Rig, destination: Daemon) -> None:
    source = rig.start("source", machine_toml(devices=("nic",)))
    assert_completed(source.migrate(destination.address))
    assert destination.look().machine.state == "running"
    said_nothing_wrong(destination)


def test_files_and_sockets_are_their_owners_only(rig: Rig, destination: Daemon) -> None:
    found = {path.relative_to(destination.state_dir).as_posix(): path for path in destination.state_dir.rglob("*")}
    assert {"record.json", "lock"} <= set(found) and any(path.is_socket() for path in found.values())
    for name, path in {"": destination.state_dir, **found}.items():
        # Inside a directory that is closed to others nothing else has to be.
        if path.is_dir() or path.is_socket() or path.parent == destination.state_dir:
            assert path.stat().st_mode & 0o077 == 0, f"{name or 'state directory'}: {path.stat().st_mode:o}"
