"""Tags filters: the meaning of each comparison, and the refusal of invalid trees."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from realtime.pubsub.filters import MAX_DEPTH, MAX_NODES, compiled


class Node(Struct):
    op: str = ""
    key: str = ""
    cmp: str = ""
    val: str = ""
    vals: list[str] = []
    nodes: list[Node] = []


def leaf(cmp: str, val: str | list[str] = "", key: str = "price") -> Node:
    return Node(key=key, cmp=cmp, vals=val) if isinstance(val, list) else Node(key=key, cmp=cmp, val=val)


@pytest.mark.parametrize(
    ("cmp", "val", "wanted", "unwanted"),
    [
        ("eq", "10", ["10"], ["10.0", "", None]),
        ("neq", "10", ["11", "", None], ["10"]),
        ("in", ["10", "20"], ["10", "20"], ["1", "", None]),
        ("in", ["", "20"], ["", None], ["1"]),
        ("nin", ["10", "20"], ["1", "", None], ["10", "20"]),
        ("nin", ["", "20"], ["1"], ["20", "", None]),
        ("ex", "", ["", "1"], [None]),
        ("nex", "", [None], ["", "1"]),
        ("sw", "ab", ["ab", "abc"], ["cab", "", None]),
        ("ew", "ab", ["ab", "cab"], ["abc", "", None]),
        ("ct", "ab", ["ab", "cabc"], ["a", "b", "", None]),
        ("gt", "10", ["10.01", "11", "100"], ["10", "9", "-11", "", None]),
        ("gte", "10", ["10", "10.0", "+11"], ["9.99", "-10", None]),
        ("lt", "10", ["9", "-100", "9.9999999999999999999999"], ["10", "11", "", None]),
        ("lte", "10.5", ["10.5", "10.50", ".5"], ["10.51", None]),
        ("lt", "10", [], ["1e0", "1_0", "0x1", "nan", "-inf", " 1", "1 ", "\u0661", "1.2.3", "."]),
        ("gt", "cheap", [], ["10", "cheaper", "", None]),
    ],
)
def test_comparisons(cmp: str, val: Any, wanted: list[str | None], unwanted: list[str | None]) -> None:
    test = compiled(leaf(cmp, val))
    assert [tag for tag in wanted if not test({} if tag is None else {"price": tag, "other": "10"})] == []
    assert [tag for tag in unwanted if test({} if tag is None else {"price": tag, "other": "10"})] == []
    assert test(None) is test({})


def test_comparisons_are_exact_where_floats_are_not() -> None:
    assert compiled(leaf("gt", "9007199254740992"))({"price": "9007199254740993"})


CHEAP, NEW = leaf("lt", "10"), leaf("ex", key="new")
DEAR = [(15, True), (15, False)]


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        (Node("and", nodes=[CHEAP, NEW]), [(5, True)]),
        (Node("or", nodes=[CHEAP, NEW]), [(5, True), (5, False), (15, True)]),
        (Node("not", nodes=[CHEAP]), DEAR),
        (Node("and", nodes=[CHEAP, Node("not", nodes=[NEW])]), [(5, False)]),
        (Node("or", nodes=[Node("and", nodes=[CHEAP, NEW]), Node("not", nodes=[CHEAP])]), [(5, True), *DEAR]),
    ],
)
def test_operations(tree: Node, wanted: list[tuple[int, bool]]) -> None:
    test = compiled(tree)
    tags = {
        (price, new): {"price": str(price)} | ({"new": ""} if new else {}) for price in (5, 15) for new in (True, False)
    }
    assert [case for case, these in tags.items() if test(these)] == wanted


@pytest.mark.parametrize(
    "tree",
    [
        Node(),
        leaf("like", "1"),
        leaf("eq"),
        leaf("gt"),
        leaf("eq", ["1"]),
        Node(key="price", cmp="eq", val="1", vals=["1"]),
        leaf("in"),
        leaf("nin", "1"),
        Node(key="price", cmp="in", val="1", vals=["1"]),
        leaf("ex", "1"),
        leaf("nex", ["1"]),
        leaf("eq", "1", key=""),
        leaf("in", ["1"], key=""),
        Node("xor", nodes=[CHEAP]),
        Node("and"),
        Node("or"),
        Node("not"),
        Node("not", nodes=[CHEAP, NEW]),
        Node("or", nodes=[CHEAP, leaf("like", "1")]),
    ],
)
def test_invalid_trees_are_refused(tree: Node) -> None:
    with pytest.raises(ValueError):
        compiled(tree)


def nested(levels: int) -> Node:
    tree = CHEAP
    for _ in range(levels - 1):
        tree = Node("not", nodes=[tree])
    return tree


def test_the_size_of_a_tree_is_limited() -> None:
    compiled(nested(MAX_DEPTH))
    compiled(Node("or", nodes=[CHEAP] * (MAX_NODES - 1)))
    for large in (nested(MAX_DEPTH + 1), nested(5_000), Node("or", nodes=[CHEAP] * MAX_NODES)):
        with pytest.raises(ValueError):
            compiled(large)
    compiled(nested(3), max_depth=3)
    with pytest.raises(ValueError, match=r"client\.max_filter_depth"):
        compiled(nested(4), max_depth=3)


TEXTS = st.sampled_from(["", "a", "ab", "1", "2.5", "eq", "in", "gt", "ex"])
NODES = st.recursive(
    st.builds(Node, op=st.just(""), key=TEXTS, cmp=TEXTS, val=TEXTS, vals=st.lists(TEXTS, max_size=2)),
    lambda nodes: st.builds(Node, op=st.sampled_from(["and", "or", "not", "no"]), nodes=st.lists(nodes, max_size=3)),
    max_leaves=8,
)


@given(NODES, st.none() | st.dictionaries(TEXTS, TEXTS))
def test_any_tree_is_refused_or_compiles(tree: Node, tags: dict[str, str] | None) -> None:
    try:
        test = compiled(tree)
    except ValueError:
        return
    assert test(tags) is compiled(Node("not", nodes=[Node("not", nodes=[tree])]))(tags)
