"""Connections that move from one server to another one in the same process: the client notices nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from twisted.internet import reactor

from realtime.config import settings
from realtime.errors import SLOW
from realtime.http.handshake import OpeningRequest
from realtime.process import transport
from realtime.protocol.orders import EmulateOrder
from realtime.transports.connection import HandedConnection, Unsupported
from realtime.transports.incoming import HandedInput
from realtime.transports.outgoing import HandedOutput
from realtime.transports.websocket import HandedWebSocket
from tests.transports.stage import PATH, Client, Stage, eventually, frame, frames_in, handshake, staged, text
from tests.transports.streaming import (
    HTTP_STREAM,
    SSE,
    UNI_HTTP_STREAM,
    UNI_SSE,
    StreamStage,
    chunks,
    post,
    streaming,
)
from tests.transports.test_websocket_compression import COMPRESSING, DEFLATE, zipped

encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(HandedConnection).decode
_REQUEST = OpeningRequest({}, {}, "", "")


async def suspend(connection: Any) -> None:
    """Stop receiving, and wait until the connection can be moved."""
    connection.stop_receiving()
    await eventually(lambda: connection.is_movable)


def move(connection: Any, target: Stage, endpoint: Any = None) -> Any:
    """Move a suspended connection; return its session at the target."""
    connection._session.ends += 1  # as its export does
    descriptor, handed = connection.hand_over()
    handed = _decode(encode(handed))
    moved = (endpoint or target.websocket).restore_connection(handed)
    moved.take_over(transport.take_over(reactor, descriptor, handed.peer, moved), handed)
    moved.adopt_session(target._open_session(moved, _REQUEST))
    moved.start_receiving()
    return target.sessions[-1]


def count_received(connection: Any) -> list[bytes]:
    """Return a list that grows with the data that the connection receives."""
    received: list[bytes] = []
    receive = connection.dataReceived

    def keep(data: bytes) -> None:
        received.append(data)
        receive(data)

    connection.dataReceived = keep
    return received


async def test_a_websocket_goes_on_at_another_server() -> None:
    async with staged() as source, staged() as target:
        client = await source.open()
        await client.echo("before")
        connection = source.sessions[0].connection
        await suspend(connection)
        client.send(text("meanwhile"))
        session = move(connection, target)
        await client.echo("after")
        assert session.received == [b"meanwhile", b"after"]
        assert (source.websocket.connections, target.websocket.connections) == (0, 1)
        client.send(frame(8, b"\x03\xe8"))
        assert (await client.closed())[0] == 1000
        await eventually(lambda: client.lost)


async def test_a_suspended_websocket_can_stay() -> None:
    async with staged() as stage:
        client = await stage.open()
        connection = stage.sessions[0].connection
        await suspend(connection)
        client.send(text("meanwhile"))
        connection.start_receiving()
        await client.echo("after")
        assert stage.sessions[0].received == [b"meanwhile", b"after"]
        client.leave()


# What the client sends, in part before the move, and what its session receives.
CONVERSATIONS = {
    "message": (frame(1, "grüße".encode() * 30), "grüße".encode() * 30),
    "fragments": (frame(1, b"one ", fin=False) + frame(0, b"two ", fin=False) + frame(0, b"three"), b"one two three"),
    "a ping between": (frame(1, b"one ", fin=False) + frame(9, b"ping") + frame(0, b"two"), b"one two"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_a_move_within_a_message_cut_at_every_byte(name: str) -> None:
    data, message = CONVERSATIONS[name]
    async with staged() as source, staged() as target:
        for cut in range(1, len(data)):
            client = await source.open()
            connection = source.sessions[-1].connection
            received = count_received(connection)
            client.send(data[:cut])
            await eventually(lambda: len(b"".join(received)) == cut)  # noqa: B023
            await suspend(connection)
            session = move(connection, target)
            client.send(data[cut:])
            await client.echo("end")
            assert session.received == [message, b"end"]
            assert [payload for opcode, payload in client.frames if opcode == 10] == [b"ping"] * ("ping" in name)
            client.leave()
    assert (source.websocket.queued.size, target.websocket.queued.size) == (0, 0)


async def test_the_limits_of_a_message_go_along() -> None:
    limits = settings.WebSocketSettings(max_fragments=3)
    async with staged(websocket=limits) as source, staged(websocket=limits) as target:
        client = await source.open()
        connection = source.sessions[0].connection
        received = count_received(connection)
        data = frame(1, b"a", fin=False) + frame(0, b"b", fin=False)
        client.send(data)
        await eventually(lambda: b"".join(received) == data)
        await suspend(connection)
        move(connection, target)
        client.send(frame(0, b"c", fin=False) + frame(0, b"d", fin=False))
        assert (await client.closed())[0] == 1008


async def test_a_compressed_websocket_moves_between_two_messages() -> None:
    async with staged(websocket=COMPRESSING) as source, staged(websocket=COMPRESSING) as target:
        client = await source.open(DEFLATE)
        client.send(zipped(b"again and again " * 20))
        await eventually(lambda: len(client.texts) == 1)
        connection = source.sessions[0].connection
        begun = frame(1, zipped(b"a message")[6:12], fin=False, rsv=4)
        received = count_received(connection)
        client.send(begun)
        await eventually(lambda: b"".join(received) == begun)
        connection.stop_receiving()
        assert not connection.is_movable
        connection.start_receiving()
        client.leave()

        client = await source.open(DEFLATE)
        connection = source.sessions[1].connection
        await suspend(connection)
        move(connection, target)
        client.send(zipped(b"again and again " * 20))
        await eventually(lambda: client.texts == ["again and again " * 20])
        assert len(client.received.partition(b"\r\n\r\n")[2]) < 100
        client.leave()


async def test_queued_frames_go_along_and_a_slow_client_is_still_slow() -> None:
    client_settings = settings.ClientSettings(queue_max_size=300_000)
    async with staged(client=client_settings) as source, staged(client=client_settings) as target:
        peer = source.open_socket(receive_buffer=4096)
        await eventually(lambda: len(source.sessions) == 1)
        connection = source.sessions[0].connection
        sent = [b"%06d" % number + b"x" * 20_000 for number in range(12)]
        while connection.is_drained:
            connection.send(b"y" * 100_000, is_push=True)
        for payload in sent:
            connection.send(payload, is_push=True)
        await suspend(connection)
        session = move(connection, target)
        assert source.websocket.queued.size == 0
        assert target.websocket.queued.size >= 100_000
        session.connection.send(b"behind", is_push=True)
        received = bytearray()

        def read() -> bool:
            with suppress(BlockingIOError):
                received.extend(peer.recv(1 << 20))
            return received.endswith(b"behind")

        await eventually(read)
        payloads = [payload for _, payload in frames_in(bytes(received.partition(b"\r\n\r\n")[2]))]
        assert [payload for payload in payloads if payload[:1] != b"y"] == [*sent, b"behind"]
        while session.connection.is_drained:
            session.connection.send(b"y" * 100_000, is_push=True)
        while not session.connection.is_closing:
            session.connection.send(b"y" * 100_000, is_push=True)
        assert target.metrics.counter("realtime_disconnects", "", initiator="server", code=str(SLOW[0])).value == 1
        peer.close()


async def test_a_ping_frame_goes_along_unanswered() -> None:
    client_settings = settings.ClientSettings(ping_interval=10, pong_timeout=4)
    async with staged(client=client_settings) as source, staged(client=client_settings) as target:
        client = await source.request(handshake(path=f"{PATH}?cf_ws_frame_ping_pong=true"))

        def pinged() -> bool:
            source.advance(0.25)
            return bool(source.sessions[0].connection._pinger.expects_pong)

        await eventually(pinged)
        await suspend(source.sessions[0].connection)
        move(source.sessions[0].connection, target)
        target.advance(4.5)
        assert (await client.closed())[0] == 3012


async def test_another_configuration_refuses_a_connection() -> None:
    async with staged(websocket=settings.UniWebSocketSettings(enabled=True)) as target:
        state = HandedWebSocket(HandedInput(b"", b""), 0, True, False, "", None)
        handed = HandedConnection("websocket", "protobuf", ("", 0), HandedOutput(), msgspec.Raw(encode(state)))
        with pytest.raises(Unsupported):
            target.websocket.restore_connection(handed)


# Streams


async def opened(stage: StreamStage, path: str, *more: str) -> Client:
    client = await stage.stream(post(path, b'{"id":1}', *more))
    await eventually(lambda: stage.sessions[-1].received == [b'{"id":1}'])
    return client


@pytest.mark.parametrize("path", [SSE, HTTP_STREAM, UNI_SSE, UNI_HTTP_STREAM])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_stream_goes_on_at_another_server(path: str, version: str) -> None:
    async with streaming() as source, streaming() as target:
        request = post(path, b'{"id":1}').replace(b"HTTP/1.1", b"HTTP/" + version.encode())
        client = await source.stream(request)
        connection = source.sessions[0].connection
        await suspend(connection)
        session = move(connection, target, target.front.endpoints[path])
        session.connection.send(b"{}")
        session.connection.close(3001, "shutdown")
        await eventually(lambda: client.lost)
        content = chunks(client)[0] if version == "1.1" else client.received.partition(b"\r\n\r\n")[2]
        assert content.count(b"{}") == 1
        assert b"shutdown" in content
        assert session.connection.transport_name == path.rpartition("/")[2]


async def test_posted_commands_find_a_moved_session_once_and_in_order() -> None:
    async with streaming() as source, streaming() as target:
        client = await opened(source, HTTP_STREAM)
        connection = source.sessions[0].connection
        secret = connection.secret
        for number in (2, 4):  # 3 comes later
            source.emulation.receive(EmulateOrder(secret, b'{"id":%d}' % number))
        await suspend(connection)
        source.emulation.receive(EmulateOrder(secret, b'{"id":5}'))
        target.emulation.expect("batch", [secret])
        target.emulation.receive(EmulateOrder(secret, b'{"id":6}'))
        session = move(connection, target, target.front.endpoints[HTTP_STREAM])
        target.emulation.end_batch("batch")
        target.emulation.receive(EmulateOrder(secret, b'{"id":3}'))
        assert source.sessions[0].received == [b'{"id":1}', b'{"id":2}']
        assert session.received == [b'{"id":%d}' % number for number in (3, 4, 5, 6)]
        client.leave()


async def test_commands_to_a_session_that_does_not_arrive_are_dropped() -> None:
    async with streaming() as source, streaming() as target:
        client = await opened(source, HTTP_STREAM)
        connection = source.sessions[0].connection
        target.emulation.expect("batch", [connection.secret])
        target.emulation.receive(EmulateOrder(connection.secret, b'{"id":2}'))
        target.emulation.end_batch("batch")
        await suspend(connection)
        assert move(connection, target, target.front.endpoints[HTTP_STREAM]).received == []
        client.leave()


async def test_too_many_commands_to_a_session_on_its_way_end_it() -> None:
    emulation = settings.EmulationSettings(max_queued_bytes=2000)
    async with streaming(emulation=emulation) as source, streaming(emulation=emulation) as target:
        client = await opened(source, HTTP_STREAM)
        connection = source.sessions[0].connection
        target.emulation.expect("batch", [connection.secret])
        for number in range(2, 1000):
            target.emulation.receive(EmulateOrder(connection.secret, b'{"id":%d}' % number))
        await suspend(connection)
        session = move(connection, target, target.front.endpoints[HTTP_STREAM])
        assert len(session.received) < 20
        await eventually(lambda: client.lost)
        assert b'"code":3013' in chunks(client)[0]
