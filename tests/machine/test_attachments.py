"""Where a host finds devices that others serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.machine.attachments import attachments_of, read_attachments, with_attachments, without_attachments
from common.machine.config import MachineSpec, from_json, parse, to_json
from common.machine.device_config import Attachment
from common.machine.fields import ConfigError

MACHINE = """
name = "m"
[ram]
size = "64MiB"
[[device]]
name = "disk"
socket = "disk.sock"
[[device]]
name = "card"
kind = "nic"
command = "card --listen {socket}"
[[device]]
kind = "nvme"
"""


@pytest.fixture
def spec(tmp_path: Path) -> MachineSpec:
    path = tmp_path / "machine.toml"
    path.write_text(MACHINE)
    return parse(path)


def problem(tmp_path: Path, text: str) -> str:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_attachments(path)
    return str(refused.value).removeprefix(f"{tmp_path}/")


def test_what_the_machine_file_says(spec: MachineSpec, tmp_path: Path) -> None:
    assert attachments_of(spec) == {
        "disk": Attachment(f"{tmp_path}/disk.sock"),
        "card": Attachment(command="card --listen {socket}"),
    }
    assert [(device.name, device.kind) for device in spec.devices] == [
        ("disk", "vfio-user"),
        ("card", "nic"),
        ("nvme0", "nvme"),
    ]
    assert spec.devices[1].knobs == {}  # they are the server's own


def test_it_survives_the_machines_own_description(spec: MachineSpec) -> None:
    assert from_json(to_json(spec)) == spec


def test_nothing_of_it_travels(spec: MachineSpec) -> None:
    text = to_json(without_attachments(spec))
    assert "disk.sock" not in text and "--listen" not in text
    arrived = from_json(text)
    known = {"disk": Attachment("/run/other.sock"), "card": Attachment(command="card"), "more": Attachment("/run/x")}
    assert attachments_of(with_attachments(arrived, known)) == {name: known[name] for name in ("disk", "card")}
    with pytest.raises(LookupError, match=r"device card .* --device-socket card=PATH"):
        with_attachments(arrived, {"disk": known["disk"]})


def test_what_a_peer_has_put_there_is_refused(spec: MachineSpec) -> None:
    with pytest.raises(ValueError, match="disk: a peer does not say"):
        with_attachments(from_json(to_json(spec)), {"disk": Attachment("/run/mine.sock"), "card": Attachment("/run/c")})


def test_a_file_of_devices(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text('[[device]]\nname = "a"\nsocket = "a.sock"\n[[device]]\nname = "b"\ncommand = "b {socket}"\n')
    assert read_attachments(path) == {"a": Attachment(f"{tmp_path}/a.sock"), "b": Attachment(command="b {socket}")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[device]]\nsocket = "/a"', 'devices.toml:1: "name" is missing'),
        ('[[device]]\nname = "a"', 'devices.toml:1: device "a" has neither socket nor command'),
        ('[[device]]\nname = "a"\nsocket = ""', 'devices.toml:3: "socket" in [[device]] is empty'),
        ('[[device]]\nname = "a"\nsocket = "/a"\n[[device]]\nname = "a"\nsocket = "/b"', "devices.toml:5: two devices"),
        ('[[device]]\nname = "a"\nsocket = "/a"\nkind = "nic"', 'devices.toml:4: unknown key "kind"'),
        (f'[[device]]\nname = "a"\nsocket = "/{"a" * 107}"', "devices.toml:3: a socket's path has at most 107 bytes"),
    ],
)
def test_errors_name_the_line_of_the_file(tmp_path: Path, text: str, said: str) -> None:
    assert problem(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ('socket = "/a"\nrate = "1MB/s"', "unknown key"),
        ('socket = "/a"\nkind = "toaster"', '"kind" in [[device]] must be'),
        ('kind = "nic"\ncompare_bars = [6]', "must be a whole number from 0 to 5"),
        ('kind = "nic"\ncompare_bars = [1, 1]', "has a number twice"),
        ('socket = "/a"\n[[guest]]\nprogram = "driver"\ndevice = "vfio-user0"', "there is no driver"),
    ],
)
def test_errors_of_a_machine_with_such_devices(tmp_path: Path, device: str, said: str) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(f'name = "m"\n[ram]\nsize = "64MiB"\n[[device]]\n{device}\n')
    with pytest.raises(ConfigError) as refused:
        parse(path)
    assert said in str(refused.value)
