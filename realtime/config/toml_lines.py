"""The text of a configuration file: on which line a key stands, and how a tree of settings is written down.

The standard library's parser gives tables without positions. Here the same text, already known to be valid TOML 1.0,
is gone through once more for the lines, and only when there is something to report.
"""

from __future__ import annotations

import functools
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import NODEFAULT, Struct

from realtime.config.reader import KeyPath, dotted, keys, written
from realtime.errors import SettingsError

_TOKEN = re.compile(
    r'''(?P<text>"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\]|\\.)*"|'[^']*')'''
    r"""|(?P<space>[ \t\r]+|\#[^\n]*)|(?P<mark>[][{}=,.\n])|(?P<bare>[^\s\[\]{}=,."'#]+)""",
    re.DOTALL,
)
_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_ADVICE = {
    "Cannot overwrite a value": "this key is already set further up; keep one of the two",
    "Cannot declare": "this table is already there further up; join the two",
    "Invalid value": "invalid value; text stands in quotes",
    "Exceeds the limit": "a number of too many digits",
}


def tables(name: str, text: str) -> tuple[dict[str, Any], Callable[[KeyPath], str]]:
    """What a file holds, and a function that names the file and line of a path in it.

    Raises SettingsError with one line, which names the file and, where it is known, the line.
    """
    if text.startswith("\ufeff"):
        raise SettingsError([f"{name}:1: starts with a byte order mark; save it as UTF-8 without one"])
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise SettingsError([f"{name}: not usable: nested too deeply; flatten it"]) from None
    except ValueError as error:  # TOMLDecodeError, and the limit on the digits of a number
        raise SettingsError([_refusal(name, text, str(error))]) from None
    lines = functools.cache(lambda: _Lines(text).found)

    def where(path: KeyPath) -> str:
        line = next(lines()[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines())
        return f"{name}:{line}"

    return found, where


def _refusal(name: str, text: str, says: str) -> str:
    position = _POSITION.search(says)
    line = int(position[1] or text.count("\n") + 1) if position else None
    says = says[: position.start()] if position else says
    says = next((advice for start, advice in _ADVICE.items() if says.startswith(start)), says)
    return f"{name}{f':{line}' if line else ''}: not valid TOML: {says[:1].lower()}{says[1:]}"


class _Lines:
    """The line of every key, table and array item in valid TOML: `found`, by path."""

    def __init__(self, text: str) -> None:
        self.found: dict[KeyPath, int] = {}
        self._lengths: dict[KeyPath, int] = {}
        self._tokens = list(_tokens(text))
        self._tokens.reverse()
        table: KeyPath = ()
        while self._tokens:
            if self._skip("["):
                table = self._header()
            elif not self._skip("\n"):
                self._assignment(table)

    def _skip(self, mark: str) -> bool:
        """Step over the next token if it is this mark."""
        if self._tokens and self._tokens[-1][:2] == ("mark", mark):
            self._tokens.pop()
            return True
        return False

    def _key(self) -> tuple[tuple[str, ...], int]:
        """The parts of a key and its line; the mark after it is stepped over."""
        line = self._tokens[-1][2]
        parts: list[str] = []
        while True:
            kind, text, _ = self._tokens.pop()
            if kind == "mark" and text != ".":
                return tuple(parts), line
            if kind != "mark":
                parts.append(text if kind == "bare" else tomllib.loads(f"k={text}")["k"])

    def _header(self) -> KeyPath:
        """[a.b] or [[a.b]], from after the first bracket; gives the path that the keys below belong to."""
        repeated = self._skip("[")
        parts, line = self._key()
        path: KeyPath = ()
        for place, part in enumerate(parts, 1):
            path = (*path, part)
            self.found.setdefault(path, line)
            # A part that names an array of tables means the last of them; the end of [[a.b]] starts another.
            if path in self._lengths and not (repeated and place == len(parts)):
                path = (*path, self._lengths[path] - 1)
        if repeated:
            self._skip("]")
            index = self._lengths.get(path, 0)
            self._lengths[path] = index + 1
            path = (*path, index)
            self.found[path] = line
        return path

    def _assignment(self, table: KeyPath) -> None:
        parts, line = self._key()
        for end in range(1, len(parts) + 1):
            self.found.setdefault((*table, *parts[:end]), line)
        self._value((*table, *parts))

    def _value(self, path: KeyPath) -> None:
        if self._skip("["):
            index = 0
            while not self._skip("]"):
                if not self._skip("\n") and not self._skip(","):
                    self.found[(*path, index)] = self._tokens[-1][2]
                    self._value((*path, index))
                    index += 1
        elif self._skip("{"):
            while not self._skip("}"):
                if not self._skip("\n") and not self._skip(","):
                    self._assignment(path)
        else:
            # Numbers and dates fall into several tokens, parted by points and spaces.
            while self._tokens and (self._tokens[-1][0] != "mark" or self._tokens[-1][1] == "."):
                self._tokens.pop()


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    line = 1
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup or "", match[0]
        if kind != "space":
            yield kind, token, line
        line += token.count("\n")


def commented(table: type[Struct], given: Mapping[str, Any], path: KeyPath = ()) -> Iterator[str]:
    """The lines of a file that shows every key of a tree, each with its explanation.

    A key of `given` (dotted) is set to the value there; every other stands as a comment, set to its default. Without
    its leading `#`, each of those lines is valid.
    """
    known = keys(table)
    values = {name: key for name, key in known.items() if key.table is None}
    if path:
        yield from _comment(table.__doc__)
        yield f"[{dotted(path)}]"
    for name, key in values.items():
        here = dotted((*path, name))
        yield from _comment(key.about)
        if here in given:
            yield f"{name} = {written(given[here])}"
        else:
            yield f"#{name} = {written(key.default)}"
    if values:
        yield ""
    for name, key in known.items():
        if key.table is not None and not key.many:
            yield from commented(key.table, given, (*path, name))
        elif key.table is not None:
            yield from _comment(key.about)
            yield f"#[[{dotted((*path, name))}]]"
            yield from (
                f"#{need} = {written(at.example)}" for need, at in keys(key.table).items() if at.default is NODEFAULT
            )
            yield ""


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", 118, initial_indent="# ", subsequent_indent="# ")
