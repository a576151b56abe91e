"""Every decoder with every input that is kept, and with some that nobody has seen before."""

from __future__ import annotations

import pytest
from decoders import DECODERS
from fuzzing import DATA, check, corpus, fuzz

SEED = 20
INPUTS = {"page_batch": 300, "vfio_user_server": 100, "vfio_user_client": 150, "device_state": 100}
KEPT = [(name, file) for name in DECODERS for file in corpus(name)]


def test_every_decoder_has_valid_inputs_and_together_they_are_small() -> None:
    assert all(any(file.startswith("valid-") for file in corpus(name)) for name in DECODERS)
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 200 << 10


@pytest.mark.parametrize(("name", "file"), KEPT)
def test_what_was_found_once(name: str, file: str) -> None:
    check(name, corpus(name)[file])


@pytest.mark.parametrize("name", DECODERS)
def test_inputs_that_nobody_has_seen(name: str) -> None:
    fuzz(name, SEED, count=INPUTS.get(name, 400))
