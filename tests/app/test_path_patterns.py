"""Paths with parameters: which pattern a path matches, and the values of its parameters."""

from __future__ import annotations

import random

import pytest

from realtime.app.path_patterns import PathTree, parse_pattern

PATTERNS = [
    "/rooms/{room}",
    "/rooms/{number:int}",
    "/rooms/new",
    "/rooms/{room}/messages/{number:int}",
    "/{kind}/new/messages/{text}",
    "/rooms/{room}/",
]


@pytest.fixture(params=range(3))
def tree(request: pytest.FixtureRequest) -> PathTree[str]:
    """The patterns, added in three orders: the order has no meaning."""
    tree: PathTree[str] = PathTree()
    for path in random.Random(request.param).sample(PATTERNS, len(PATTERNS)):
        tree.add(parse_pattern(path), path)
    return tree


@pytest.mark.parametrize(
    ("path", "pattern", "parameters"),
    [
        ("/rooms/blue", "/rooms/{room}", {"room": "blue"}),
        ("/rooms/new", "/rooms/new", {}),
        ("/rooms/12", "/rooms/{number:int}", {"number": 12}),
        ("/rooms/-3", "/rooms/{number:int}", {"number": -3}),
        ("/rooms/%31", "/rooms/{number:int}", {"number": 1}),
        ("/rooms/" + "9" * 18, "/rooms/{number:int}", {"number": 10**18 - 1}),
        ("/rooms/" + "9" * 19, "/rooms/{room}", {"room": "9" * 19}),
        ("/rooms/1_0", "/rooms/{room}", {"room": "1_0"}),
        ("/rooms/%D9%A1", "/rooms/{room}", {"room": "\u0661"}),  # a digit, but not of ASCII
        ("/rooms/gr%C3%BCn+1", "/rooms/{room}", {"room": "gr\u00fcn+1"}),
        ("/rooms/a%2Fb", "/rooms/{room}", {"room": "a/b"}),
        ("/rooms/new%2Fmessages", "/rooms/{room}", {"room": "new/messages"}),
        ("/rooms/%2525", "/rooms/{room}", {"room": "%25"}),
        ("/rooms/blue/", "/rooms/{room}/", {"room": "blue"}),
        ("/rooms/new/messages/7", "/rooms/{room}/messages/{number:int}", {"room": "new", "number": 7}),
        # The literal `rooms` leads to no route for this path: the search goes on with the parameter.
        ("/rooms/new/messages/x", "/{kind}/new/messages/{text}", {"kind": "rooms", "text": "x"}),
    ],
)
def test_a_path_has_the_most_special_pattern(
    tree: PathTree[str], path: str, pattern: str, parameters: dict[str, object]
) -> None:
    assert tree.find(path) == (pattern, parameters)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/rooms",
        "/rooms/",
        "/rooms//",
        "/rooms/%ff",
        "/rooms/%",
        "/rooms/%4",
        "/rooms/%zz",
        "/rooms%2Fblue",
        "/a/b",
    ],
)
def test_a_path_without_a_pattern(tree: PathTree[str], path: str) -> None:
    assert tree.find(path) is None
