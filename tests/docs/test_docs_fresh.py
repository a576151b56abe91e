"""The documentation is about the code that is here: generated parts are fresh, links and named tests exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEST_NAME = re.compile(r"`(test_\w+)`")


@pytest.mark.parametrize("name", ["generate_device_states", "generate_checking_devices"])
def test_generated_parts_are_fresh(name: str) -> None:
    generator = runpy.run_path(str(ROOT / "docs" / f"{name}.py"))
    page = generator["PAGE"].read_text()
    assert generator["fresh"](page) == page, f"run: python docs/{name}.py"


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(prose(page)) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    defined = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert set(TEST_NAME.findall(prose(page))) <= defined | {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
