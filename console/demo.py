"""`switchover demo`: two daemons on this host, a machine full of real data, one migration, and nothing left behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text
from switchover.v1.host_pb2 import (
    GetMachineRequest,
    Machine,
    MigrateRequest,
)
from switchover.v1.migration_pb2 import VerifyMode

from common.machine.config import parse
from common.machine.quantities import format_size
from console.daemon import QUICK_CALL_S, daemon, plain_data, printable
from console.exit_codes import ExitCode, exit_code_of
from console.launch import running_host, wait_until_it_runs
from console.migration import migrate
from console.progress import open_progress
from console.report import report
from console.status import programs_table
from console.summary import print_summary

__all__ = ["corpus", "machine_file", "ram_size", "run"]

MIB = 1 << 20
RAM_STEP = 64 * MIB
MIN_RAM = 256 * MIB
MAX_RAM = 1024 * MIB
DATA_SHARE = 0.6  # the rest of RAM stays zero, as RAM does
STOP_S = 15.0
RUN_BEFORE_S = 2.0
RUN_AFTER_S = 1.0
PR_SET_CHILD_SUBREAPER = 36
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(*, verify: str, ram: int | None, as_json: bool) -> ExitCode:
    """Run the demo with VERIFY_MODE_<verify> and `ram` bytes of RAM (None: what the data here fills)."""
    console = Console(stderr=as_json)
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    directories = corpus()
    with ExitStack() as stack:
        workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="switchover-demo-")))
        stack.enter_context(_nothing_left_behind())
        try:
            machine = workspace / "machine.toml"
            machine.write_text(machine_file(ram or ram_size(directories), directories))
            parse(machine)
            return _story(console, stack, workspace, verify, as_json=as_json)
        finally:
            # From here on everything is taken down; impatience must not cut that short.
            for number in ENDING_SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def _story(console: Console, stack: ExitStack, workspace: Path, verify: str, *, as_json: bool) -> ExitCode:
    _say(console, "Two daemons on this host stand for two hosts. A starts a machine:")
    a = stack.enter_context(running_host(workspace / "a", workspace / "machine.toml"))
    before = wait_until_it_runs(a, workspace / "a")
    _introduce(console, before)
    b = stack.enter_context(running_host(workspace / "b", None))
    time.sleep(RUN_BEFORE_S)
    _say(console, f"Now it moves from A ({a}) to B ({b}), while it runs:")
    request = MigrateRequest(destination=b, verify=VerifyMode.Value(f"VERIFY_MODE_{verify}"))
    with daemon(a) as stub:
        result = migrate(stub, request, open_progress(console))
    code = exit_code_of(result)
    if code is ExitCode.COMPLETED:
        time.sleep(RUN_AFTER_S)
    with daemon(b if code is ExitCode.COMPLETED else a) as stub:
        after = stub.GetMachine(GetMachineRequest(), timeout=QUICK_CALL_S).machine
    if as_json:
        programs = [plain_data(program) for program in after.programs]
        print(json.dumps(report(result) | {"programs": programs}, indent=2))
    else:
        print_summary(console, result, a)
        _tell_how_it_goes_on(console, before, after)
    found_errors = any(program.errors for program in after.programs)
    return ExitCode.FAILED if code is ExitCode.COMPLETED and found_errors else code


def corpus() -> list[Path]:
    """Return the directories of real data that every Python brings along: its own libraries."""
    paths = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    distinct = [path for path in dict.fromkeys(paths) if path.is_dir()]
    return [path for path in distinct if not any(other in path.parents for other in distinct)]


def ram_size(directories: Sequence[Path]) -> int:
    """Return the RAM in bytes of which the files in `directories` fill `DATA_SHARE`, within the demo's limits."""
    found = 0
    for directory in directories:
        for place, _, names in os.walk(directory):
            for name in names:
                with suppress(OSError):
                    found += os.lstat(os.path.join(place, name)).st_size  # 20 000 files: Path is slow
            if found >= MAX_RAM * DATA_SHARE:
                return MAX_RAM
    return max(int(found / DATA_SHARE) // RAM_STEP * RAM_STEP, MIN_RAM)


def machine_file(ram: int, directories: Sequence[Path]) -> str:
    """Return the demo's machine.toml: every kind of device with its driver, a writer, a clock."""
    # A JSON string is a TOML string.
    images = ", ".join(json.dumps(str(directory)) for directory in directories)
    region = min(64 * MIB, ram // 8 // (2 * MIB) * (2 * MIB))
    return f"""\
name = "demo"

[ram]
size = {ram}
image = [{images}]
zero_fraction = {1 - DATA_SHARE:.1f}

[viommu]
enabled = true

[[device]]
name = "nic0"
kind = "nic"

[[device]]
name = "nvme0"
kind = "nvme"

[[device]]
name = "accel0"
kind = "accelerator"

[[guest]]
program = "driver"
name = "nic0-driver"
device = "nic0"
peer = "accel0"
remap = 64

[[guest]]
program = "driver"
name = "nvme0-driver"
device = "nvme0"

[[guest]]
program = "driver"
name = "accel0-driver"
device = "accel0"

[[guest]]
program = "writer"
pattern = "hotspot"
rate = "20MB/s"
region = {region}

[[guest]]
program = "clock"
"""


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(printable(text), style=style))


def _introduce(console: Console, machine: Machine) -> None:
    devices = ", ".join(device.name for device in machine.devices)
    programs = ", ".join(program.name for program in machine.programs)
    data = format_size(machine.ram_allocated_bytes)
    _say(console, f"  RAM      {format_size(machine.ram_bytes)}, {data} of it filled with this Python's own libraries")
    _say(console, f"  devices  {devices}: vfio-user devices in processes of their own, behind a virtual IOMMU")
    _say(console, f"  guest    {programs}: each checks every byte that it gets back")


def _tell_how_it_goes_on(console: Console, before: Machine, after: Machine) -> None:
    console.print()
    _say(console, f"The machine is {after.state}. What its programs have counted since they were started at A:")
    console.print(programs_table(after))
    for program in after.programs:
        for error in program.errors:
            _say(console, f"{program.name} has found an error: {error}", "bold red")
    if after.programs and not any(program.errors for program in after.programs):
        _say(console, "None of them has found a wrong byte.")
    if len(after.programs) < len(before.programs):
        _say(console, "Some of its programs are gone.", "bold red")


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Adopt whatever our children leave behind, and end it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        deadline = time.monotonic() + STOP_S
        while (orphans := _children()) and time.monotonic() < deadline:
            for pid in orphans:
                with suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def _children() -> list[int]:
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # After the command's name, which may contain anything: state, then the parent.
            if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                children.append(int(entry.parent.name))
    return children
