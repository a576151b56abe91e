from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.machine.config import parse
from console.demo import MAX_RAM, MIN_RAM, RAM_STEP, corpus, machine_file, ram_size

FAKE_HOST = Path(__file__).with_name("fake_host.py")

# The demo with fake daemons for real ones, and no time to look at them.
DRIVER = """
import sys
import console.demo as demo
demo.RUN_BEFORE_S, demo.RUN_AFTER_S = {before}, 0.0
sys.executable = {interpreter!r}
sys.exit(demo.run(verify="STRICT", ram=64 << 20, as_json=True))
"""


def start(tmp_path: Path, *, before: float = 0.0, mood: str = "right") -> subprocess.Popen[str]:
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE_HOST} {mood} "$@"\n')
    interpreter.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(before=before, interpreter=str(interpreter))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp"), "SWITCHOVER_DEMO": tmp_path.name},
    )


def remains(tmp_path: Path) -> list[str]:
    """Files and processes of a demo; its processes have inherited its environment."""
    mark = f"SWITCHOVER_DEMO={tmp_path.name}\0".encode()
    found = [str(path) for path in (tmp_path / "tmp").iterdir()]
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [str(entry)] if mark in entry.read_bytes() else []
        except OSError:
            continue
    return found


def test_the_whole_story_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = start(tmp_path)
    out, err = demo.communicate(timeout=60)
    assert demo.returncode == 0, err
    told = json.loads(out)
    assert told["downtime_ms"] == 90.0
    assert told["programs"] == [{"name": "clock0", "counters": {"ticks": 12}, "errors": []}]
    assert "Now it moves from A" in err
    assert remains(tmp_path) == []


def test_a_guest_that_found_a_wrong_byte_fails_the_demo(tmp_path: Path) -> None:
    demo = start(tmp_path, mood="wrong")
    out, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert json.loads(out)["programs"][0]["errors"] == ["wrong"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_before_its_time_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    demo = start(tmp_path, before=600.0)
    # Both daemons are up when both have their directories and a machine each.
    while len(list((tmp_path / "tmp").glob("*/*/stdout"))) < 2:
        assert demo.poll() is None
        time.sleep(0.01)
    demo.send_signal(number)
    demo.send_signal(number)
    demo.communicate(timeout=60)
    assert demo.returncode != 0
    assert remains(tmp_path) == []


def test_the_machine_file_is_right(tmp_path: Path) -> None:
    path = tmp_path / 'odd "name'
    path.mkdir()
    machine = path / "machine.toml"
    for ram in (64 << 20, MIN_RAM, MAX_RAM):
        machine.write_text(machine_file(ram, [path]))
        spec = parse(machine)
        assert (spec.ram_size, spec.images, spec.zero_fraction) == (ram, (path,), 0.4)
        assert [device.kind for device in spec.devices] == ["nic", "nvme", "accelerator"]


def test_ram_is_sized_by_the_data_there_is(tmp_path: Path) -> None:
    assert ram_size([tmp_path]) == MIN_RAM
    with (tmp_path / "half").open("wb") as half:
        half.truncate(300 << 20)
    assert ram_size([tmp_path]) == 448 << 20  # 300 / 0.6 = 500, rounded down
    with (tmp_path / "whole").open("wb") as whole:
        whole.truncate(2 << 30)
    assert ram_size([tmp_path]) == MAX_RAM
    assert ram_size(corpus()) % RAM_STEP == 0


def test_the_corpus_names_no_file_twice() -> None:
    directories = corpus()
    assert directories
    assert not [one for one in directories for other in directories if other in one.parents]
