"""Streams over real sockets: each response to a request, messages, and each way in which a stream ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import pytest

from realtime.app import App, Request
from realtime.config import settings
from realtime.http.request import Refusal
from tests.transports.stage import PATH, Client, Echo, eventually, handshake
from tests.transports.streaming import (
    BODY_LIMIT,
    EMULATION,
    HTTP_STREAM,
    INIT,
    SSE,
    UNI_HTTP_STREAM,
    UNI_SSE,
    chunks,
    events,
    fields,
    get,
    lines,
    post,
    streaming,
)

HELLO = b'{"id":1}'
QUERY = f"?cf_connect={quote(HELLO.decode())}"
STREAMS = [SSE, HTTP_STREAM, UNI_SSE, UNI_HTTP_STREAM]
BINARY = "Content-Type: application/octet-stream"
PAGE = "Origin: https://app.example"
ANY_PAGE = settings.ClientSettings(allowed_origins=("*",))


# Responses to valid requests


@pytest.mark.parametrize(
    ("request_", "read"),
    [
        (get(SSE + QUERY), events),
        (post(SSE, HELLO), events),
        (get(UNI_SSE + QUERY), events),
        (post(UNI_SSE, HELLO), events),
        (post(HTTP_STREAM, HELLO), lines),
        (post(HTTP_STREAM, HELLO, "Content-Type: application/json"), lines),
        (post(UNI_HTTP_STREAM, HELLO), lines),
    ],
)
async def test_a_stream_carries_the_messages_of_the_session(
    request_: bytes, read: Callable[[Client], list[Any]]
) -> None:
    async with streaming() as stage:
        client = await stage.stream(request_)
        await eventually(lambda: len(read(client)) == 1)
        session = stage.sessions[0]
        assert session.received == [HELLO]
        session.connection.send(b'{"n":2}')
        session.connection.sink.deliver(session.connection.form.frame('{"n":"ü"}'.encode()))
        await eventually(lambda: len(read(client)) == 3)
        assert read(client) == [{"id": 1}, {"n": 2}, {"n": "ü"}]
        assert stage.gauge("realtime_connections") == 1
        client.leave()
        await eventually(lambda: session.ends == 1)


async def test_a_stream_of_protobuf() -> None:
    async with streaming() as stage:
        client = await stage.stream(post(HTTP_STREAM, b"\x02\x08\x01", BINARY))
        await eventually(lambda: chunks(client)[0] == b"\x02\x08\x01")
        stage.sessions[0].connection.close(3001, "shutdown")
        await eventually(lambda: chunks(client)[1])
        # Reply {push: {disconnect: {code: 3001, reason: "shutdown"}}}.
        assert chunks(client)[0] == b"\x02\x08\x01" + b"\x11\x22\x0f\x5a\x0d\x08\xb9\x17\x12\x08shutdown"
        client.leave()


async def test_response_headers_prevent_caching_and_buffering() -> None:
    async with streaming() as stage:
        client = await stage.stream(get(SSE + QUERY))
        head = fields(client)
        assert head["content-type"] == "text/event-stream; charset=utf-8"
        assert head["transfer-encoding"] == "chunked"
        assert head["x-accel-buffering"] == "no"
        assert head["cache-control"] == "private, no-cache, no-store, must-revalidate, max-age=0"
        assert (head["pragma"], head["expire"], head["connection"]) == ("no-cache", "0", "keep-alive")
        client.leave()
        other = await stage.stream(post(HTTP_STREAM, HELLO))
        assert fields(other)["content-type"] == "application/octet-stream"
        other.leave()


async def test_the_response_head_is_sent_before_the_first_message() -> None:
    async with streaming() as stage:
        stage.make_session = lambda connection, request: Silent(connection, request)
        client = await stage.stream(get(UNI_SSE))
        assert events(client) == []
        client.leave()


class Silent(Echo):
    def receive(self, payload: bytes) -> None:
        self.received.append(payload)


async def test_a_unidirectional_client_may_omit_its_message() -> None:
    async with streaming() as stage:
        stage.make_session = Silent
        for request in (get(UNI_SSE), post(UNI_SSE, b""), post(UNI_HTTP_STREAM, b"")):
            client = await stage.stream(request)
            await eventually(lambda: stage.sessions[-1].received == [b""])
            client.leave()
            await eventually(lambda: stage.streams.connections == 0)


async def test_secrets_are_random_and_name_the_worker() -> None:
    async with streaming() as stage:
        clients = [await stage.stream(post(path, HELLO)) for path in STREAMS for _ in range(3)]
        await eventually(lambda: len(stage.sessions) == 12)
        secrets = {session.connection.secret for session in stage.sessions}
        assert len(secrets) == 12
        assert all(secret.startswith("3.") and len(secret) > 30 for secret in secrets)
        for client in clients:
            client.leave()


async def test_the_session_gets_query_headers_and_client_address() -> None:
    async with streaming(client=settings.ClientSettings(trusted_proxies=("127.0.0.0/8",))) as stage:
        client = await stage.stream(
            get(f"{SSE}{QUERY}&a=1", "User-Agent: tests", "X-Forwarded-For: 9.9.9.9, 192.0.2.1, 127.0.0.9")
        )
        await eventually(lambda: len(stage.sessions) == 1)
        request = stage.sessions[0].request
        assert (request.path, request.query, request.remote_address) == (SSE, {"a": "1"}, "192.0.2.1")
        assert request.headers["user-agent"] == "tests"
        client.leave()
        socket = await stage.open("X-Forwarded-For: 192.0.2.2")
        await eventually(lambda: len(stage.sessions) == 2)
        assert stage.sessions[1].request.remote_address == "192.0.2.2"
        socket.leave()


async def address(request: Request) -> str:
    return request.remote_address


async def test_a_forwarded_address_of_an_untrusted_peer_is_ignored() -> None:
    app = App()
    app.http.get("/address")(address)
    async with streaming(app) as stage:
        spoofed = "X-Forwarded-For: 192.0.2.1"
        client = await stage.stream(get(SSE + QUERY, spoofed))
        socket = await stage.open(spoofed)
        page = await stage.request(get("/address", spoofed))
        await eventually(lambda: page.received.endswith(b"127.0.0.1"))
        assert {session.request.remote_address for session in stage.sessions} == {"127.0.0.1"}
        for peer in (client, socket, page):
            peer.leave()


async def test_an_http_handler_gets_the_address_behind_a_trusted_proxy() -> None:
    app = App()
    app.http.get("/address")(address)
    async with streaming(app, client=settings.ClientSettings(trusted_proxies=("127.0.0.1",))) as stage:
        page = await stage.request(get("/address", "X-Forwarded-For: 9.9.9.9", "X-Forwarded-For: 192.0.2.1"))
        await eventually(lambda: page.received.endswith(b"192.0.2.1"))
        page.leave()


# Bodies


@pytest.mark.parametrize("size", [1, BODY_LIMIT])
async def test_a_body_that_dribbles_in(size: int) -> None:
    async with streaming() as stage:
        body = b"x" * size
        client = await stage.connect(post(HTTP_STREAM, body)[: -len(body)])
        for place in range(0, size, 7):
            client.send(body[place : place + 7])
            await eventually(lambda: True)
        await eventually(lambda: client.status == 200)
        assert stage.sessions[0].received == [body]
        client.leave()


async def test_a_chunked_body() -> None:
    async with streaming() as stage:
        head = get(HTTP_STREAM, "Transfer-Encoding: chunked", method="POST")
        client = await stage.connect(head + b"4;x=y\r\n")
        client.send(HELLO[:4] + b"\r\n4\r\n" + HELLO[4:])
        client.send(b"\r\n0\r\nTrailer: 1\r\n\r\n")
        await eventually(lambda: lines(client) == [{"id": 1}] if client.status else False)
        client.leave()


@pytest.mark.parametrize(
    ("head", "body", "status", "kind"),
    [
        (["Content-Length: 1001"], b"", 413, "body_too_large"),
        (["Transfer-Encoding: chunked"], b"3e9\r\n", 413, "body_too_large"),
        (["Transfer-Encoding: chunked"], b"zzz\r\n", 400, "body_syntax"),
        (["Content-Length: 5", "Content-Encoding: gzip"], b"", 415, "body_encoding"),
        (["Content-Length: 0"], b"", 400, "stream"),
        ([], b"", 400, "stream"),
    ],
)
@pytest.mark.parametrize("path", [SSE, HTTP_STREAM])
async def test_the_status_of_a_refused_body(path: str, head: list[str], body: bytes, status: int, kind: str) -> None:
    async with streaming() as stage:
        client = await stage.request(get(path, *head, method="POST") + body)
        await eventually(lambda: client.lost)
        assert client.status == status
        assert fields(client)["connection"] == "close"
        assert stage.count(kind) == 1
        assert not stage.sessions


async def test_a_missing_body_has_a_deadline() -> None:
    async with streaming() as stage:
        client = await stage.connect(post(HTTP_STREAM, HELLO)[:-1])
        await eventually(lambda: stage.streams.connections == 1)
        stage.advance(9.5)
        assert not client.received
        stage.advance(1)
        await eventually(lambda: client.lost)
        assert client.status == 408
        assert stage.count("body_timeout") == 1


async def test_a_peer_that_ignores_a_refusal_is_aborted() -> None:
    async with streaming() as stage:
        peer = stage.open_socket(65536, get(HTTP_STREAM, "Transfer-Encoding: chunked", method="POST") + b"x\r\n")
        await eventually(lambda: stage.count("body_syntax") == 1)
        stage.advance(5.5)
        await eventually(lambda: stage.streams.connections == 0)
        peer.close()


async def test_a_peer_that_expects_100_continue_gets_it() -> None:
    async with streaming() as stage:
        expectant = get(HTTP_STREAM, "Content-Length: 8", "Expect: 100-continue", method="POST")
        client = await stage.request(expectant)
        assert client.status == 100
        del client.received[:]
        client.send(HELLO)
        await eventually(lambda: client.status == 200)
        client.leave()
        refused = await stage.request(expectant.replace(b": 8", b": 1001"))
        assert refused.status == 413
        refused.leave()


# Refused requests


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "PATCH"])
async def test_other_methods_are_405(path: str, method: str) -> None:
    async with streaming() as stage:
        client = await stage.request(get(path, method=method))
        assert client.status == 405
        assert fields(client)["allow"] == ("GET, POST, OPTIONS" if "sse" in path else "POST, OPTIONS")
        client.leave()


@pytest.mark.parametrize("path", [HTTP_STREAM, UNI_HTTP_STREAM])
async def test_http_stream_refuses_get(path: str) -> None:
    async with streaming() as stage:
        assert await stage.status(get(path + QUERY)) == 405


@pytest.mark.parametrize(
    "request_",
    [
        get(UNI_SSE + "?cf_connect=x"),
        get(UNI_SSE + "?cf_connect=%5B%5D"),
        post(UNI_SSE, b'{"token":5}'),
        post(UNI_HTTP_STREAM, b'{"data":}'),
        post(UNI_HTTP_STREAM, b'{"token":"\xff"}'),
    ],
)
async def test_a_one_way_stream_for_an_unreadable_request_is_400(request_: bytes) -> None:
    async with streaming() as stage:
        client = await stage.request(request_)
        await eventually(lambda: client.lost)
        assert client.status == 400
        assert stage.sessions == []


@pytest.mark.parametrize("query", ["", "?", "?cf_connect", "?cf_connect=", "?other=1"])
async def test_a_query_without_command_is_400(query: str) -> None:
    async with streaming() as stage:
        client = await stage.request(get(SSE + query))
        await eventually(lambda: client.lost)
        assert client.status == 400


@pytest.mark.parametrize("path", STREAMS)
async def test_http_1_0_gets_a_stream_without_chunks(path: str) -> None:
    # Faults 8.10: nginx speaks HTTP/1.0 to its upstreams unless it is configured otherwise.
    async with streaming() as stage:
        client = await stage.stream(post(path, HELLO).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert b"Transfer-Encoding" not in client.response
        assert fields(client)["connection"] == "close"
        stage.sessions[0].connection.send(b'{"id":3}')
        stage.sessions[0].connection.close(3001, "shutdown")
        await eventually(lambda: client.lost)
        content = bytes(client.received.partition(b"\r\n\r\n")[2])
        ending = b"\n\n" if "sse" in path else b"\n"
        assert ending in content
        assert b'{"id":3}' + ending in content
        assert content.endswith(b"}" + ending)


async def test_disabled_paths_are_404() -> None:
    off = {
        "sse": settings.SSESettings(),
        "http_stream": settings.HTTPStreamSettings(),
        "uni_sse": settings.UniSSESettings(),
    }
    async with streaming(
        **off, uni_http_stream=settings.UniHTTPStreamSettings(), init=settings.InitSettings()
    ) as stage:
        for path in (*STREAMS, EMULATION, INIT):
            assert await stage.status(post(path, HELLO)) == 404
            assert await stage.status(get(path, method="OPTIONS")) == 404


async def test_paths_are_configurable() -> None:
    async with streaming(uni_sse=settings.UniSSESettings(enabled=True, handler_prefix="/mine")) as stage:
        client = await stage.stream(get("/mine"))
        client.leave()
        assert await stage.status(get(UNI_SSE)) == 404


async def test_the_limit_of_connections_counts_all_transports() -> None:
    async with streaming(client=settings.ClientSettings(connection_limit=2)) as stage:
        socket = await stage.open()
        stream = await stage.stream(post(HTTP_STREAM, HELLO))
        for request in (post(SSE, HELLO), get(SSE + QUERY), handshake()):
            refused = await stage.request(request)
            assert refused.status == 503
            assert 3 <= int(fields(refused)["retry-after"]) <= 10
            refused.leave()
        assert stage.count("connection_limit") == 3
        stream.leave()
        await eventually(lambda: stage.streams.connections == 0)
        again = await stage.open()
        again.leave()
        socket.leave()


async def test_the_rate_of_new_connections_counts_all_transports() -> None:
    async with streaming(client=settings.ClientSettings(connection_rate_limit=4)) as stage:
        statuses = [await stage.status(request) for request in 3 * (post(HTTP_STREAM, HELLO), handshake())]
        assert statuses == [200, 101, 200, 101, 503, 503]
        assert stage.count("connection_rate") == 2
        stage.advance(0.5)
        statuses = [await stage.status(post(UNI_SSE, HELLO)) for _ in range(4)]
        assert statuses == [200, 200, 503, 503]


async def test_an_overloaded_worker_refuses_streams() -> None:
    async with streaming() as stage:
        stage.refusal = Refusal(503, "too busy", "pressure")
        refused = await stage.request(post(SSE, HELLO))
        assert refused.status == 503
        assert "retry-after" in fields(refused)
        refused.leave()


# Pages of other origins


@pytest.mark.parametrize("path", STREAMS)
async def test_a_page_of_another_origin_is_refused(path: str) -> None:
    async with streaming(client=settings.ClientSettings(allowed_origins=("https://app.example",))) as stage:
        client = await stage.stream(post(path, HELLO, PAGE))
        assert fields(client)["access-control-allow-origin"] == "https://app.example"
        assert fields(client)["access-control-allow-credentials"] == "true"
        client.leave()
        refused = await stage.request(post(path, HELLO, "Origin: https://evil.example"))
        assert refused.status == 403
        assert "access-control-allow-origin" not in fields(refused)
        refused.leave()
        assert stage.count("origin") == 1


@pytest.mark.parametrize("status", [400, 405, 413, 503])
async def test_a_refusal_has_cors_headers_for_an_allowed_origin(status: int) -> None:
    async with streaming(client=ANY_PAGE) as stage:
        stage.refusal = Refusal(503, "too busy", "pressure") if status == 503 else None
        refused = await stage.request(
            {
                400: post(HTTP_STREAM, b"", PAGE),
                405: get(HTTP_STREAM, PAGE),
                413: post(HTTP_STREAM, b"x" * 1001, PAGE),
                503: post(HTTP_STREAM, HELLO, PAGE),
            }[status]
        )
        assert refused.status == status
        assert fields(refused).get("access-control-allow-origin") == "https://app.example"
        refused.leave()


@pytest.mark.parametrize("path", [*STREAMS, EMULATION, INIT, PATH])
async def test_preflight_requests(path: str) -> None:
    async with streaming(client=ANY_PAGE) as stage:
        asked = get(path, PAGE, "Access-Control-Request-Headers: content-type", method="OPTIONS")
        client = await stage.request(asked)
        assert client.status == 204
        head = fields(client)
        assert head["access-control-allow-origin"] == "https://app.example"
        assert head["access-control-allow-credentials"] == "true"
        assert head["access-control-allow-headers"] == "content-type"
        assert head["access-control-max-age"] == "300"
        methods = "GET, POST, OPTIONS" if "sse" in path else "GET, OPTIONS" if path in (INIT, PATH) else "POST, OPTIONS"
        assert head["access-control-allow-methods"] == methods
        client.leave()
        refused = await stage.request(get(path, "Origin: null", method="OPTIONS"))
        assert refused.status == 403  # "*" does not include the origin "null"
        refused.leave()
    async with streaming() as stage:
        refused = await stage.request(asked)
        assert refused.status == 403
        assert "access-control-allow-origin" not in fields(refused)
        refused.leave()


async def test_a_stream_may_follow_a_preflight_request_on_one_connection() -> None:
    async with streaming(client=ANY_PAGE) as stage:
        client = await stage.request(get(HTTP_STREAM, PAGE, method="OPTIONS"))
        del client.received[:]
        client.send(get(INIT, PAGE))
        await eventually(lambda: client.received.endswith(b"{}"))
        assert client.status == 200
        del client.received[:]
        client.send(post(HTTP_STREAM, HELLO, PAGE))
        await eventually(lambda: client.status == 200 and lines(client) == [{"id": 1}])
        assert stage.gauge("realtime_http_connections") == 0
        # twisted.web is detached, so its idle timeout does not end the stream.
        stage.sessions[0].connection.send(b"{}")
        await eventually(lambda: len(lines(client)) == 2)
        client.leave()


async def test_a_websocket_may_follow_an_http_request_on_one_connection() -> None:
    async with streaming() as stage:
        client = await stage.request(get(INIT))
        await eventually(lambda: client.received.endswith(b"{}"))
        del client.received[:]
        client.send(handshake())
        await eventually(lambda: client.status == 101)
        await client.echo("hello")
        client.leave()


async def test_a_stream_waits_for_the_answer_to_an_earlier_request() -> None:
    app = App()

    release = asyncio.Event()

    @app.http.get("/later")
    async def later(request: Request) -> str:
        await release.wait()
        return "now"

    async with streaming(app) as stage:
        client = await stage.connect(get("/later") + post(HTTP_STREAM, HELLO))
        await eventually(lambda: stage.front.is_busy)
        assert not stage.sessions
        release.set()
        await eventually(lambda: bool(stage.sessions))
        assert client.received.count(b"HTTP/1.1 200 OK") == 2
        client.leave()


# Open streams and their end


async def test_further_requests_on_a_stream_connection_are_ignored() -> None:
    async with streaming() as stage:
        client = await stage.stream(post(HTTP_STREAM, HELLO) + get(INIT))
        client.send(post(HTTP_STREAM, b'{"id":2}') + b"\x00" * 100_000)
        stage.sessions[0].connection.send(b'{"id":3}')
        await eventually(lambda: len(lines(client)) == 2)
        assert lines(client) == [{"id": 1}, {"id": 3}]
        assert stage.sessions[0].received == [HELLO]
        client.leave()


@pytest.mark.parametrize(
    ("path", "read", "push"),
    [
        (SSE, events, {"push": {"disconnect": {"code": 3001, "reason": "shutdown"}}}),
        (HTTP_STREAM, lines, {"push": {"disconnect": {"code": 3001, "reason": "shutdown"}}}),
        (UNI_SSE, events, {"disconnect": {"code": 3001, "reason": "shutdown"}}),
        (UNI_HTTP_STREAM, lines, {"disconnect": {"code": 3001, "reason": "shutdown"}}),
    ],
)
async def test_a_stream_ends_with_a_disconnect_push(
    path: str, read: Callable[[Client], list[Any]], push: dict[str, Any]
) -> None:
    async with streaming() as stage:
        stage.make_session = Silent
        client = await stage.stream(post(path, HELLO))
        stage.sessions[0].connection.close(3001, "shutdown")
        await eventually(lambda: client.lost)
        assert read(client) == [push]
        assert chunks(client)[1]
        connection = stage.sessions[0].connection
        connection.send(b"{}")
        connection.close(3000, "again")
        connection.pause()
        connection.resume()


async def test_a_peer_that_does_not_close_is_aborted() -> None:
    async with streaming() as stage:
        peer = stage.open_socket(65536, post(HTTP_STREAM, b"close"))
        await eventually(lambda: bool(stage.sessions))
        stage.advance(5.25)
        await eventually(lambda: stage.streams.connections == 0)
        await eventually(lambda: stage.sessions[0].ends == 1)
        peer.close()


@pytest.mark.parametrize("path", STREAMS)
async def test_a_slow_reader_is_disconnected(path: str) -> None:
    async with streaming(client=settings.ClientSettings(queue_max_size=100_000)) as stage:
        peer = stage.open_socket(4096, post(path, HELLO))
        bystander = await stage.stream(post(SSE, HELLO))
        await eventually(lambda: len(stage.sessions) == 2)
        slow = next(session.connection for session in stage.sessions if session.request.path == path)
        for _ in range(10_000):
            slow.send(b"x" * 10_000, is_push=True)
            if stage.count("slow"):
                break
        assert stage.count("slow") == 1
        assert stage.websocket.queued.size < 1000
        stage.advance(5.5)
        await eventually(lambda: stage.streams.connections == 1)
        peer.close()
        bystander.leave()


async def test_commands_wait_while_a_reader_has_long_replies_to_take() -> None:
    async with streaming(client=settings.ClientSettings(queue_max_size=100_000)) as stage:
        peer = stage.open_socket(4096, post(HTTP_STREAM, HELLO))
        await eventually(lambda: len(stage.sessions) == 1)
        session = stage.sessions[0]
        while not session.connection.is_congested:
            session.connection.send(b"x" * 200_000)
        session.connection.emulate(b'{"id":2}')
        session.connection.emulate(b'{"id":3}')
        assert session.received == [HELLO]

        def read() -> bool:
            with suppress(BlockingIOError):
                peer.recv(1 << 20)
            return len(session.received) == 3

        await eventually(read)
        assert session.received[1:] == [b'{"id":2}', b'{"id":3}']
        assert stage.count("slow") == 0
        peer.close()


async def test_a_reader_that_acknowledges_nothing_is_stalled() -> None:
    async with streaming() as stage:
        peer = stage.open_socket(4096, post(UNI_SSE, HELLO))
        await eventually(lambda: len(stage.sessions) == 1)
        stream = stage.sessions[0].connection
        while not stage.websocket.queued.size:
            stream.send(b"x" * 100_000)
        stage.advance(3)
        assert stage.count("stalled") == 1
        stage.advance(5.5)
        await eventually(lambda: stage.streams.connections == 0)
        peer.close()


async def test_a_slow_reader_gets_all_messages_and_the_disconnect_last() -> None:
    async with streaming() as stage:
        client = await stage.stream(post(HTTP_STREAM, HELLO))
        client.transport.pauseProducing()
        stream = stage.sessions[0].connection
        sent = 0
        while not stage.websocket.queued.size:
            stream.send(b'{"n":%d,"x":"%b"}' % (sent, b"x" * 50_000))
            sent += 1
        stream.close(3001, "shutdown")
        client.transport.resumeProducing()
        await eventually(lambda: client.lost)
        assert chunks(client)[1]
        *sent_messages, last = lines(client)[1:]
        assert [message["n"] for message in sent_messages] == list(range(sent))
        assert last["push"]["disconnect"]["code"] == 3001


def _reset(client: Client) -> None:
    client.transport.abortConnection()


def _half_close(client: Client) -> None:
    client.transport.loseWriteConnection()


def _close(client: Client) -> None:
    client.transport.loseConnection()


CONVERSATIONS = {
    "length": post(HTTP_STREAM, b'{"id":1,"connect":{}}', "User-Agent: x", PAGE),
    "chunked": get(SSE, "Transfer-Encoding: chunked", method="POST") + b"8\r\n" + HELLO + b"\r\n0\r\n\r\n",
    "query": get(SSE + QUERY, "User-Agent: x"),
}


@pytest.mark.parametrize("name", ["length", "chunked", "query"])
@pytest.mark.parametrize("vanish", [_reset, _half_close, _close])
async def test_a_conversation_cut_at_every_byte(name: str, vanish: Callable[[Client], None]) -> None:
    async with streaming(client=ANY_PAGE) as stage:
        bystander = await stage.stream(post(SSE, HELLO))
        conversation = CONVERSATIONS[name]
        clients = []
        for cut in range(len(conversation) + 1):
            client = await stage.connect(conversation[:cut])
            await eventually(lambda: True)  # a turn of the loop, in which the server reads
            vanish(client)
            clients.append(client)
        await eventually(lambda: all(client.lost for client in clients))
        await eventually(lambda: stage.front.pending == 0 and stage.streams.connections == 1)
        await eventually(lambda: all(session.ends == 1 for session in stage.sessions[1:]))
        assert len(stage.emulation._by_secret) == 1
        assert not stage.failures
        stage.sessions[0].connection.send(b'{"n":2}')
        await eventually(lambda: len(events(bystander)) == 2)
        bystander.leave()


async def test_invalid_utf_8_ends_the_stream_with_3501() -> None:
    async with streaming() as stage:
        client = await stage.stream(post(HTTP_STREAM, b'{"id":1,"x":"\xff"}'))
        await eventually(lambda: client.lost)
        assert lines(client)[-1]["push"]["disconnect"]["code"] == 3501
        assert stage.count("text") == 1
        assert not stage.sessions[0].received


async def test_an_exception_of_a_session_ends_its_stream_alone() -> None:
    async with streaming() as stage:
        bystander = await stage.stream(post(SSE, HELLO))
        client = await stage.stream(post(HTTP_STREAM, b"raise"))
        await eventually(lambda: client.lost)
        assert lines(client)[-1]["push"]["disconnect"]["code"] == 3004
        assert len(stage.failures) == 1
        stage.failures.clear()
        bystander.leave()


async def test_an_exception_while_opening_a_session_closes_its_connection() -> None:
    async with streaming() as stage:

        def fail(connection: Any, request: Any) -> Any:
            raise RuntimeError("a bug")

        stage.make_session = fail
        client = await stage.stream(post(UNI_SSE, HELLO))
        await eventually(lambda: client.lost)
        assert events(client)[-1]["disconnect"]["code"] == 3004
        assert len(stage.failures) == 1
        stage.failures.clear()


async def test_an_open_stream_keeps_no_data_of_its_request() -> None:
    async with streaming() as stage:
        client = await stage.stream(post(HTTP_STREAM, json.dumps("marked").encode(), "Cookie: session=marked"))
        await eventually(lambda: len(lines(client)) == 1)
        kept = vars(stage.sessions[0].connection)
        assert not any("marked" in repr(value) for value in kept.values())
        client.leave()


async def test_disconnects_of_streams_are_counted_by_initiator_and_code() -> None:
    async with streaming() as stage:

        def ends() -> dict[tuple[str, str], float]:
            return {
                (dict(sample.labels)["initiator"], dict(sample.labels)["code"]): sample.value
                for sample in stage.metrics.snapshot()
                if sample.name == "realtime_disconnects"
            }

        clients = [await stage.stream(post(HTTP_STREAM, body)) for body in (HELLO, HELLO, b"close")]
        clients[0].leave()
        stage.sessions[1].connection.close(4321, "of the application")
        await eventually(lambda: sum(ends().values()) == 3)
        assert ends() == {("client", ""): 1, ("server", "application"): 1, ("server", "3001"): 1}
        for client in clients[1:]:
            client.leave()
