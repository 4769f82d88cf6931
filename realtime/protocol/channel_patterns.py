"""Patterns for channel names, as the server API takes them: `*`, `?`, `[a-z]`, `[!a-z]` and `{this,that}`.

A pattern fits a whole name, and `*` also stands for the boundary of a namespace. `[*]` stands for the sign itself;
braces have no such spelling. Matching takes time linear in the name, whatever the pattern.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

MAX_LENGTH = 1024
"""Characters of the longest pattern."""

MAX_ALTERNATIVES = 100
"""Patterns without braces that one with braces may stand for."""


def matcher(pattern: str) -> Callable[[str], object]:
    """What is true of the names that fit; "" fits all. Raises ValueError for a pattern that can't be or is too long."""
    if not pattern:
        return lambda name: True
    if len(pattern) > MAX_LENGTH:
        raise ValueError("the pattern is too long")
    fits = [re.compile(fnmatch.translate(one)).match for one in _without_braces(pattern)]
    return fits[0] if len(fits) == 1 else lambda name: any(fit(name) for fit in fits)


def _without_braces(pattern: str) -> list[str]:
    """The patterns that together mean the same."""
    found: list[str] = []
    left = [pattern]
    while left:
        if len(found) + len(left) > MAX_ALTERNATIVES:
            raise ValueError("the pattern has too many alternatives")
        one = left.pop()
        if "{" in one:
            left += _alternatives(one)
        else:
            found.append(one)
    return found


def _alternatives(pattern: str) -> list[str]:
    """The pattern with each of the alternatives in its first braces, which may hold braces in turn."""
    opening = pattern.index("{")
    parts: list[str] = []
    depth, begin = 0, opening + 1
    for at in range(opening, len(pattern)):
        sign = pattern[at]
        depth += (sign == "{") - (sign == "}")
        if depth == 0 or (depth == 1 and sign == ","):
            parts.append(pattern[begin:at])
            begin = at + 1
        if depth == 0:
            return [pattern[:opening] + part + pattern[begin:] for part in parts]
    raise ValueError("a brace is not closed")
