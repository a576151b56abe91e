"""Compression of page payloads: the methods from the fastest to the smallest, packing, and unpacking with a bound.

Pages are packed many at a time, for what a page repeats mostly stands in its neighbours. zstd's own levels are made for
data of any kind; these are for pages: tables that stay in a core's cache, and a window of the whole unit.

Contexts are kept for each thread; the interpreter lock is released while lz4 and zstd work.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass, field

import lz4.block
import zstandard

from common.ipc.channel import Buffer
from common.memory.layout import PAGE_SIZE

__all__ = [
    "LZ4",
    "MAX_UNIT_PAGES",
    "METHODS",
    "NONE",
    "ZSTD",
    "Encoding",
    "Method",
    "check_packed",
    "pack",
    "unpack",
]

MAX_UNIT_PAGES = 1024  # 4 MiB
_WINDOW_LOG = 22  # the largest unit
# From so many pages on, some are tried first: what cannot be compressed costs next to nothing.
_SAMPLED_FROM = 128
_SAMPLES = 16
_HOPELESS = 0.95


class Encoding(enum.IntEnum):
    """How a payload is packed; the numbers are those on the wire."""

    RAW = 1
    LZ4 = 2
    ZSTD = 3


@dataclass(frozen=True, slots=True)
class Method:
    """A way to pack, and what to expect of it before it was tried.

    `share` is what is left of the bytes, `rate` and `unpack_rate` are bytes of pages per second and core: measured with
    real files (those of `/usr`), all methods in turns on the same pages, while the other core did the same.
    """

    name: str
    encoding: Encoding
    share: float
    rate: float
    unpack_rate: float
    unit_pages: int = MAX_UNIT_PAGES
    parameters: zstandard.ZstdCompressionParameters | None = field(default=None, compare=False, repr=False)


def _zstd(
    name: str, share: float, rate: float, strategy: int, hash_log: int, chain_log: int, search_log: int, min_match: int
) -> Method:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=_WINDOW_LOG,
        strategy=strategy,
        hash_log=hash_log,
        chain_log=chain_log,
        search_log=search_log,
        min_match=min_match,
        target_length=16 if strategy >= zstandard.STRATEGY_GREEDY else 0,
        write_content_size=True,
    )
    return Method(name, Encoding.ZSTD, share, rate, 720e6, parameters=parameters)


NONE = Method("none", Encoding.RAW, 1.0, float("inf"), float("inf"), unit_pages=256)
LZ4 = Method("lz4", Encoding.LZ4, 0.494, 443e6, 1860e6, unit_pages=512)
METHODS = (
    NONE,
    LZ4,
    _zstd("zstd-1", 0.367, 279e6, zstandard.STRATEGY_FAST, 14, 14, 1, 7),
    _zstd("zstd-2", 0.347, 254e6, zstandard.STRATEGY_FAST, 15, 15, 1, 6),
    _zstd("zstd-3", 0.335, 203e6, zstandard.STRATEGY_FAST, 16, 16, 1, 5),
    _zstd("zstd-4", 0.323, 143e6, zstandard.STRATEGY_DFAST, 17, 15, 1, 5),
    _zstd("zstd-5", 0.312, 49e6, zstandard.STRATEGY_LAZY2, 17, 16, 3, 5),
    _zstd("zstd-6", 0.298, 40e6, zstandard.STRATEGY_LAZY2, 19, 18, 3, 5),
    _zstd("zstd-7", 0.291, 28e6, zstandard.STRATEGY_LAZY2, 21, 20, 4, 5),
)
"""Each of them smaller and slower than the one before it, by rule on real memory."""
ZSTD = METHODS[4]


_thread = threading.local()


def pack(data: memoryview, method: Method) -> bytes | None:
    """Return pages packed, or None if that would not make them smaller; `data` must not change meanwhile."""
    if method.encoding is Encoding.RAW or not _worth_it(data):
        return None
    if method.encoding is Encoding.LZ4:
        packed = lz4.block.compress(data, store_size=False)
    else:
        packed = _compressor(method).compress(data)
    return packed if len(packed) < len(data) else None


def _worth_it(data: memoryview) -> bool:
    """Try a few pages: whether they become smaller."""
    pages = len(data) // PAGE_SIZE
    if pages < _SAMPLED_FROM:
        return True
    step = pages // _SAMPLES * PAGE_SIZE
    sample = b"".join(data[start : start + PAGE_SIZE] for start in range(0, _SAMPLES * step, step))
    return len(lz4.block.compress(sample, store_size=False)) < _HOPELESS * len(sample)


def _compressor(method: Method) -> zstandard.ZstdCompressor:
    compressors: dict[str, zstandard.ZstdCompressor] = _thread.__dict__.setdefault("compressors", {})
    if method.name not in compressors:
        compressors[method.name] = zstandard.ZstdCompressor(compression_params=method.parameters)
    return compressors[method.name]


def check_packed(encoding: int, packed_size: int, size: int) -> None:
    """Raise `ValueError` if a payload cannot be what `size` bytes of pages (at most `MAX_UNIT_PAGES`) are packed to.

    What is in the payload is looked at by `unpack`, before it takes memory for the pages.
    """
    if encoding == Encoding.RAW:
        if packed_size != size:
            raise ValueError(f"a batch has {packed_size} bytes of payload, not {size}")
    elif encoding == Encoding.LZ4:
        # LZ4_COMPRESSBOUND
        if not 1 <= packed_size <= size + size // 255 + 16 or not size:
            raise ValueError(f"a batch has {packed_size} bytes of lz4 for {size} bytes of pages")
    elif encoding == Encoding.ZSTD:
        # What does not become smaller goes as it is.
        if not 1 <= packed_size < size:
            raise ValueError(f"a batch has {packed_size} bytes of zstd for {size} bytes of pages")
    else:
        raise ValueError(f"a batch has the unknown encoding {encoding}")


def _check_frame(packed: Buffer, size: int) -> None:
    try:
        frame = zstandard.get_frame_parameters(packed)
    except zstandard.ZstdError as error:
        raise ValueError(f"a batch's payload is not zstd: {error}") from error
    if frame.content_size != size:
        raise ValueError(f"a batch's payload says that it unpacks to {frame.content_size} bytes, not {size}")
    if frame.window_size > MAX_UNIT_PAGES * PAGE_SIZE or frame.dict_id:
        raise ValueError(f"a batch's payload wants a window of {frame.window_size} bytes or a dictionary")


def unpack(encoding: int, packed: Buffer, size: int) -> Buffer:
    """Return the `size` bytes of pages of a payload that `check_packed` has passed; `ValueError` if it is no such."""
    if encoding == Encoding.RAW:
        return packed
    try:
        if encoding == Encoding.LZ4:
            pages: bytes = lz4.block.decompress(packed, uncompressed_size=size)
        else:
            _check_frame(packed, size)
            pages = _decompressor().decompress(packed, allow_extra_data=False)
    except (lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
        name = Encoding(encoding).name.lower()
        raise ValueError(f"a batch's payload is not {name} of {size} bytes: {error}") from error
    if len(pages) != size:
        raise ValueError(f"a batch's payload unpacks to {len(pages)} bytes, not {size}")
    return pages


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor = _thread.__dict__.setdefault("decompressor", zstandard.ZstdDecompressor())
    return found
