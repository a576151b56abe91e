"""Reading a TOML file whose errors name the line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from common.machine.fields import ConfigError, FieldError
from common.machine.toml_lines import key_lines, line_of

__all__ = ["read_toml"]

_T = TypeVar("_T")


def read_toml(path: Path, read: Callable[[Mapping[str, Any]], _T]) -> _T:
    """Return what `read` makes of a file's document; a `FieldError` of it, and all else, becomes a `ConfigError`."""
    try:
        source = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    try:
        document = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(path, source, str(error))) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return read(document)
    except FieldError as error:
        raise ConfigError(f"{path}:{line_of(key_lines(source), error.path)}: {error}") from error


def _syntax_error(path: Path, source: str, message: str) -> str:
    found = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if found is None:
        return f"{path}: {message}"
    line = int(found[1]) if found[1] else max(source.rstrip().count("\n") + 1, 1)
    return f"{path}:{line}: {message[: found.start()].lower()}"
