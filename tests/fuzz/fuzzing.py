"""Feed decoders with spoilt inputs: python tests/fuzz/fuzzing.py --seconds 60 --seed 7 (make fuzz).

The same seed gives the same inputs in the same order. An input that fails is written to tests/data/fuzz/DECODER, where
the tests find it, and what was valid there is what others are made of.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
import traceback
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FrameType

from decoders import DECODERS, Decoder
from mutations import MAX_INPUT

import common  # noqa: F401  # before anything imports grpc

DATA = Path(__file__).parent.parent / "data" / "fuzz"
SECONDS_FOR_ONE = 20  # an input that takes so long never ends


def corpus(name: str) -> dict[str, bytes]:
    """Return the inputs of a decoder that are kept, by file name."""
    files = sorted((DATA / name).iterdir(), key=lambda path: (not path.name.startswith("valid-"), path.name))
    return {path.name: path.read_bytes() for path in files}


@contextmanager
def watched(bound: int) -> Iterator[None]:
    """Fail if what runs meanwhile takes more memory than `bound` bytes, or for ever."""

    def too_long(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"it has not ended after {SECONDS_FOR_ONE} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_FOR_ONE)
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    tracemalloc.reset_peak()
    held, _ = tracemalloc.get_traced_memory()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if ours:
            tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if peak - held > bound:
        raise AssertionError(f"it took {(peak - held) >> 10} KiB, at most {bound >> 10} are allowed")


@cache
def warmed(name: str) -> Decoder:
    """Return a decoder that has all that it keeps from one input to the next."""
    DECODERS[name].run(next(iter(corpus(name).values())))
    return DECODERS[name]


def check(name: str, data: bytes) -> None:
    """Decode one input; raise whatever is wrong with that."""
    decoder = warmed(name)
    with watched(decoder.bound):
        decoder.run(data)


def inputs(name: str, seed: int) -> Iterator[bytes]:
    """Yield spoilt inputs without end."""
    rng = random.Random(f"{seed} {name}")
    valid = list(corpus(name).values())
    recent: list[bytes] = []
    while True:
        data = rng.choice(recent) if recent and rng.randrange(3) == 0 else rng.choice(valid)
        data = DECODERS[name].spoil(data, rng)[:MAX_INPUT]
        if rng.randrange(8) == 0:
            recent = [*recent[-30:], data]
        yield data


def fuzz(name: str, seed: int, *, seconds: float = float("inf"), count: float = float("inf")) -> int:
    """Decode spoilt inputs for so long, or so many; return how many. A failure says where its input is now."""
    ends = time.monotonic() + seconds
    done = 0
    tracemalloc.start()
    try:
        for data in inputs(name, seed):
            if done >= count or time.monotonic() > ends:
                break
            try:
                check(name, data)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                path = DATA / name / f"found-{sha256(data).hexdigest()[:12]}"
                path.write_bytes(data)
                raise AssertionError(f"input {done} of seed {seed} fails, and is now {path}") from error
            done += 1
    finally:
        tracemalloc.stop()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed decoders with spoilt inputs.")
    parser.add_argument("--seconds", type=float, default=60, help="for all of them together")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("decoders", nargs="*", help=f"of {', '.join(DECODERS)}")
    options = parser.parse_args()
    names = options.decoders or list(DECODERS)
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    found = 0
    for name in names:
        began = time.monotonic()
        try:
            done = fuzz(name, seed, seconds=options.seconds / len(names))
        except AssertionError as failure:
            found += 1
            print(f"{name}: {failure}", flush=True)
            for line in traceback.format_exception(failure.__cause__, limit=-4, chain=False):
                print(f"  {line[:800].rstrip()}", flush=True)
            continue
        taken = time.monotonic() - began
        print(f"{name}: {done} inputs, {done / taken:.0f} a second, nothing found", flush=True)
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
