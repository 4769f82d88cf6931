"""Patterns for channel names in the server API: `*`, `?`, `[a-z]`, `[!a-z]` and `{this,that}`.

A pattern matches a whole name, and `*` also matches the boundary of a namespace. `[*]` matches a literal `*`; braces
can't be escaped. Matching takes time linear in the length of the name for every pattern.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

MAX_LENGTH = 1024
"""The longest pattern, in characters."""

MAX_ALTERNATIVES = 100
"""The largest number of patterns without braces to which one pattern expands."""


def compile_pattern(pattern: str) -> Callable[[str], object]:
    """Return a predicate for names that match; "" matches all. Raises ValueError for an invalid or too long pattern."""
    if not pattern:
        return lambda name: True
    if len(pattern) > MAX_LENGTH:
        raise ValueError("the pattern is too long")
    matches = [re.compile(fnmatch.translate(expanded)).match for expanded in _expand(pattern)]
    return matches[0] if len(matches) == 1 else lambda name: any(match(name) for match in matches)


def _expand(pattern: str) -> list[str]:
    """Return the patterns without braces that together match the same names."""
    expanded: list[str] = []
    pending = [pattern]
    while pending:
        if len(expanded) + len(pending) > MAX_ALTERNATIVES:
            raise ValueError("the pattern has too many alternatives")
        candidate = pending.pop()
        if "{" in candidate:
            pending += _alternatives(candidate)
        else:
            expanded.append(candidate)
    return expanded


def _alternatives(pattern: str) -> list[str]:
    """Return the pattern once for each alternative in its first braces. Alternatives may contain braces."""
    opening = pattern.index("{")
    parts: list[str] = []
    depth, start = 0, opening + 1
    for index in range(opening, len(pattern)):
        character = pattern[index]
        depth += (character == "{") - (character == "}")
        if depth == 0 or (depth == 1 and character == ","):
            parts.append(pattern[start:index])
            start = index + 1
        if depth == 0:
            return [pattern[:opening] + part + pattern[start:] for part in parts]
    raise ValueError("the pattern has an unclosed brace")
