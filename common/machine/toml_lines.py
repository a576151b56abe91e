"""On which line of a TOML text each key stands: what tomllib does not tell, and a good error message needs.

The text has been read by tomllib before, so it is valid TOML; the scanner follows structure and skips values. A path is
a tuple of keys, with a number for each element of an array: the `kind` of the second [[device]] is
``("device", 1, "kind")``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

__all__ = ["Path", "key_lines", "line_of"]

Path = tuple[str | int, ...]

# In the order in which they must be tried: multi-line strings before strings.
_TOKEN = re.compile(
    r'(?P<string>"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}" + r'|"(?:\\.|[^"\\\n])*"' + r"|'[^'\n]*')"
    r"|(?P<comment>\#[^\n]*)|(?P<newline>\n)|(?P<mark>[\[\]{}=,.])|(?P<bare>[^\s\[\]{}=,.\#\"']+)",
    re.DOTALL,
)


def key_lines(text: str) -> dict[Path, int]:
    """Return the line number (from 1) of every table header, key and array element of a valid TOML text."""
    return _Scanner(text).scan()


def line_of(lines: Mapping[Path, int], path: Path) -> int:
    """Return the line of `path` or of the nearest thing around it; 1 if there is none."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


class _Scanner:
    def __init__(self, text: str) -> None:
        self._lines: dict[Path, int] = {}
        self._array_tables: dict[Path, int] = {}  # path of an array of tables → index of its last table
        self._tokens: list[tuple[str, int]] = []
        line = 1
        for match in _TOKEN.finditer(text):
            if match.lastgroup != "comment":
                self._tokens.append((match[0], line))
            line += match[0].count("\n")
        self._at = 0

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while self._at < len(self._tokens):
            if self._peek() == "\n":
                self._at += 1
            elif self._peek() == "[":
                table = self._header()
            else:
                self._assignment(table)
        return self._lines

    def _peek(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def _take(self) -> tuple[str, int]:
        token = self._tokens[self._at]
        self._at += 1
        return token

    def _note(self, path: Path, line: int) -> None:
        # The first mention counts: [a.b] may come before [a].
        for length in range(1, len(path) + 1):
            self._lines.setdefault(path[:length], line)

    def _header(self) -> Path:
        _, line = self._take()
        is_array = self._peek() == "["
        if is_array:
            self._take()
        keys = self._keys()
        while self._peek() == "]":
            self._take()
        path: Path = ()
        for key in keys[:-1]:
            path = self._inside((*path, key))
        path = (*path, keys[-1])
        if is_array:
            self._array_tables[path] = self._array_tables.get(path, -1) + 1
            path = self._inside(path)
        self._note(path, line)
        return path

    def _inside(self, path: Path) -> Path:
        return (*path, self._array_tables[path]) if path in self._array_tables else path

    def _keys(self) -> list[str]:
        keys = [_key(self._take()[0])]
        while self._peek() == ".":
            self._take()
            keys.append(_key(self._take()[0]))
        return keys

    def _assignment(self, table: Path) -> None:
        line = self._tokens[self._at][1]
        path = (*table, *self._keys())
        self._note(path, line)
        self._take()  # "="
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._peek() == "[":
            self._take()
            index = 0
            while not self._skipped("]"):
                self._note((*path, index), self._tokens[self._at][1])
                self._value((*path, index))
                index += 1
        elif self._peek() == "{":
            self._take()
            while not self._skipped("}"):
                self._assignment(path)
        else:
            # A number or a date may consist of several tokens ("1.5", "07:32:00 ").
            while self._peek() not in {"\n", ",", "]", "}", ""}:
                self._at += 1

    def _skipped(self, end: str) -> bool:
        while self._peek() in {"\n", ","}:
            self._at += 1
        if self._peek() != end:
            return False
        self._at += 1
        return True


def _key(token: str) -> str:
    return next(iter(tomllib.loads(f"{token} = 0"))) if token[0] in "\"'" else token
