"""Checks of single values, and of tables of them: each gives the value in its canonical form or says what is wrong."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any, Final, NoReturn

from common.machine.quantities import format_size, parse_rate, parse_size
from common.machine.toml_lines import Path

__all__ = [
    "Check",
    "ConfigError",
    "FieldError",
    "Table",
    "boolean",
    "choice",
    "integer",
    "integers",
    "name",
    "number",
    "on_off",
    "path_of",
    "rate",
    "shown",
    "size",
    "sizes",
    "strings",
    "text",
]

Check = Callable[[object], Any]
"""Takes a value as it came, returns it canonical; raises ValueError: "must be …"."""

MAX_TEXT = 4096
_NAME = re.compile(r"[a-z0-9_][a-z0-9_-]{0,31}", re.ASCII)  # never mistaken for an option
_REQUIRED: Final = object()


class ConfigError(ValueError):
    """A machine's file or description is wrong; the text says where and what."""


class FieldError(Exception):
    """A value is wrong; `path` says which, for whoever can turn that into a line or a member."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class Table:
    """A table whose members are taken one by one, so that those left over are unknown."""

    def __init__(self, members: Mapping[str, Any], path: Path, where: str) -> None:
        """`where` is the table's place for people, for example "in [ram]"."""
        self.path = path
        self.where = where
        self._members = members
        self._known: set[str] = set()

    def take(self, key: str, check: Check, default: Any = _REQUIRED) -> Any:
        """Return a member in canonical form, `default` if it is not there; raise `FieldError`."""
        self._known.add(key)
        if key not in self._members:
            if default is _REQUIRED:
                others = [other for other in self._members if other not in self._known]
                for misspelt in difflib.get_close_matches(key, others, 1):
                    self._refuse(misspelt, f'; did you mean "{key}"?')
                raise FieldError(self.path, f'"{key}" is missing {self.where}')
            return default
        try:
            return check(self._members[key])
        except ValueError as error:
            raise FieldError((*self.path, key), f'"{key}" {self.where} {error}') from error

    def table(self, key: str) -> Table:
        """Return a member that is a table; an empty one if it is not there."""
        self._known.add(key)
        members = self._members.get(key, {})
        if not isinstance(members, Mapping):
            raise FieldError((*self.path, key), f'"{key}" {self.where} must be a table: [{key}]')
        return Table(members, (*self.path, key), f"in [{key}]")

    def tables(self, key: str, limit: int) -> list[Table]:
        """Return the tables of a member that is an array of at most `limit` tables."""
        self._known.add(key)
        members = self._members.get(key, [])
        path = (*self.path, key)
        if not isinstance(members, list) or not all(isinstance(member, Mapping) for member in members):
            raise FieldError(path, f'"{key}" {self.where} must be an array of tables: [[{key}]]')
        if len(members) > limit:
            raise FieldError((*path, limit), f"more than {limit} [[{key}]]")
        return [Table(member, (*path, index), f"in [[{key}]]") for index, member in enumerate(members)]

    def finish(self, elsewhere: Mapping[str, str] | None = None) -> None:
        """Raise `FieldError` for a member that nobody took; `elsewhere` tells whose it would be."""
        for key in self._members:
            if key in self._known:
                continue
            close = difflib.get_close_matches(key[:64], self._known, 1)
            if elsewhere and key in elsewhere:
                self._refuse(key, f"; it belongs to {elsewhere[key]}")
            self._refuse(key, f'; did you mean "{close[0]}"?' if close else "")

    def _refuse(self, key: str, hint: str) -> NoReturn:
        raise FieldError((*self.path, key), f'unknown key "{shown(key)}" {self.where}{hint}')


def boolean(value: object) -> bool:
    """Check true or false."""
    if value is not True and value is not False:
        raise ValueError(f"must be true or false, not {_quoted(value)}")
    return value


def on_off(value: object) -> bool:
    """Check "on" or "off"."""
    return bool(choice("off", "on")(value) == "on")


def text(value: object) -> str:
    """Check a string of at most `MAX_TEXT` characters without control characters."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"must be a printable string of at most {MAX_TEXT} characters, not {_quoted(value)}")
    return value


def name(value: object) -> str:
    """Check a name: 1 to 32 of a-z, 0-9, "_" and "-"."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError(f'must be 1 to 32 characters of a-z, 0-9, "_" and "-", not {_quoted(value)}')
    return value


def path_of(value: str, base: FilePath) -> FilePath:
    """Return the path that a string names, relative to `base`; ValueError if that begins with nobody's home."""
    try:
        return base / FilePath(value).expanduser()
    except RuntimeError:
        raise ValueError(f"is wrong: there is no home directory for {_quoted(value)}") from None


def choice(*values: str | int) -> Check:
    """Make a check for one of `values`."""

    def check(value: object) -> str | int:
        for known in values:
            if type(value) is type(known) and value == known:
                return known
        listed = [json.dumps(known) for known in values]
        message = f"must be {', '.join(listed[:-1])} or {listed[-1]}, not {_quoted(value)}"
        if isinstance(value, str):
            close = difflib.get_close_matches(value[:64], [known for known in values if isinstance(known, str)], 1)
            message += f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(message)

    return check


def integer(low: int, high: int) -> Check:
    """Make a check for an integer from `low` to `high`."""

    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}, not {_quoted(value)}")
        return value

    return check


def integers(low: int, high: int, *, limit: int) -> Check:
    """Make a check for an array of at most `limit` different integers from `low` to `high`; the value is a tuple."""
    element = integer(low, high)

    def check(value: object) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise ValueError(f"must be an array of at most {limit} whole numbers, not {_quoted(value)}")
        try:
            found = tuple(element(entry) for entry in value)
        except ValueError as error:
            raise ValueError(f"has an element that {error}") from error
        if len(set(found)) < len(found):
            raise ValueError(f"has a number twice: {_quoted(value)}")
        return found

    return check


def number(low: float, high: float) -> Check:
    """Make a check for a number from `low` to `high`."""

    def check(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a number from {low} to {high}, not {_quoted(value)}")
        return value

    return check


def size(low: int, high: int, *, multiple: int = 1, power_of_two: bool = False) -> Check:
    """Make a check for a size in bytes, given as "1GiB" or as a number, from `low` to `high`."""

    def check(value: object) -> int:
        result = _quantity(value, parse_size, "a size", '"1GiB"')
        if not low <= result <= high:
            raise ValueError(f"must be from {format_size(low)} to {format_size(high)}, not {_quoted(value)}")
        if result % multiple:
            raise ValueError(f"must be a multiple of {format_size(multiple)}, not {_quoted(value)}")
        if power_of_two and result & (result - 1):
            raise ValueError(f"must be a power of two, not {_quoted(value)}")
        return result

    return check


def sizes(low: int, high: int, *, limit: int) -> Check:
    """Make a check for an array of 1 to `limit` sizes, each a power of two from `low` to `high` bytes."""
    element = size(low, high, power_of_two=True)

    def check(value: object) -> list[int]:
        if not isinstance(value, list) or not 0 < len(value) <= limit:
            raise ValueError(f'must be an array of 1 to {limit} sizes: ["64KiB"], not {_quoted(value)}')
        found = []
        for entry in value:
            try:
                found.append(element(entry))
            except ValueError as error:
                raise ValueError(f"has an element that {error}") from error
        return found

    return check


def rate(low: int, high: int) -> Check:
    """Make a check for a rate in bytes per second, given as "50MB/s" or as a number, from `low` to `high`."""

    def check(value: object) -> int:
        result = _quantity(value, parse_rate, "a rate", '"50MB/s"')
        if not low <= result <= high:
            raise ValueError(f"must be from {low} to {high} bytes per second, not {_quoted(value)}")
        return result

    return check


def strings(pattern: re.Pattern[str] | None, what: str, limit: int) -> Check:
    """Make a check for an array of at most `limit` strings that match `pattern`."""

    def check(value: object) -> list[str]:
        if not isinstance(value, list) or len(value) > limit:
            raise ValueError(f'must be an array of at most {limit} strings: ["…"], not {_quoted(value)}')
        for entry in value:
            if not text(entry) or (pattern is not None and pattern.fullmatch(entry) is None):
                raise ValueError(f"has an element that is not {what}: {_quoted(entry)}")
        return value

    return check


def _quantity(value: object, parse: Callable[[str], int], what: str, example: str) -> int:
    if isinstance(value, str):
        try:
            return parse(text(value))
        except ValueError as error:
            raise ValueError(f"is wrong: {error}") from error
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    raise ValueError(f"must be {what} like {example}, not {_quoted(value)}")


def _quoted(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print what is much longer
        return "a number that long"
    return shown(json.dumps(value, default=str, ensure_ascii=False))


def shown(value: str) -> str:
    """Return a string as a message may have it: at most 64 characters, all of them printable."""
    shortened = value if len(value) <= 64 else value[:61] + "..."
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in shortened)
