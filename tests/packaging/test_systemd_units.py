"""The unit that daemons run by: it says what the daemons understand, and what systemd does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parents[2] / "packaging" / "systemd"
UNIT = DIRECTORY / "switchover@.service"
ROLES = ("source", "destination", "host")


def settings() -> dict[str, dict[str, str]]:
    """Return the unit's settings by section; fail if one is there twice, for the last would count."""
    sections: dict[str, dict[str, str]] = {}
    for line in UNIT.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), {})
            continue
        key, separator, value = line.partition("=")
        assert separator and key not in current, line
        current[key] = value
    return sections


def test_a_stop_ends_the_daemon_and_not_its_machines() -> None:
    service = settings()["Service"]
    assert (service["KillMode"], service["Restart"]) == ("process", "on-failure")
    # Who is started anew must be the same user, with the same records.
    assert "DynamicUser" not in service and service["User"] == "switchover"
    assert (service["StateDirectory"], service["StateDirectoryMode"]) == ("switchover/%i", "0700")
    assert "${STATE_DIRECTORY}" in service["ExecStart"]
    assert " switchover " in (DIRECTORY / "switchover.sysusers").read_text()


def test_it_may_do_no_more_than_it_must() -> None:
    service = settings()["Service"]
    assert service["ProtectSystem"] == "strict" and service["CapabilityBoundingSet"] == ""
    for setting in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces"):
        assert service[setting] == "yes"
    assert "LimitMEMLOCK" in service


@pytest.mark.parametrize("role", ROLES)
def test_its_options_are_those_of_the_command(role: str) -> None:
    program, instance, *arguments = settings()["Service"]["ExecStart"].split()
    assert (Path(program).name, instance) == ("switchover", "%i")
    shown = subprocess.run(
        [sys.executable, "-m", "console", role, "--help"], capture_output=True, text=True, check=True
    ).stdout
    options = [argument for argument in arguments if argument.startswith("--")]
    assert options == ["--listen", "--state-dir"]
    for option in options:
        assert re.search(rf"{option}\b", shown)
    # What the unit and its comments take for granted.
    assert "SWITCHOVER_TLS" in shown and "--on-sigterm" in shown
    assert "SWITCHOVER_TLS=/etc/switchover/tls" in settings()["Service"]["Environment"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("role", ROLES)
def test_systemd_understands_it(tmp_path: Path, role: str) -> None:
    """With a program that is there and a user that there is; all else is as it is shipped."""
    unit = tmp_path / f"switchover@{role}.service"
    text = UNIT.read_text().replace("/usr/bin/switchover", shutil.which("true") or "/bin/true")
    unit.write_text(re.sub(r"^(User|Group)=.*$", r"\1=root", text, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "switchover@" in line]) == (0, [])
