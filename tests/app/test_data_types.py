"""Typed data: what an annotation accepts, what the client is told, and which annotations are mistakes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import pytest
from msgspec import Meta, Struct

from realtime.app import App
from realtime.errors import ClientError
from tests.app.declaring import line_of, problem


class Order(Struct):
    article: str
    number: Annotated[int, Meta(ge=1)] = 1


@dataclass
class Point:
    x: float
    y: float


class Move(TypedDict):
    piece: str
    to: list[int]


def convert(app: App, function: Any, data: Any) -> Any:
    """Declare a handler and return the last of the arguments that it gets."""
    app.rpc("f")(function)
    return app.handlers("rpc")["f"].take((None, data))[-1]


def of_struct(client: Any, data: Order) -> None: ...


def of_dataclass(data: Point) -> None: ...


def of_typed_dict(client: Any, whatever: Move) -> None: ...


def of_numbers(data: dict[int, int] | None) -> None: ...


@pytest.mark.parametrize(
    ("function", "data", "expected"),
    [
        (of_struct, {"article": "pen", "number": 3}, Order("pen", 3)),
        (of_struct, b'{"article":"pen"}', Order("pen")),  # of a client that speaks Protobuf
        (of_dataclass, {"x": 1, "y": 2.5}, Point(1, 2.5)),
        (of_typed_dict, {"piece": "knight", "to": [6, 3]}, {"piece": "knight", "to": [6, 3]}),
        (of_numbers, {"1": 2}, {1: 2}),
        (of_numbers, None, None),
        (functools.partial(of_struct, None), {"article": "pen"}, Order("pen")),
    ],
)
def test_data_become_what_the_annotation_says(app: App, function: Any, data: Any, expected: Any) -> None:
    assert convert(app, function, data) == expected


@pytest.mark.parametrize(
    ("function", "data", "message"),
    [
        (of_struct, {"article": "pen", "number": "3"}, "Expected `int`, got `str` - at `$.number`"),
        (of_struct, {"article": "pen", "number": 0}, "Expected `int` >= 1 - at `$.number`"),
        (of_struct, {}, "Object missing required field `article`"),
        (of_struct, None, "Expected `object`, got `null`"),
        (of_struct, b"{", "Input data was truncated"),
        (of_typed_dict, {"piece": "knight", "to": [6, "3"]}, "Expected `int`, got `str` - at `$.to[1]`"),
    ],
)
def test_other_data_are_refused_with_the_place_of_the_mistake(app: App, function: Any, data: Any, message: str) -> None:
    with pytest.raises(ClientError) as caught:
        convert(app, function, data)
    assert (caught.value.code, caught.value.message, caught.value.temporary) == (400, message, False)


def of_anything(client: Any, data: Any) -> None: ...
def of_bytes(data: bytes) -> None: ...
def without_annotation(data): ...  # type: ignore[no-untyped-def]
def of_all(*args: Order) -> None: ...


@pytest.mark.parametrize("function", [of_anything, of_bytes, without_annotation, of_all])
def test_other_annotations_leave_data_as_they_are(app: App, function: Any) -> None:
    app.rpc("f")(function)
    assert app.handlers("rpc")["f"].convert is None


def of_class(data: Order | Point) -> None: ...
def of_unknown(data: Unknown) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def test_an_annotation_that_is_no_type_of_data_is_a_mistake(app: App) -> None:
    line = problem(lambda: app.rpc("f")(of_class))
    assert line.startswith(f"{line_of(of_class)}: rpc f: data can't be converted to the type of data: ")
    line = problem(lambda: app.rpc("f")(of_unknown))
    assert line == (
        f"{line_of(of_unknown)}: rpc f: the type of data, Unknown, can't be resolved: name 'Unknown' is not defined"
    )
