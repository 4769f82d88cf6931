"""Commands in separate HTTP requests: each status, the route to the session, order, and floods."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec
import pytest
from twisted.internet import reactor
from twisted.internet.task import deferLater

from realtime.config import settings
from realtime.errors import ClientError, EngineUnavailable
from realtime.metrics import Metrics
from realtime.protocol.encodings import Encoding
from realtime.protocol.json_encoding import JSON_ENCODING
from realtime.protocol.orders import EmulateOrder, encode_order
from realtime.protocol.protobuf import PROTOBUF, emulation_request
from realtime.pubsub.engine import SendOrder, worker_address
from realtime.transports.emulation import CommandOrder, EmulationLimits
from tests.transports.stage import Client, eventually
from tests.transports.streaming import (
    BODY_LIMIT,
    EMULATION,
    HTTP_STREAM,
    INIT,
    NODE,
    SSE,
    UNI_SSE,
    StreamStage,
    fields,
    get,
    lines,
    post,
    streaming,
)

JSON = "Content-Type: application/json"
BINARY = "Content-Type: application/octet-stream"
PAGE = "Origin: https://app.example"


def json_request(session: str, data: str, node: str = NODE) -> bytes:
    """Build a request in JSON, as the SDK does."""
    return post(EMULATION, json.dumps({"session": session, "node": node, "data": data}).encode(), JSON)


def protobuf_request(session: str, data: bytes, node: str = NODE) -> bytes:
    """EmulationRequest{node=1, session=2, data=3}, each shorter than 128 bytes."""
    body = b""
    for number, value in ((1, node.encode()), (2, session.encode()), (3, data)):
        body += bytes((number << 3 | 2, len(value))) + value
    assert emulation_request(body).data == data
    return post(EMULATION, body, BINARY)


async def opened(stage: StreamStage, path: str = HTTP_STREAM, *more: str) -> tuple[Client, str]:
    """Open a stream; return its client and its secret."""
    client = await stage.stream(post(path, b"{}", *more))
    await eventually(lambda: stage.sessions[-1].received == [b"{}"])
    return client, stage.sessions[-1].connection.secret


async def test_commands_reach_their_session() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        other, _ = await opened(stage, SSE)
        assert await stage.status(json_request(secret, '{"id":2}\n{"id":3,"x":"ü"}')) == 204
        assert await stage.status(json_request(secret, "{}")) == 204
        assert stage.sessions[0].received[1:] == ['{"id":2}\n{"id":3,"x":"ü"}'.encode(), b"{}"]
        assert stage.sessions[1].received == [b"{}"]
        client.leave()
        other.leave()


async def test_commands_in_protobuf() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage, HTTP_STREAM, BINARY)
        assert await stage.status(protobuf_request(secret, b"\x02\x08\x01\x00")) == 204
        assert stage.sessions[0].received[1:] == [b"\x02\x08\x01\x00"]
        client.leave()


async def test_requests_on_one_connection_keep_their_order() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        sender = await stage.connect(b"".join(json_request(secret, f'{{"id":{number}}}') for number in range(200)))
        await eventually(lambda: sender.received.count(b"HTTP/1.1 204 ") == 200)
        assert stage.sessions[0].received[1:] == [b'{"id":%d}' % number for number in range(200)]
        sender.leave()
        client.leave()


async def test_a_response_has_no_body() -> None:
    async with streaming(client=settings.ClientSettings(allowed_origins=("*",))) as stage:
        client = await stage.request(json_request("3.gone", "{}").replace(b"Host", PAGE.encode() + b"\r\nHost"))
        assert client.status == 204
        assert client.received.endswith(b"\r\n\r\n")
        assert fields(client)["access-control-allow-origin"] == "https://app.example"
        client.leave()


@pytest.mark.parametrize("secret", ["", "3.gone", "4.elsewhere", "3.", ".", "no point", "3", "\x00", "3.ü"])
async def test_commands_for_an_ended_session_get_204(secret: str) -> None:
    async with streaming() as stage:
        client, _ = await opened(stage)
        assert await stage.status(json_request(secret, "{}")) == 204
        assert stage.sessions[0].received == [b"{}"]
        client.leave()


async def test_the_secret_of_an_ended_stream_is_invalid() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        client.leave()
        await eventually(lambda: stage.streams.connections == 0)
        assert await stage.status(json_request(secret, '{"id":2}')) == 204
        assert stage.sessions[0].received == [b"{}"]


async def test_a_unidirectional_session_takes_no_commands() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage, UNI_SSE)
        assert await stage.status(json_request(secret, '{"id":2}')) == 204
        assert stage.sessions[0].received == [b"{}"]
        client.leave()


@pytest.mark.parametrize("node", ["", "another", NODE + "x"])
async def test_requests_for_another_node_are_404(node: str) -> None:
    async with streaming() as stage:
        assert await stage.status(json_request("3.x", "{}", node)) == 404
        assert await stage.status(protobuf_request("3.x", b"\x00", node)) == 404


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"session":"3.x","node":"the-node","data":{"id":1}}',
        b'{"session":7,"node":"the-node","data":""}',
        b'{"session":"\xff","node":"the-node","data":""}',
        b'{"session":"\\ud800","node":"the-node","data":""}',
        b"[" * 900,
    ],
)
async def test_an_invalid_json_body_is_400(body: bytes) -> None:
    async with streaming() as stage:
        assert await stage.status(post(EMULATION, body, JSON)) == 400
        assert stage.count("emulation") == 1


@pytest.mark.parametrize("body", [b"\x0a\xff", b"\x0a\x01\xff", b"\x08\x01", b"\x80" * 20])
async def test_an_invalid_protobuf_body_is_400(body: bytes) -> None:
    async with streaming() as stage:
        assert await stage.status(post(EMULATION, body, BINARY)) == 400
        assert stage.count("emulation") == 1


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
async def test_methods_other_than_post_are_405(method: str) -> None:
    async with streaming() as stage:
        client = await stage.request(get(EMULATION, method=method))
        assert client.status == 405
        assert fields(client)["allow"] == "POST, OPTIONS"
        client.leave()


async def test_a_body_over_the_limit() -> None:
    async with streaming(client=settings.ClientSettings(allowed_origins=("*",))) as stage:
        assert await stage.status(post(EMULATION, b"x" * BODY_LIMIT, JSON)) == 400
        declared = await stage.request(post(EMULATION, b"x" * (BODY_LIMIT + 1), JSON, PAGE))
        assert declared.status == 413
        assert fields(declared)["access-control-allow-origin"] == "https://app.example"
        chunked = get(EMULATION, JSON, "Transfer-Encoding: chunked", method="POST")
        found = await stage.request(chunked + b"3e9\r\n" + b"x" * 1001)
        assert found.status == 413
        assert stage.count("body_too_large") == 2
        declared.leave()
        found.leave()


LONG = settings.EmulationSettings()


@pytest.mark.parametrize("path", [HTTP_STREAM, SSE])
async def test_a_body_may_hold_many_commands_that_are_longer_together_than_one_may_be(path: str) -> None:
    commands = "\n".join(f'{{"id":{n},"subscribe":{{"token":"{"t" * 900}"}}}}' for n in range(2, 122))
    async with streaming(emulation=LONG) as stage:
        client, secret = await opened(stage, path)
        assert len(commands) > 65536
        assert await stage.status(json_request(secret, commands)) == 204
        assert stage.sessions[0].received[1:] == [commands.encode()]
        client.leave()


async def test_one_command_of_a_body_that_is_too_long() -> None:
    async with streaming(emulation=LONG) as stage:
        client, secret = await opened(stage)
        for before in ("", '{"id":2}\n' * 10_000):
            assert await stage.status(json_request(secret, before + "x" * 65537)) == 413
            assert await stage.status(json_request(secret, before + "x" * 65537 + "\n{}")) == 413
        assert stage.count("body_too_large") == 4
        assert stage.sessions[0].received == [b"{}"]
        assert await stage.status(json_request(secret, '{"id":2}\n' + "x" * 65536)) == 204
        client.leave()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x81\x80\x04" + bytes(65537), 413),
        ((b"\x80\x08" + bytes(1024)) * 100 + b"\x81\x80\x04" + bytes(65537), 413),
        ((b"\x80\x08" + bytes(1024)) * 63 + b"\x80\x80\x04" + bytes(65535), 400),
        ((b"\x80\x08" + bytes(1024)) * 100, 204),
        (bytes(100_000), 400),
    ],
    ids=["too long", "too long behind others", "cut off", "many", "very many"],
)
async def test_long_bodies_in_protobuf(data: bytes, status: int) -> None:
    async with streaming(emulation=LONG) as stage:
        body = b"\x0a\x08the-node\x12\x033.x\x1a" + varint(len(data)) + data
        assert emulation_request(body).data == data
        assert await stage.status(post(EMULATION, body, BINARY)) == status


def varint(number: int) -> bytes:
    return bytes((number & 0x7F | 0x80, number >> 7 & 0x7F | 0x80, number >> 14))


async def test_a_page_of_another_origin() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        spoofed = json_request(secret, '{"id":2}').replace(b"Host", b"Origin: https://evil.example\r\nHost")
        assert await stage.status(spoofed) == 403
        assert stage.sessions[0].received == [b"{}"]
        assert stage.count("origin") == 1
        client.leave()


async def test_init_returns_a_small_response_for_load_balancers() -> None:
    async with streaming(client=settings.ClientSettings(allowed_origins=("*",))) as stage:
        client = await stage.request(get(INIT, PAGE))
        await eventually(lambda: client.received.endswith(b"\r\n\r\n{}"))
        assert (client.status, fields(client)["content-type"]) == (200, "application/json")
        assert fields(client)["access-control-allow-credentials"] == "true"
        client.leave()
        assert await stage.status(post(INIT, b"")) == 405


# Between workers


class Engine:
    """An engine that records orders, or raises `error`. orders: pairs of order and worker."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.recipients = 1
        self.orders: list[tuple[bytes, str]] = []

    async def ask(self, request: SendOrder) -> int:
        if self.error is not None:
            raise self.error
        self.orders.append((request.order, request.worker))
        return self.recipients


class LateEngine(Engine):
    """An engine whose answers are lost. when: the order itself arrives before the error, after it, or never."""

    def __init__(self, stage: StreamStage, when: str) -> None:
        super().__init__()
        self._stage = stage
        self._when = when

    async def ask(self, request: SendOrder) -> int:
        await super().ask(request)
        if self._when == "before the error":
            self.send()
        raise EngineUnavailable("no answer in time")

    def send(self) -> None:
        orders, self.orders = self.orders, []
        for order, _ in orders if self._when != "never" else ():
            self._stage.emulation.receive(msgspec.msgpack.decode(order, type=EmulateOrder))


SomeEngine = TypeVar("SomeEngine")


def substituted(stage: StreamStage, engine: SomeEngine) -> SomeEngine:
    stage.emulation._engine = engine  # type: ignore[assignment]
    return engine


async def test_commands_go_to_the_worker_that_the_secret_names() -> None:
    async with streaming() as stage:
        engine = substituted(stage, Engine())
        assert await stage.status(json_request("12.secret", '{"id":2}')) == 204
        assert engine.orders == [(encode_order(EmulateOrder("12.secret", b'{"id":2}')), "12")]


async def test_commands_go_to_the_node_that_the_secret_names() -> None:
    async with streaming() as stage:
        engine = substituted(stage, Engine())
        secret = f"{worker_address(1, 2, 'another')}.secret"
        assert await stage.status(json_request(secret, '{"id":2}', "another")) == 204
        assert engine.orders == [(encode_order(EmulateOrder(secret, b'{"id":2}')), "another/1-2")]
        assert await stage.status(json_request(secret, "{}", "a third")) == 404
        engine.recipients = 0  # the node has ended
        assert await stage.status(json_request(secret, "{}", "another")) == 404


async def test_a_secret_without_worker_is_not_forwarded() -> None:
    async with streaming() as stage:
        engine = substituted(stage, Engine())
        for secret in ("", ".", ".x", "x"):
            assert await stage.status(json_request(secret, "{}")) == 204
        assert engine.orders == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineUnavailable("away"), 500),
        (ClientError(106, "limit exceeded"), 413),
        (RuntimeError("a bug"), 500),
    ],
)
async def test_the_status_of_an_engine_error(error: Exception, status: int) -> None:
    async with streaming() as stage:
        substituted(stage, Engine(error))
        assert await stage.status(json_request("4.elsewhere", "{}")) == status
        assert len(stage.failures) == isinstance(error, RuntimeError)
        stage.failures.clear()


async def test_a_stream_of_this_worker_gets_commands_while_the_engine_is_unavailable() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        substituted(stage, Engine(EngineUnavailable("away")))
        assert await stage.status(json_request(secret, '{"id":2}')) == 204
        assert stage.sessions[0].received[1:] == [b'{"id":2}']
        client.leave()


@pytest.mark.parametrize("when", ["before the error", "after the error", "never"])
async def test_commands_are_carried_out_once_whether_or_not_the_engine_sends_them_late(when: str) -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        engine = substituted(stage, LateEngine(stage, when))
        for id in (2, 3):
            assert await stage.status(json_request(secret, f'{{"id":{id}}}')) == 204
        engine.send()
        assert stage.sessions[0].received[1:] == [b'{"id":2}', b'{"id":3}']
        substituted(stage, stage.engine)
        assert await stage.status(json_request(secret, '{"id":4}')) == 204
        assert stage.sessions[0].received[-1] == b'{"id":4}'
        client.leave()


# Handling of commands by the session


async def test_a_command_with_invalid_utf_8_ends_the_stream() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        assert await stage.status(protobuf_request(secret, b'{"x":"\xff"}')) == 204
        await eventually(lambda: client.lost)
        assert lines(client)[-1]["push"]["disconnect"]["code"] == 3501
        assert stage.sessions[0].received == [b"{}"]


async def test_commands_are_queued_while_the_session_is_paused() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        session: Any = stage.sessions[0]
        session.connection.pause()
        for number in range(5):
            assert await stage.status(json_request(secret, f'{{"id":{number}}}')) == 204
        assert session.received == [b"{}"]

        def receive(payload: bytes) -> None:
            session.received.append(payload)
            if len(session.received) == 3:
                session.connection.pause()

        session.receive = receive
        session.connection.resume()
        assert session.received[1:] == [b'{"id":0}', b'{"id":1}']
        assert await stage.status(json_request(secret, '{"id":5}')) == 204
        session.connection.resume()
        assert session.received[1:] == [b'{"id":%d}' % number for number in range(6)]
        client.leave()


@pytest.mark.parametrize(("size", "most"), [(60_000, 2), (2, 508)])
async def test_a_flood_of_commands_ends_the_stream(size: int, most: int) -> None:
    async with streaming(emulation=settings.EmulationSettings(max_queued_bytes=128 * 1024)) as stage:
        client, secret = await opened(stage)
        bystander, _ = await opened(stage, SSE)
        stage.sessions[0].connection.pause()
        flood = json_request(secret, "x" * size)
        sender = await stage.connect(flood * most)
        await eventually(lambda: sender.received.count(b"HTTP/1.1 204 ") == most)
        assert not client.lost
        sender.send(flood)
        await eventually(lambda: client.lost)
        assert lines(client)[-1]["push"]["disconnect"] == {"code": 3013, "reason": "too many requests"}
        assert stage.count("emulation_flood") == 1
        assert stage.sessions[0].received == [b"{}"]
        sender.leave()
        bystander.leave()


class TestCommandOrder:
    """Requests that overtake each other."""

    def order(self, encoding: Encoding = JSON_ENCODING, first: bytes = b'{"id":1,"connect":{}}') -> Any:
        self.seen: list[bytes] = []
        self.limits = EmulationLimits(settings.EmulationSettings(), 65536, Metrics(), reactor.callLater)  # type: ignore[attr-defined]
        return CommandOrder(self.seen.append, encoding, first, self.limits)

    async def test_commands_are_handled_in_the_order_of_their_ids(self) -> None:
        order = self.order()
        for number in (3, 2, 4, 7, 6, 5, 8):
            order.receive(b'{"rpc":{},"id":%d}' % number)
        assert self.seen == [b'{"rpc":{},"id":%d}' % number for number in range(2, 9)]
        assert order._timer is None

    async def test_messages_of_several_commands(self) -> None:
        order = self.order()
        late, early = b'{"send":{}}\n{"id":4}\n{"id":5}', b'{"id":2}\n{"id":3}\n'
        order.receive(late)
        order.receive(early)
        order.receive(b'{"id":6}')
        assert self.seen == [early, late, b'{"id":6}']

    async def test_protobuf(self) -> None:
        order = self.order(PROTOBUF, b"\x04\x08\x01\x22\x00")
        first, second = b"\x02\x08\x02\x00", b"\x05\x08\xac\x02\x5a\x00"
        order._next = 2
        order.receive(b"\x04\x08\x03\x5a\x00")
        order.receive(first)
        assert self.seen == [first, b"\x04\x08\x03\x5a\x00"]
        assert list(PROTOBUF.command_ids(first + second)) == [2, 0, 300]

    async def test_pongs_and_repeated_ids_never_wait(self) -> None:
        order = self.order()
        order.receive(b'{"id":5}')
        for message in (b"{}", b'{"id":1}', b"junk", b'{"id":"x"}', b""):
            order.receive(message)
        assert self.seen == [b"{}", b'{"id":1}', b"junk", b'{"id":"x"}', b""]
        order.close()

    async def test_an_id_that_never_comes_is_waited_for_shortly(self) -> None:
        order = self.order()
        order.receive(b'{"id":5}')
        order.receive(b'{"id":4}')
        await eventually(lambda: self.seen == [b'{"id":4}', b'{"id":5}'])
        order.receive(b'{"id":6}')
        assert self.seen[-1] == b'{"id":6}'

    async def test_few_messages_wait(self) -> None:
        order = self.order()
        for number in range(3, 8):
            order.receive(b'{"id":%d,"x":"%b"}' % (number, b"x" * (order._limits.held_bytes // 4)))
        assert len(self.seen) >= 4
        assert [message[6:7] for message in self.seen] == [b"3", b"4", b"5", b"6", b"7"][: len(self.seen)]
        order.close()

    async def test_an_ended_session_drops_what_waits(self) -> None:
        order = self.order()
        order.receive(b'{"id":5}')
        order.close()
        await deferLater(reactor, 2 * order._limits.hold_time)
        assert self.seen == []


async def test_requests_on_several_connections_keep_their_order() -> None:
    async with streaming() as stage:
        client, secret = await opened(stage)
        stage.sessions[0].received.clear()
        for number in (2, 4, 3, 6, 5):
            assert await stage.status(json_request(secret, f'{{"id":{number}}}')) == 204
        assert stage.sessions[0].received == [b'{"id":%d}' % number for number in range(2, 7)]
        client.leave()
