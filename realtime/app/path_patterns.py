"""Paths with parameters: the patterns of routes, and the search for the pattern that the path of a request matches.

A pattern is a path some of whose segments are parameters: `/rooms/{room}/messages/{number:int}`. A path is cut at its
slashes before its segments are decoded (RFC 3986 section 2.4), so an encoded slash, "%2F", never chooses the route: it
is a character of a parameter's value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar
from urllib.parse import unquote

Value = TypeVar("Value")

# Digits of an `int` parameter. Any such number fits into 64 bits.
MAX_DIGITS = 18

_PARAMETER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(?::([a-z]+))?\}")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_INTEGER = re.compile(rf"-?[0-9]{{1,{MAX_DIGITS}}}")


def _to_text(segment: str) -> str | None:
    if "%" not in segment:
        return segment or None
    if _BROKEN_ESCAPE.search(segment):
        return None
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError:
        return None


def _to_integer(segment: str) -> int | None:
    text = _to_text(segment)
    return int(text) if text and _INTEGER.fullmatch(text) else None


_KINDS: dict[str, Callable[[str], str | int | None]] = {"int": _to_integer, "str": _to_text}
"""The kinds of parameters, the narrower first: each converts a segment, or returns None if it does not match."""


class Parameter(NamedTuple):
    """A segment of a pattern that matches a segment of a path. kind: a key of `_KINDS`."""

    name: str
    kind: str


class PathPattern(NamedTuple):
    """The segments of a path: literals, compared as sent, and parameters."""

    segments: tuple[str | Parameter, ...]

    @property
    def shape(self) -> str:
        """The pattern without the names of its parameters: two patterns of one shape match the same paths."""
        return "/".join(part if isinstance(part, str) else f"{{:{part.kind}}}" for part in self.segments)

    @property
    def has_parameters(self) -> bool:
        """Whether any segment is a parameter."""
        return any(isinstance(part, Parameter) for part in self.segments)


def parse_pattern(path: str) -> PathPattern:
    """Return the pattern of a path. Raises ValueError, with the reason and a remedy."""
    segments: list[str | Parameter] = []
    names: set[str] = set()
    for part in path.split("/"):
        if "{" not in part and "}" not in part:
            segments.append(part)
            continue
        match = _PARAMETER.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{part!r} is no parameter; one is a whole segment, as in /rooms/{{room}} or /{{number:int}}"
            )
        name, kind = match[1], match[2] or "str"
        if kind not in _KINDS:
            raise ValueError(f"the parameter {name!r} has the kind {kind!r}; choose one of {', '.join(_KINDS)}")
        if name in names:
            raise ValueError(f"it has two parameters with the name {name!r}; rename one")
        names.add(name)
        segments.append(Parameter(name, kind))
    return PathPattern(tuple(segments))


class PathTree(Generic[Value]):
    """Values by pattern.

    Where several patterns match a path, the segments decide, from the left: a literal has precedence over an `int`
    parameter, which has precedence over a `str` parameter. The order of declaration does not matter.
    """

    def __init__(self) -> None:
        self._literals: dict[str, PathTree[Value]] = {}
        self._parameters: dict[str, PathTree[Value]] = {}  # by kind
        self._leaf: tuple[Value, tuple[str, ...]] | None = None

    def add(self, pattern: PathPattern, value: Value) -> None:
        """Add a value; another one of the same shape is replaced."""
        node = self
        for part in pattern.segments:
            if isinstance(part, str):
                node = node._literals.setdefault(part, PathTree())
            else:
                node = node._parameters.setdefault(part.kind, PathTree())
        node._leaf = value, tuple(part.name for part in pattern.segments if isinstance(part, Parameter))

    def find(self, path: str) -> tuple[Value, dict[str, str | int]] | None:
        """Return the value of the pattern that matches an encoded path, with the parameters; None if none does.

        An empty segment matches no parameter, and neither does one that is not UTF-8 when decoded. The search visits
        each node of the tree once at most.
        """
        found = self._search(path.split("/"), 0, ())
        if found is None:
            return None
        (value, names), values = found
        return value, dict(zip(names, values, strict=True))

    def _search(
        self, segments: list[str], place: int, values: tuple[str | int, ...]
    ) -> tuple[tuple[Value, tuple[str, ...]], tuple[str | int, ...]] | None:
        if place == len(segments):
            return None if self._leaf is None else (self._leaf, values)
        segment = segments[place]
        literal = self._literals.get(segment)
        if literal is not None and (found := literal._search(segments, place + 1, values)):
            return found
        for kind, convert in _KINDS.items():
            node = self._parameters.get(kind)
            if node is None or (value := convert(segment)) is None:
                continue
            if found := node._search(segments, place + 1, (*values, value)):
                return found
        return None
