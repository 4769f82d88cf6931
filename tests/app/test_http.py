"""Routes, static files, requests and responses of an application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from realtime.app import App, Request, Response
from realtime.errors import ClientError
from tests.app.declaring import line_of, problem


def test_static_directory_is_relative_to_the_file_that_declares_it(app: App) -> None:
    app.http.static("/tests", ".")
    [static] = app.http.statics
    assert (static.prefix, static.directory) == ("/tests/", Path(__file__).parent.resolve())


def test_static_mistakes(app: App, tmp_path: Path) -> None:
    assert "does not exist" in problem(lambda: app.http.static("/", "missing"))
    assert "must begin with a slash" in problem(lambda: app.http.static("files", tmp_path))
    app.http.static("/files", tmp_path)
    assert "a second time" in problem(lambda: app.http.static("/files/", tmp_path))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/{", "one is a whole segment, as in /rooms/{room}"),
        ("/item-{id}", "one is a whole segment"),
        ("/{a b}", "one is a whole segment"),
        ("/{id:float}", "choose one of int, str"),
        ("/{a}/{a:int}", "two parameters with the name 'a'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_the_line_of_the_declaration(app: App, path: str, reason: str) -> None:
    line = problem(lambda: app.http.get(path))
    assert reason in line
    assert __file__ in line


def test_two_routes_for_the_same_paths_are_refused_with_both_places(app: App) -> None:
    def first(request: Request) -> None: ...

    def second(request: Request) -> None: ...

    app.http.get("/rooms/{room}/{number:int}")(first)
    line = problem(lambda: app.http.get("/rooms/{name}/{place:int}")(second))
    assert line.startswith(line_of(second))
    assert line.endswith(f"as GET /rooms/{{room}}/{{number:int}}, declared at {line_of(first)}")
    # Another method, and another kind of parameter, is another route.
    app.http.put("/rooms/{name}/{place:int}")(second)
    app.http.get("/rooms/{name}/{place}")(second)


def test_mistakes_of_an_error_handler(app: App) -> None:
    def answer(request: Request, error: Any) -> None: ...

    async def waits(request: Request, error: Any) -> None: ...

    assert "needs a type of exceptions" in problem(lambda: app.http.on_error(answer))  # type: ignore[type-var, arg-type]
    assert "needs a type of exceptions" in problem(lambda: app.http.on_error(KeyboardInterrupt))  # type: ignore[type-var]
    assert problem(lambda: app.http.on_error(KeyError)(waits)).startswith(line_of(waits))
    takes_no_error: Any = lambda request: None  # noqa: E731
    assert "is called with (request, error)" in problem(lambda: app.http.on_error(KeyError)(takes_no_error))
    app.http.on_error(KeyError)(answer)
    line = problem(lambda: app.http.on_error(KeyError)(lambda request, error: None))
    assert line.endswith(f"a second time; the first is at {line_of(answer)}")


def test_json_of_a_request() -> None:
    def request(body: bytes) -> Request:
        return Request("POST", "/", {}, {}, body)

    assert request(b'{"a":[1]}').json() == {"a": [1]}
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(ClientError) as caught:
            request(body).json()
        assert caught.value.code == 107
    assert Response().status == 200


class Order(msgspec.Struct):
    article: str
    number: int = 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"article":1}', "Expected `str`, got `int` - at `$.article`"),
        (b"{}", "Object missing required field `article`"),
        (b"{", "Input data was truncated"),
    ],
)
def test_typed_json_of_a_request(body: bytes, message: str) -> None:
    assert Request("POST", "/", {}, {}, b'{"article":"pen"}').json(Order) == Order("pen")
    assert Request("POST", "/", {}, {}, b"[1]").json(list[int] | None) == [1]
    with pytest.raises(ClientError) as caught:
        Request("POST", "/", {}, {}, body).json(Order)
    assert (caught.value.code, caught.value.message) == (400, message)


def test_a_requests_key_tells_users_apart() -> None:
    def key(**changes: Any) -> Any:
        fields = {"method": "GET", "path": "/", "query": {"b": "2", "a": "1"}, "headers": {"accept": "x"}, "body": b""}
        return Request(**{**fields, **changes}).cache_key()

    assert key() == key(query={"a": "1", "b": "2"}, headers={"accept": "y"}, remote_address="1.2.3.4")
    different = [
        key(),
        key(path="/a"),
        key(query={"a": "1"}),
        key(headers={"cookie": "id=1"}),
        key(headers={"authorization": "id=1"}),
        key(body=b"1"),
        key(method="HEAD"),
    ]
    assert len(set(different)) == len(different)
