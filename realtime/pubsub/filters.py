"""Tags filters: select the publications of a channel by their tags (client protocol, tags filter)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Protocol

Tags = Mapping[str, str]
Filter = Callable[[Tags | None], bool]

# A filter is called once for each publication and each subscriber, so its tree has to be small.
MAX_NODES = 256
MAX_DEPTH = 32


class FilterCondition(Protocol):
    """A condition: a comparison (`op` is ""), or "and", "or", "not" over `nodes`. `messages.FilterNode` is one."""

    @property
    def op(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def cmp(self) -> str: ...

    @property
    def val(self) -> str: ...

    @property
    def vals(self) -> Sequence[str]: ...

    @property
    def nodes(self) -> Sequence[FilterCondition]: ...


def compiled(node: FilterCondition, max_nodes: int = MAX_NODES, max_depth: int = MAX_DEPTH) -> Filter:
    """Compile a filter: a function from a publication's tags (None for no tags) to whether it passes.

    Raises ValueError for an invalid tree, and for a tree of more than `max_nodes` nodes or `max_depth` levels.
    """
    _check_size(node, max_nodes, max_depth)
    test = _compiled(node)
    return lambda tags: test(tags or {})


def _check_size(node: FilterCondition, max_nodes: int, max_depth: int) -> None:
    level: Sequence[FilterCondition] = [node]
    nodes = depth = 0
    while level:
        nodes, depth = nodes + len(level), depth + 1
        if nodes > max_nodes or depth > max_depth:
            raise ValueError(
                f"the filter has more than {max_nodes} nodes (client.max_filter_nodes) or {max_depth} levels"
                " (client.max_filter_depth)"
            )
        level = [child for parent in level for child in parent.nodes]


_Test = Callable[[Tags], bool]


def _compiled(node: FilterCondition) -> _Test:
    if not node.op:
        return _comparison(node)
    tests = [_compiled(child) for child in node.nodes]
    if node.op == "not" and len(tests) == 1:
        (test,) = tests
        return lambda tags: not test(tags)
    if node.op == "and" and tests:
        return lambda tags: all(test(tags) for test in tests)
    if node.op == "or" and tests:
        return lambda tags: any(test(tags) for test in tests)
    raise ValueError(f"the filter has an invalid operation over {len(tests)} nodes: {node.op!r}")


def _comparison(node: FilterCondition) -> _Test:
    key, cmp, val, vals = node.key, node.cmp, node.val, frozenset(node.vals)
    if cmp in ("ex", "nex"):
        _require(not val and not vals)
        return (lambda tags: key in tags) if cmp == "ex" else (lambda tags: key not in tags)
    _require(bool(key))
    if cmp in ("in", "nin"):
        _require(bool(vals) and not val)
        return (lambda tags: tags.get(key, "") in vals) if cmp == "in" else (lambda tags: tags.get(key, "") not in vals)
    _require(bool(val) and not vals)
    if cmp in _TEXT:
        compare = _TEXT[cmp]
        return lambda tags: key in tags and compare(tags[key], val)
    if cmp == "neq":
        return lambda tags: tags.get(key) != val
    _require(cmp in _ORDER)
    return _ordered(key, _ORDER[cmp], _decimal(val))


def _require(valid: bool) -> None:
    if not valid:
        raise ValueError("the filter has an unknown comparison, or values that do not fit it")


_TEXT: dict[str, Callable[[str, str], bool]] = {
    "eq": str.__eq__,
    "sw": str.startswith,
    "ew": str.endswith,
    "ct": str.__contains__,
}
_ORDER: dict[str, Callable[[Decimal, Decimal], bool]] = {
    "gt": Decimal.__gt__,
    "gte": Decimal.__ge__,
    "lt": Decimal.__lt__,
    "lte": Decimal.__le__,
}

# Plain decimal numbers only: with an exponent a short text could mean a very long number.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\Z")


def _decimal(text: str) -> Decimal | None:
    return Decimal(text) if _NUMBER.match(text) else None


def _ordered(key: str, compare: Callable[[Decimal, Decimal], bool], bound: Decimal | None) -> _Test:
    if bound is None:
        return lambda tags: False

    def test(tags: Tags) -> bool:
        number = _decimal(tags.get(key, ""))
        return number is not None and compare(number, bound)

    return test
