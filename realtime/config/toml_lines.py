"""The lines of a TOML file: finds the line of each key, and writes a settings tree as commented lines.

The standard library's parser gives tables without positions. `parse_toml` therefore scans the same text, already known
to be valid TOML 1.0, a second time for line numbers, and only when there is a problem to report.
"""

from __future__ import annotations

import functools
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import NODEFAULT, Struct

from realtime.config.schema import KeyPath, format_path, keys_of
from realtime.config.values import to_toml
from realtime.errors import SettingsError

_TOKEN = re.compile(
    r'''(?P<text>"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\]|\\.)*"|'[^']*')'''
    r"""|(?P<space>[ \t\r]+|\#[^\n]*)|(?P<mark>[][{}=,.\n])|(?P<bare>[^\s\[\]{}=,."'#]+)""",
    re.DOTALL,
)
_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
# Messages of tomllib, by their start, and plainer ones with a remedy.
_REWORDED = {
    "Cannot overwrite a value": "this key is already set above; keep one of the two",
    "Cannot declare": "this table is already defined above; merge the two",
    "Invalid value": "invalid value; put strings in quotes",
    "Exceeds the limit": "a number with too many digits",
}


def parse_toml(name: str, text: str) -> tuple[dict[str, Any], Callable[[KeyPath], str]]:
    """Return the tables of a file, and a function that returns file name and line of a path in it.

    Raises SettingsError with one line that names the file and, where known, the line.
    """
    if text.startswith("\ufeff"):
        raise SettingsError([f"{name}:1: starts with a byte order mark; save it as UTF-8 without one"])
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise SettingsError([f"{name}: not usable: nested too deeply; flatten it"]) from None
    except ValueError as error:  # TOMLDecodeError, and the limit on the digits of a number
        if text.lstrip().startswith("{"):  # no TOML file starts so
            remedy = f"convert it with: realtime gen-config --from {name} --config realtime.toml"
            raise SettingsError([f"{name}:1: JSON, but realtime reads TOML; {remedy}"]) from None
        raise SettingsError([_describe_error(name, text, str(error))]) from None
    lines = functools.cache(lambda: _LineScanner(text).lines)

    def locate(path: KeyPath) -> str:
        line = next(lines()[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines())
        return f"{name}:{line}"

    return tables, locate


def _describe_error(name: str, text: str, message: str) -> str:
    position = _POSITION.search(message)
    line = int(position[1] or text.count("\n") + 1) if position else None
    message = message[: position.start()] if position else message
    message = next((reworded for start, reworded in _REWORDED.items() if message.startswith(start)), message)
    return f"{name}{f':{line}' if line else ''}: not valid TOML: {message[:1].lower()}{message[1:]}"


class _LineScanner:
    """Finds the line of every key, table and array item in valid TOML. lines: by path."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._lengths: dict[KeyPath, int] = {}  # of arrays of tables
        self._tokens = list(_tokens(text))
        self._tokens.reverse()
        table: KeyPath = ()
        while self._tokens:
            if self._accept("["):
                table = self._scan_header()
            elif not self._accept("\n"):
                self._scan_assignment(table)

    def _accept(self, mark: str) -> bool:
        """Consume the next token if it is this mark."""
        if self._tokens and self._tokens[-1][:2] == ("mark", mark):
            self._tokens.pop()
            return True
        return False

    def _scan_key(self) -> tuple[tuple[str, ...], int]:
        """Consume a dotted key and the mark after it; return the key's parts and line."""
        line = self._tokens[-1][2]
        parts: list[str] = []
        while True:
            kind, text, _ = self._tokens.pop()
            if kind == "mark" and text != ".":
                return tuple(parts), line
            if kind != "mark":
                parts.append(text if kind == "bare" else tomllib.loads(f"k={text}")["k"])

    def _scan_header(self) -> KeyPath:
        """Consume [a.b] or [[a.b]] after its first bracket; return the path of the table that it opens."""
        is_array = self._accept("[")
        parts, line = self._scan_key()
        path: KeyPath = ()
        for place, part in enumerate(parts, 1):
            path = (*path, part)
            self.lines.setdefault(path, line)
            # A part that names an array of tables means its last table; the last part of [[a.b]] opens another.
            if path in self._lengths and not (is_array and place == len(parts)):
                path = (*path, self._lengths[path] - 1)
        if is_array:
            self._accept("]")
            index = self._lengths.get(path, 0)
            self._lengths[path] = index + 1
            path = (*path, index)
            self.lines[path] = line
        return path

    def _scan_assignment(self, table: KeyPath) -> None:
        parts, line = self._scan_key()
        for end in range(1, len(parts) + 1):
            self.lines.setdefault((*table, *parts[:end]), line)
        self._scan_value((*table, *parts))

    def _scan_value(self, path: KeyPath) -> None:
        if self._accept("["):
            index = 0
            while not self._accept("]"):
                if not self._accept("\n") and not self._accept(","):
                    self.lines[(*path, index)] = self._tokens[-1][2]
                    self._scan_value((*path, index))
                    index += 1
        elif self._accept("{"):
            while not self._accept("}"):
                if not self._accept("\n") and not self._accept(","):
                    self._scan_assignment(path)
        else:
            # Points and spaces split numbers and dates into several tokens.
            while self._tokens and (self._tokens[-1][0] != "mark" or self._tokens[-1][1] == "."):
                self._tokens.pop()


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield kind, text and line of each token but white space and comments."""
    line = 1
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup or "", match[0]
        if kind != "space":
            yield kind, token, line
        line += token.count("\n")


def commented_lines(table: type[Struct], given: Mapping[str, Any], path: KeyPath = ()) -> Iterator[str]:
    """Yield the lines of a file with every key of a tree and its help text.

    given: values by dotted key; their keys are set. Every other key is a comment with its default; without its leading
    `#`, that line is valid TOML too.
    """
    known = keys_of(table)
    values = {name: key for name, key in known.items() if key.table is None}
    if path:
        yield from _comment(table.__doc__)
        yield f"[{format_path(path)}]"
    for name, key in values.items():
        dotted = format_path((*path, name))
        yield from _comment(key.help)
        if dotted in given:
            yield f"{name} = {to_toml(key.value_type.to_file(given[dotted]))}"
        else:
            yield f"#{name} = {to_toml(key.value_type.to_file(key.default))}"
    if values:
        yield ""
    for name, key in known.items():
        if key.table is not None and not key.is_list:
            yield from commented_lines(key.table, given, (*path, name))
        elif key.table is not None:
            yield from _comment(key.help)
            yield f"#[[{format_path((*path, name))}]]"
            for option, required in keys_of(key.table).items():
                if required.default is NODEFAULT:
                    yield f"#{option} = {to_toml(required.example)}"
            yield ""


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", 118, initial_indent="# ", subsequent_indent="# ")
