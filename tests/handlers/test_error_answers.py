"""Which function answers an exception of an HTTP handler."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.app import App, Request
from realtime.handlers.error_answers import ErrorAnswer, with_answers


@pytest.fixture
def app() -> App:
    return App()


class Missing(LookupError):
    pass


REQUEST = Request("GET", "/", {}, {}, b"")


@pytest.mark.parametrize(
    ("error", "body"), [(Missing("a"), b"missing"), (KeyError("a"), b"look-up"), (IndexError("a"), b"look-up")]
)
def test_the_nearest_type_answers(app: App, error: Exception, body: bytes) -> None:
    @app.http.get("/")
    def fail(request: Request) -> Any:
        raise error

    app.http.on_error(LookupError)(lambda request, error: "look-up")
    app.http.on_error(Missing)(lambda request, error: "missing")
    [handler] = app.handlers("http").values()
    with pytest.raises(ErrorAnswer) as caught:
        with_answers(handler, app.http.errors).function(REQUEST)
    assert caught.value.response.body == body
    assert caught.value.__cause__ is error


def test_other_exceptions_and_other_handlers_stay_as_they_are(app: App) -> None:
    @app.http.get("/")
    def fail(request: Request) -> Any:
        raise ValueError

    @app.rpc("a")
    def call(data: Any) -> None: ...

    app.http.on_error(LookupError)(lambda request, error: "")
    [route], [rpc] = app.handlers("http").values(), app.handlers("rpc").values()
    with pytest.raises(ValueError):
        with_answers(route, app.http.errors).function(REQUEST)
    assert with_answers(rpc, app.http.errors) is rpc
    assert with_answers(route, {}) is route
