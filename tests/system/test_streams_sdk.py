"""Streams by the official SDK, in Node and in headless Chromium, and by readers that know nothing but HTTP.

The server has two workers, and a request goes to either: what a client sends reaches its session all the same.
"""

from __future__ import annotations

import http.client
import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import jwt
import pytest

from tests.system.serving import Server, ServerStarter, run_node, wait_until

MANY = 40
EVERYTHING = {name: {"enabled": True} for name in ("sse", "http_stream", "uni_sse", "uni_http_stream", "init")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that leave it as it was."""
    starter = ServerStarter(tmp_path_factory.mktemp("streams"))
    yield starter(**EVERYTHING, client={"ping_interval": "2s", "pong_timeout": "1900ms"})
    starter.finish()


def token(**claims: object) -> str:
    return jwt.encode(claims, "secret", algorithm="HS256")


def pid(server: Server) -> int:
    """Of the worker that takes the next connection."""
    with urllib.request.urlopen(f"{server.http}/pid", timeout=10) as response:
        return json.load(response)["pid"]


def check(seen: dict[str, Any], transport: str, many: int) -> None:
    """What every client must have seen, wherever it ran."""
    assert seen["transports"] == [transport, transport]
    assert seen["inOrder"] and seen["complete"]
    assert seen["echoed"] == {"text": "ü", "list": [1, None]}
    assert seen["refused"] == {"code": 1234, "message": "refused on purpose"}
    assert seen["presence"] == ["ada", "bob"]
    assert seen["history"] == [2 * many, 2 * many - 1]
    assert seen["recovery"] == {"wasRecovering": True, "recovered": True}
    assert seen["heard"] == 2 * many + 6
    assert seen["lost"] == []


@pytest.mark.node
def test_node_with_a_connection_for_every_command(server: Server) -> None:
    wait_until(lambda: {pid(server) for _ in range(20)} == set(server.workers()), "connections at both workers")
    tokens = {"brief": token(sub="7", exp=int(time.time()) + 3), "renewed": token(sub="7", exp=int(time.time()) + 3600)}
    seen = run_node("streams.mjs", server.http, MANY, tokens)

    check(seen, "http_stream", MANY)
    assert set(seen["statuses"]) == {"204"}
    assert seen["statuses"]["204"] > 2 * MANY
    assert seen["renewed"] == {"renewals": 1, "user": "7"}
    assert seen["final"] == {"code": 3500, "reason": "invalid token"}
    assert (seen["fallback"], seen["answered"]) == ("http_stream", "by the other way")


@pytest.mark.node
def test_a_worker_killed_mid_stream_costs_no_message(server: Server) -> None:
    seen = run_node("killing.mjs", server.http, 200, 0)

    assert seen["accepted"] == 200
    assert seen["missing"] == []
    assert seen["backwards"] == 0
    assert all(context["recovered"] for context in seen["subscribed"][1:] + seen["speakerSubscribed"][1:])
    assert len(seen["subscribed"]) == 2
    wait_until(lambda: len(server.workers()) == 2, "a new worker in the slot")


@pytest.mark.browser
@pytest.mark.node
def test_chromium(server: Server) -> None:
    other = server.http.replace("127.0.0.1", "localhost")
    seen = run_node("streams_page.mjs", server.http, other, 10)

    for name, transport in {
        "http_stream": "http_stream",
        "sse": "sse",
        "elsewhere": "sse",
        "fallback": "http_stream",
    }.items():
        check(seen[name], transport, 10)


class Reader:
    """A plain reader of a stream, in lines."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.response = response

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Any:
        """The next push."""
        while True:
            line = self.response.readline()
            assert line, "the stream is over"
            if line.strip():
                return json.loads(line.removeprefix(b"data: "))

    def find(self, kind: str) -> Any:
        """The next push of this kind."""
        return next(push[kind] for push in self if kind in push)

    @property
    def is_over(self) -> bool:
        return self.response.read().strip() == b""


@contextmanager
def reading(server: Server, method: str, path: str, body: str | None = None) -> Iterator[Reader]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path, body)
    response = connection.getresponse()
    assert response.status == 200
    try:
        yield Reader(response)
    finally:
        connection.close()


def test_requests_of_one_client_are_carried_out_in_order(server: Server) -> None:
    """They go to both workers by turns; the client waits for the response to each, and not for its reply."""
    connect = json.dumps({"id": 1, "connect": {"token": token(sub="42", channels=["stream:order"])}})
    with reading(server, "POST", "/connection/http_stream", connect) as reader:
        told = next(reader)["connect"]
        for number in range(60):
            command = {"id": number + 2, "publish": {"channel": "stream:order", "data": number}}
            body = {"session": told["session"], "node": told["node"], "data": json.dumps(command)}
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            connection.request("POST", "/emulation", json.dumps(body))
            assert connection.getresponse().status == 204
            connection.close()
        heard: list[int] = []
        while len(heard) < 60:
            pub = next(reader).get("push", {}).get("pub")
            heard += [pub["data"]] if pub else []
        assert heard == list(range(60))


def test_plain_readers(start_server: ServerStarter) -> None:
    server = start_server(**EVERYTHING)
    request = json.dumps({"token": token(sub="42", channels=["stream:plain"])})
    with (
        reading(server, "GET", f"/connection/uni_sse?cf_connect={quote(request)}") as events,
        reading(server, "POST", "/connection/uni_http_stream", request) as lines,
    ):
        for reader in (events, lines):
            connect = next(reader)["connect"]
            assert list(connect["subs"]) == ["stream:plain"]
            assert connect["session"]
        for number in range(3):
            publish(server, "stream:plain", number)
        for reader in (events, lines):
            assert [reader.find("pub")["data"] for _ in range(3)] == [0, 1, 2]
        server.process.send_signal(signal.SIGTERM)
        for reader in (events, lines):
            assert reader.find("disconnect") == {"code": 3001, "reason": "shutdown"}
            assert reader.is_over


def publish(server: Server, channel: str, data: Any) -> None:
    """By the server API."""
    request = urllib.request.Request(
        f"{server.http}/api/publish",
        json.dumps({"channel": channel, "data": data}).encode(),
        {"X-API-Key": "test-key", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        assert "error" not in json.load(response)
