"""Return values of handlers, and the results that callers get."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.app import Response
from realtime.handlers.results import JSON, TEXT, PreparedResponse, result_converter, status_response
from realtime.http.response import encode_response
from realtime.types import ConnectRequest, Credentials, Grant
from tests.driving import on_loop
from tests.handlers.bench import Bench, refusal


@pytest.mark.parametrize("run", ["loop", "thread"])
@on_loop
async def test_result_that_json_cannot_represent_is_an_error_of_the_handler(bench: Bench, run: str) -> None:
    @bench.app.rpc("f", run=run)
    def f(data: Any) -> Any:
        return object()

    await bench.start()
    assert (await refusal(bench.call("f"))).code == 100
    assert isinstance(bench.logged[0]["log_failure"].value, TypeError)


@on_loop
async def test_bytes_are_a_result_unchanged(bench: Bench) -> None:
    @bench.app.rpc("f")
    def f(data: Any) -> Any:
        return data + b"\xff"

    procedure = (await bench.start()).procedure("f")
    assert procedure is not None
    assert await procedure(bench.client, b"\x00") == b"\x00\xff"


@pytest.mark.parametrize("unit", ["x", b"x"])
@on_loop
async def test_result_over_the_limit_is_refused(bench: Bench, unit: str | bytes) -> None:
    @bench.app.rpc("f")
    def f(data: Any) -> Any:
        return unit * 1_100_000

    await bench.start()
    assert (await refusal(bench.call("f"))).code == 106


@on_loop
async def test_coroutine_returned_in_a_thread_is_an_error_of_the_handler(bench: Bench) -> None:
    async def work() -> None: ...

    @bench.app.rpc("f")
    def f(data: Any) -> Any:
        return work()

    await bench.start()
    assert (await refusal(bench.call("f"))).code == 100
    assert 'run="loop"' in str(bench.logged[0]["log_failure"].value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(None, None), (True, None), (Grant(data=1), Grant(data=1)), (False, 103), ("yes", 100), (0, 100)],
)
@on_loop
async def test_results_of_on_subscribe(bench: Bench, answer: Any, expected: Any) -> None:
    @bench.app.on_subscribe("chat:*")
    async def may(client: Any, channel: str, data: Any) -> Any:
        assert (channel, data) == ("chat:1", {"x": 1})
        return answer

    may_join = (await bench.start()).subscribing("chat:1")
    assert may_join is not None
    if isinstance(expected, int):
        assert (await refusal(may_join(bench.client, "chat:1", {"x": 1}))).code == expected
    else:
        assert await may_join(bench.client, "chat:1", {"x": 1}) == expected


@pytest.mark.parametrize("answer", [None, Credentials("ada"), "ada", Credentials(42), Credentials("\ud800")])
@on_loop
async def test_results_of_on_connecting(bench: Bench, answer: Any) -> None:
    @bench.app.on_connecting
    def who(request: ConnectRequest) -> Any:
        assert request.token == "t"
        return answer

    connecting = (await bench.start()).connecting
    assert connecting is not None
    if answer not in (None, Credentials("ada")):
        assert (await refusal(connecting(ConnectRequest(token="t")))).code == 100
    else:
        assert await connecting(ConnectRequest(token="t")) == answer


@on_loop
async def test_on_publish_replaces_the_data_or_leaves_it(bench: Bench) -> None:
    @bench.app.on_publish("chat:*")
    async def moderate(client: Any, channel: str, data: Any) -> Any:
        return data if data is None else {"text": data["text"].upper()}

    moderating = (await bench.start()).publishing("chat:1")
    assert moderating is not None
    assert await moderating(bench.client, "chat:1", None) is None
    assert bytes(await moderating(bench.client, "chat:1", {"text": "hi"})) == b'{"text":"HI"}'


# HTTP responses.


@pytest.mark.parametrize(
    ("value", "status", "content_type", "body"),
    [
        (None, 204, "", b""),
        ("text \u20ac", 200, TEXT, b"text \xe2\x82\xac"),
        (b"\x00\xff", 200, "application/octet-stream", b"\x00\xff"),
        ({"a": [1]}, 200, JSON, b'{"a":[1]}'),
        (Response(201, {}, "made"), 201, TEXT, b"made"),
        (Response(404, {}, b"no"), 404, "application/octet-stream", b"no"),
        (Response(304), 304, "", b""),
    ],
)
def test_results_of_http_handlers(value: Any, status: int, content_type: str, body: bytes) -> None:
    response = result_converter("http")(value)
    assert (response.status, response.type, response.body) == (status, content_type, body)


def test_headers_of_the_application_take_the_place_of_the_servers_but_do_not_frame() -> None:
    headers = {"server": "mine", "Content-Type": "text/csv", "Content-Length": "7", "X-Own": "1"}
    response = result_converter("http")(Response(200, headers, "a,b"))
    lines = headers_of(response)
    assert lines.pop("Date")
    assert lines == {
        "server": "mine",
        "Content-Type": "text/csv",
        "X-Content-Type-Options": "nosniff",
        "X-Own": "1",
        "Content-Length": "3",
    }


def test_response_without_a_body_has_no_length() -> None:
    assert "Content-Length" not in headers_of(status_response(304))
    assert headers_of(status_response(404, ("Allow", "GET")))["Allow"] == "GET"
    assert status_response(404).body == b"Not Found"


def test_kinds_without_a_result_leave_the_value_alone() -> None:
    value = object()
    assert result_converter("on_disconnected")(value) is value


def headers_of(response: PreparedResponse) -> dict[str, str]:
    """Return the headers with which the response is sent."""
    data = encode_response(response.status, response.type, response.headers, response.body)
    lines = data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}
