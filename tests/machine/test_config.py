from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.machine.config import MachineSpec, from_json, parse, to_json
from common.machine.fields import ConfigError

GOOD = """\
name = "shop"
uuid = "6F2C9E0A-0000-4000-8000-000000000001"
trace = true

[ram]
size = "1GiB"
image = ["corpus", "."]
zero_fraction = 0.25

[viommu]
enabled = true
address_width = 39
strategy = "mapped"

[[device]]
kind = "nic"
rate = "1Gbit/s"
faults = ["unlogged", "fail:STOP_COPY"]

[[device]]
name = "gpu"
kind = "accelerator"
container = "second"
migration = "on"
device_dirty_tracking = "off"
pre_copy_dirty_tracking = "off"
iommu_dirty_tracking = "off"
memory = "32MiB"
load_delay_ms = 25
migration_flags = 3
log_page_sizes = ["64KiB", 4096]

[[device]]
kind = "nic"

[[guest]]
program = "driver"
device = "nic0"
peer = "gpu"
remap = 64

[[guest]]
program = "writer"
name = "scribe"
pattern = "hotspot"
region = "64MiB"

[[guest]]
program = "clock"
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "machine.toml"
    path.write_text(text)
    return path


def problem(directory: Path, text: str) -> str:
    """The error for a file, without its directory."""
    with pytest.raises(ConfigError) as caught:
        parse(write(directory, text))
    return str(caught.value).removeprefix(f"{directory}/")


@pytest.fixture
def good(tmp_path: Path) -> MachineSpec:
    (tmp_path / "corpus").write_text("x")
    return parse(write(tmp_path, GOOD))


def test_everything_in_a_file_arrives(good: MachineSpec, tmp_path: Path) -> None:
    assert (good.name, good.uuid, good.trace) == ("shop", "6f2c9e0a-0000-4000-8000-000000000001", True)
    assert (good.ram_size, good.zero_fraction) == (1 << 30, 0.25)
    assert good.images == (tmp_path / "corpus", tmp_path)
    assert (good.viommu.enabled, good.viommu.address_width, good.viommu.strategy) == (True, 39, "mapped")
    nic, gpu, second = good.devices
    assert (nic.name, nic.container, nic.migration, nic.device_dirty_tracking) == ("nic0", "default", "auto", True)
    assert nic.knobs == {"rate": 125_000_000, "packet": 1500, "faults": ["unlogged", "fail:STOP_COPY"]}
    assert (gpu.name, gpu.container, gpu.migration) == ("gpu", "second", "on")
    assert (gpu.device_dirty_tracking, gpu.iommu_dirty_tracking, gpu.pre_copy_dirty_tracking) == (False, False, False)
    assert nic.iommu_dirty_tracking
    assert gpu.knobs == {
        "memory": 32 << 20,
        "churn": 1_000_000,
        "load_delay_ms": 25,
        "migration_flags": 3,
        "log_page_sizes": [65536, 4096],
    }
    assert second.name == "nic1"
    assert [program.name for program in good.programs] == ["driver0", "scribe", "clock0"]
    assert good.programs[0].knobs == {"device": "nic0", "remap": 64, "peer": "gpu"}
    assert good.programs[1].knobs == {"pattern": "hotspot", "rate": 50_000_000, "region": 64 << 20}
    assert good.programs[2].knobs == {"period_us": 1000}


def test_the_smallest_file(tmp_path: Path) -> None:
    spec = parse(write(tmp_path, 'name = "m"\nram.size = "64MiB"\n'))
    assert (spec.uuid, spec.images, spec.zero_fraction, spec.devices, spec.programs) == (None, (), 0.4, (), ())
    assert (spec.viommu.enabled, spec.viommu.address_width, spec.viommu.strategy) == (True, 48, "auto")


def test_the_default_region_of_a_writer_fits_small_machines(tmp_path: Path) -> None:
    for ram, region in (("64MiB", 16 << 20), ("4GiB", 256 << 20)):
        spec = parse(write(tmp_path, f'name = "m"\nram.size = "{ram}"\n[[guest]]\nprogram = "writer"\n'))
        assert spec.programs[0].knobs["region"] == region


def test_the_description_comes_back_equal_and_canonical(good: MachineSpec) -> None:
    description = to_json(good)
    assert from_json(description) == good
    assert to_json(from_json(description.encode())) == description
    shuffled = json.dumps(dict(reversed(json.loads(description).items())), indent=1)
    assert to_json(from_json(shuffled)) == description


RAM = 'name = "m"\n[ram]\nsize = "64MiB"\n'
NIC = '[[device]]\nkind = "nic"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "m"\n\n[ram]\nsise = "1GiB"', '4: unknown key "sise" in [ram]; did you mean "size"?'),
        ('name = "m"\n\n[ram]\n', '3: "size" is missing in [ram]'),
        (RAM + 'sise = "1GiB"', '4: unknown key "sise" in [ram]; did you mean "size"?'),
        (RAM + "[viomu]\n", '4: unknown key "viomu" at the top level; did you mean "viommu"?'),
        (RAM + NIC + NIC + "pakcet = 9", '8: unknown key "pakcet" in [[device]]; did you mean "packet"?'),
        (RAM + NIC + '\nmemory = "1MiB"', '7: unknown key "memory" in [[device]]; it belongs to accelerator'),
        (RAM + '[[guest]]\nprogram = "clock"\nrate = 1', '6: unknown key "rate" in [[guest]]; it belongs to writer'),
        (RAM + '[[device]]\nname = "x"', '4: "kind" is missing in [[device]]'),
        (RAM + NIC + 'name = "Nic"', '6: "name" in [[device]] must be 1 to 32 characters of a-z'),
        (RAM + NIC + 'name = "-n"', '6: "name" in [[device]] must be 1 to 32 characters of a-z'),
        (RAM + NIC + '[[device]]\nkind = "nvme"\nname = "nic0"', '8: two devices have the name "nic0"'),
        (
            RAM + '[[device]]\nkind = "nci"',
            '5: "kind" in [[device]] must be "nic", "nvme", "sample" or "accelerator", not "nci"; did',
        ),
        (RAM + NIC + "migration = true", '6: "migration" in [[device]] must be "auto", "on" or "off", not true'),
        (
            RAM + NIC + 'device_dirty_tracking = "auto"',
            '6: "device_dirty_tracking" in [[device]] must be "off" or "on"',
        ),
        (RAM + NIC + 'rate = "1Gb/s"', '6: "rate" in [[device]] is wrong: "1Gb/s": unknown unit "Gb/s"; did you mean'),
        (RAM + NIC + "packet = 63", '6: "packet" in [[device]] must be a whole number from 64 to 65536, not 63'),
        (RAM + NIC + "packet = true", '6: "packet" in [[device]] must be a whole number from 64 to 65536, not true'),
        (RAM + NIC + 'faults = "unlogged"', '6: "faults" in [[device]] must be an array of at most 16 strings'),
        (RAM + NIC + 'faults = ["fail_logging"]', '6: "faults" in [[device]] has an element that is not a fault'),
        (RAM + NIC + "migration_flags = 2", '6: "migration_flags" in [[device]] must be 0, 1, 3, 5 or 7, not 2'),
        (RAM + NIC + "log_page_sizes = []", '6: "log_page_sizes" in [[device]] must be an array of 1 to 16 sizes'),
        (
            RAM + NIC + 'log_page_sizes = ["6KiB"]',
            '6: "log_page_sizes" in [[device]] has an element that must be a power of two',
        ),
        (
            RAM + NIC + "log_page_sizes = [512]",
            '6: "log_page_sizes" in [[device]] has an element that must be from 4.00 KiB to 1.00 GiB',
        ),
        (RAM + NIC + 'faults = ["a b"]', '6: "faults" in [[device]] has an element that is not a fault: "a b"'),
        (RAM + '[[device]]\nkind = "accelerator"\nmemory = "3MiB"', '6: "memory" in [[device]] must be a power of two'),
        (RAM + "[viommu]\naddress_width = 40", '5: "address_width" in [viommu] must be 39 or 48, not 40'),
        (RAM + '[viommu]\nenabled = "on"', '5: "enabled" in [viommu] must be true or false, not "on"'),
        (RAM + "zero_fraction = nan", '4: "zero_fraction" in [ram] must be a number from 0 to 0.95'),
        (RAM + 'image = [\n "machine.toml",\n "gone"]', '6: image "gone" does not exist'),
        (RAM + 'image = ["a\\u0000"]', '4: "image" in [ram] must be a printable string'),
        ('name = "m"\nram = 5', '2: "ram" at the top level must be a table: [ram]'),
        (RAM + '[device]\nkind = "nic"', '4: "device" at the top level must be an array of tables: [[device]]'),
        (RAM.replace("64", "62"), '3: "size" in [ram] must be from 64.0 MiB to 4.00 TiB, not "62MiB"'),
        (RAM.replace("64", "65"), '3: "size" in [ram] must be a multiple of 2.00 MiB, not "65MiB"'),
        (RAM.replace('"64MiB"', "0x" + "F" * 5000), '3: "size" in [ram] must be from'),
        (RAM + "a = " + "9" * 5000, " Exceeds the limit"),
        ('uuid = "1"\n' + RAM, '1: "uuid" at the top level must be a UUID like "00000000-'),
        ("uuid = 1\n" + RAM, '1: "uuid" at the top level must be a UUID like "00000000-'),
        (RAM + '[[guest]]\nprogram = "driver"', '4: "device" is missing in [[guest]]: which device does it drive?'),
        (
            RAM + '[[guest]]\nprogram = "driver"\ndevice = "nic0"',
            '6: device "nic0" is not in this machine; it has: none',
        ),
        (
            RAM + NIC + '[[guest]]\nprogram = "driver"\ndevice = "nic0"\npeer = "nic0"\n',
            "9: only a nic writes to a peer, and only an accelerator can be one",
        ),
        (RAM + NIC + '[[guest]]\nprogram = "driver"\ndevice = "nic0"\n' * 2, '11: device "nic0" has a driver already'),
        (RAM + '[[guest]]\nprogram = "idle"\nname = "a"\n' * 2, '9: two guest programs have the name "a"'),
        (RAM + '[[guest]]\nprogram = "idle"\n' * 16, "4: 16 guest programs need 65 MiB of RAM, more than there is"),
        (
            RAM + '[[guest]]\nprogram = "writer"\nregion = "60MiB"',
            "6: the programs' areas and the writers' regions up to",
        ),
        (RAM + NIC * 65, "132: more than 64 [[device]]"),
        (RAM + "size = 1", "4: cannot overwrite a value"),
        (RAM + "[viommu\n", "4: expected ']' at the end of a table declaration"),
        (RAM + "x = [", "4: invalid value"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    assert problem(tmp_path, text).startswith(f"machine.toml:{message}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file or directory"):
        parse(tmp_path / "gone.toml")
    (tmp_path / "binary.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match=r"binary.toml: not UTF-8 text \(byte 8\)"):
        parse(tmp_path / "binary.toml")


DESCRIPTION: dict[str, Any] = {"name": "m", "ram": {"size": 64 << 20}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"name":"m","name":"m"}', "a member is given twice"),
        ('{"name":"m","ram":{"size":NaN}}', "NaN is not a JSON number"),
        ('{"name":"m","ram":{"size":1e999}}', 'ram.size: "size" in [ram] must be a size'),
        (" " * (1 << 20) + "{}", "1048578 bytes, more than 1048576"),
        (json.dumps(DESCRIPTION | {"ram": {"size": 1 << 50}}), "ram.size: "),
        (json.dumps(DESCRIPTION | {"ram": {"size": True}}), "ram.size: "),
        (json.dumps(DESCRIPTION | {"ram": {"size": 64 << 20, "image": ["etc"]}}), "ram.image[0]: "),
        (json.dumps(DESCRIPTION | {"device": [{"kind": "nic"}, {"kind": "nic", "name": "../x"}]}), "device[1].name: "),
        (json.dumps(DESCRIPTION | {"device": [{"kind": "nic"}] * 65}), "device[64]: "),
        (json.dumps(DESCRIPTION | {"device": {}}), "device: "),
        (json.dumps(DESCRIPTION | {"x\ny": 1}), 'unknown key "x\N{REPLACEMENT CHARACTER}y"'),
    ],
)
def test_descriptions_from_the_network_are_not_trusted(document: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(document)
    assert str(caught.value).startswith("machine description: ")
    assert message in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["nic", "1GiB"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "kind", "size", "image", "rate", "program", "device", "peer", "faults"]), inner
        )
    ),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # where it runs beside other tests
@given(st.dictionaries(st.sampled_from(["name", "uuid", "trace", "ram", "viommu", "device", "guest"]), JSON))
def test_anything_at_all_is_a_machine_or_a_config_error(members: dict[str, Any]) -> None:
    for document in (members, DESCRIPTION | members):
        try:
            spec = from_json(json.dumps(document))
        except ConfigError:
            continue
        assert from_json(to_json(spec)) == spec
