"""WebSocket connections over real sockets: broken frames, floods, slow and vanishing peers."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from twisted.internet import reactor, task

from realtime.config import settings
from realtime.http.frames import text_frame
from realtime.http.handshake import OpeningRequest
from realtime.transports.outgoing import FlushAtTurnEnd
from realtime.transports.websocket import WebSocketConnection
from tests.transports.stage import Client, Echo, Stage, eventually, frame, frames_in, handshake, staged, text


def header(first: int, second: int, extended: bytes = b"") -> bytes:
    """Build the header of a masked frame from raw bytes."""
    return bytes((first, second)) + extended + b"\x01\x02\x03\x04"


# Bytes after the handshake, and the expected close code.
BROKEN: dict[str, tuple[bytes, int]] = {
    "no mask": (b"\x81\x03abc", 1002),
    "RSV1": (frame(1, b"a", rsv=4), 1002),
    "RSV2": (frame(1, b"a", rsv=2), 1002),
    "RSV3 on a ping": (frame(9, b"a", rsv=1), 1002),
    **{f"opcode {opcode}": (frame(opcode, b"a"), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "ping of 126": (frame(9, b"x" * 126), 1002),
    "ping of 70000": (frame(9, b"x" * 70000), 1002),
    "fragmented ping": (frame(9, b"a", fin=False), 1002),
    "fragmented close": (frame(8, b"\x03\xe8", fin=False), 1002),
    "length 2^63": (header(0x81, 0xFF, b"\x80" + b"\x00" * 7), 1002),
    "length 2^63+5": (header(0x82, 0xFF, b"\x80" + b"\x00" * 6 + b"\x05"), 1002),
    "length 2^64-1": (header(0x81, 0xFF, b"\xff" * 8), 1002),
    "length 2^40": (header(0x81, 0xFF, (1 << 40).to_bytes(8, "big")), 1009),
    "one byte over": (frame(1, b"x" * 65537), 1009),
    "a batch of gigabytes": (header(0x81, 0xFF, (1 << 30).to_bytes(8, "big")), 3013),
    "length 2^62 of binary": (header(0x82, 0xFF, (1 << 62).to_bytes(8, "big")), 1009),
    "126 for 5": (header(0x81, 0xFE, b"\x00\x05") + b"abcde", 1002),
    "127 for 300": (header(0x81, 0xFF, (300).to_bytes(8, "big")) + b"x" * 300, 1002),
    "fragments over the limit": (frame(1, b"x" * 8000, fin=False) + frame(0, b"x" * 8000, fin=False) * 9, 1009),
    "empty fragments": (frame(1, b"", fin=False) + frame(0, b"", fin=False) * 2000, 1008),
    "tiny fragments": (frame(1, b"x", fin=False) + frame(0, b"x", fin=False) * 70000, 1008),
    "not UTF-8": (frame(1, b"a\xff"), 1007),
    "cut character": (frame(1, "ä".encode()[:1]), 1007),
    "half a surrogate pair": (frame(1, b"\xed\xa0\x80"), 1007),
    "overlong": (frame(1, b"\xc0\xaf"), 1007),
    "not UTF-8 in a fragment": (frame(1, b"\xff", fin=False) + frame(0, b"a"), 1007),
    "not UTF-8 in a close": (frame(8, b"\x03\xe8\xff"), 1007),
    "close of 1 byte": (frame(8, b"\x03"), 1002),
    **{
        f"close code {code}": (frame(8, struct.pack("!H", code)), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535)
    },
    "continuation without message": (frame(0, b"a"), 1002),
    "text inside a message": (frame(1, b"a", fin=False) + frame(1, b"b"), 1002),
    "ping flood": (frame(9, b"p") * 10_000, 1008),
    "pong flood": (frame(10, b"p") * 10_000, 1008),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_frames(name: str) -> None:
    data, code = BROKEN[name]
    async with staged() as stage:
        bystander = await stage.open()
        client = await stage.open()
        client.send(data)
        assert (await client.closed())[0] == code
        await eventually(lambda: client.lost)  # the client has read the close frame and the end, and closes its side
        await eventually(lambda: stage.websocket.connections == 1)
        await eventually(lambda: stage.sessions[1].ends == 1)
        assert stage.sessions[1].received == []
        assert not stage.failures
        await bystander.echo("unaffected")
        bystander.leave()


async def test_broken_frames_are_counted_and_reasons_do_not_echo_input() -> None:
    async with staged() as stage:
        for name in ("no mask", "length 2^40", "not UTF-8", "ping flood"):
            client = await stage.open()
            client.send(BROKEN[name][0])
            _, reason = await client.closed()
            assert reason.replace("-", "").replace(" ", "").isalnum()
            assert not any(digit in reason for digit in "01234567679")
        counts = [stage.count(kind) for kind in ("frame", "frame_size", "frame_data", "frame_rate")]
        assert counts == [1, 1, 1, 1]


async def test_a_declared_length_allocates_nothing_and_the_payload_is_not_buffered() -> None:
    async with staged(websocket=settings.WebSocketSettings(message_size_limit=1000)) as stage:
        client = await stage.open()
        connection = stage.sessions[0].connection
        client.send(header(0x81, 0xFE, b"\x10\x00") + b"x" * 4096)
        await client.closed()
        assert connection._message is None
        await eventually(lambda: stage.websocket.connections == 0)


async def test_the_rate_of_pings_is_a_setting() -> None:
    async with staged(websocket=settings.WebSocketSettings(control_frames_per_second=2)) as stage:
        client = await stage.open()
        client.send(frame(9, b"") * 5)
        await eventually(lambda: client.frames == [(10, b"")] * 5)
        client.send(frame(9, b"") * 5)
        assert (await client.closed())[0] == 1008
        assert stage.count("frame_rate") == 1


async def test_the_largest_message_passes() -> None:
    async with staged() as stage:
        client = await stage.open()
        await client.echo("x" * 65536)
        assert len(stage.sessions[0].received[0]) == 65536
        client.leave()


async def test_zero_is_no_limit() -> None:
    async with staged(websocket=settings.WebSocketSettings(message_size_limit=0, max_fragments=0)) as stage:
        client = await stage.open()
        client.send(frame(1, b"x", fin=False) + frame(0, b"x", fin=False) * 2000 + frame(0, b"y" * 100_000))
        await eventually(lambda: len(client.texts) == 1)
        assert len(client.texts[0]) == 102_001
        client.leave()


async def test_fragments_and_control_frames_between_them() -> None:
    async with staged() as stage:
        client = await stage.open()
        start, end = "grüße"[:3].encode()[:3], "grüße".encode()[3:]
        client.send(frame(1, start, fin=False) + frame(9, b"ping") + frame(0, b"", fin=False) + frame(0, end))
        await eventually(lambda: client.texts == ["grüße"])
        assert client.frames[0] == (10, b"ping")
        client.leave()


async def test_a_few_pings_and_pongs_are_fine() -> None:
    async with staged() as stage:
        client = await stage.open()
        client.send(b"".join(frame(9, bytes([n])) for n in range(20)) + frame(10, b"unsolicited") * 20)
        await eventually(lambda: len(client.frames) == 20)
        assert client.frames == [(10, bytes([n])) for n in range(20)]
        await client.echo("still open")
        client.leave()


async def test_no_more_than_a_burst_of_pongs_is_sent() -> None:
    async with staged() as stage:
        client = await stage.open()
        client.send(frame(9, b"p") * 10_000)
        await client.closed()
        assert sum(opcode == 10 for opcode, _ in client.frames) <= 60


async def test_a_message_in_single_bytes() -> None:
    async with staged() as stage:
        client = await stage.open()
        connection = stage.sessions[0].connection
        message = "ä" * 32768
        for byte in text(message):
            connection.dataReceived(bytes([byte]))
        await eventually(lambda: client.texts == [message])
        client.leave()


# Closing


async def test_the_peer_closes() -> None:
    for payload in (b"", b"\x03\xe8", b"\x03\xe8bye", b"\x0f\xa0mine"):
        async with staged() as stage:
            client = await stage.open()
            client.send(frame(8, payload))
            assert await client.closed() == (1000, "")
            await eventually(lambda client=client: client.lost)
            await eventually(lambda stage=stage: stage.websocket.connections == 0)
            await eventually(lambda: stage.sessions[0].ends == 1)


async def test_the_session_closes_after_queued_messages() -> None:
    async with staged() as stage:
        client = await stage.open()
        client.send(text("first") + text("close") + text("too late"))
        assert await client.closed() == (3001, "shutdown")
        assert client.texts == ["first"]
        await eventually(lambda: client.lost)
        assert stage.sessions[0].received == [b"first", b"close"]


async def test_after_the_close_no_message_is_sent_or_received() -> None:
    async with staged() as stage:
        client = await stage.open()
        connection = stage.sessions[0].connection
        connection.close(3001, "shutdown")
        connection.close(3500, "again")
        connection.send(b"late")
        connection.sink.deliver(text_frame(b"late"))
        connection.pause()
        connection.resume()
        client.send(text("late") * 1000)
        assert await client.closed() == (3001, "shutdown")
        await eventually(lambda: client.lost)
        assert client.texts == []
        assert stage.sessions[0].received == []


async def test_a_peer_that_does_not_answer_a_close_is_aborted() -> None:
    async with staged() as stage:
        peer = stage.open_socket(65536)
        await eventually(lambda: stage.websocket.connections == 1)
        stage.sessions[0].connection.close(3001, "shutdown")
        stage.advance(4.5)
        await eventually(lambda: True)
        assert stage.websocket.connections == 1
        stage.advance(1.0)
        await eventually(lambda: stage.websocket.connections == 0)
        await eventually(lambda: stage.sessions[0].ends == 1)
        peer.close()


async def test_a_session_that_pauses_reading_is_still_closed() -> None:
    async with staged() as stage:
        client = await stage.open()
        connection = stage.sessions[0].connection
        connection.pause()
        connection.pause()
        client.send(text("unread"))
        await eventually(lambda: True)
        connection.close(3001, "shutdown")
        assert await client.closed() == (3001, "shutdown")
        await eventually(lambda: stage.websocket.connections == 0)


async def test_pause_and_resume() -> None:
    async with staged() as stage:
        client, other = await stage.open(), await stage.open()
        connection = stage.sessions[0].connection
        connection.pause()
        connection.pause()
        client.send(text("held back"))
        await other.echo("meanwhile")
        assert stage.sessions[0].received == []
        connection.resume()
        connection.resume()
        await eventually(lambda: client.texts == ["held back"])
        client.leave()
        other.leave()


# Exceptions of sessions


async def test_an_exception_of_a_session_for_a_message_closes_its_connection() -> None:
    async with staged() as stage:
        client, bystander = await stage.open(), await stage.open()
        client.send(text("raise") + text("after"))
        assert await client.closed() == (3004, "internal server error")
        await eventually(lambda: stage.websocket.connections == 1)
        assert stage.sessions[0].received == [b"raise"]
        assert len(stage.failures) == 1
        await bystander.echo("unaffected")
        bystander.leave()


async def test_an_exception_while_opening_a_session_closes_its_connection() -> None:
    async with staged() as stage:

        def fail(connection: WebSocketConnection, request: OpeningRequest) -> Any:
            raise RuntimeError("a bug")

        stage.make_session = fail
        client = await stage.open()
        assert await client.closed() == (3004, "internal server error")
        assert len(stage.failures) == 1


async def test_an_exception_of_a_session_at_its_end_is_logged() -> None:
    class Failing(Echo):
        def closed(self) -> None:
            super().closed()
            raise RuntimeError("a bug")

    async with staged() as stage:
        stage.make_session = Failing
        client = await stage.open()
        client.leave()
        await eventually(lambda: stage.websocket.connections == 0)
        assert len(stage.failures) == 1


async def test_a_session_may_send_and_close_while_it_is_opened() -> None:
    class Refusing(Echo):
        def __init__(self, connection: WebSocketConnection, request: OpeningRequest) -> None:
            super().__init__(connection, request)
            connection.send(b"hello")
            connection.close(3504, "connection limit")

    async with staged() as stage:
        stage.make_session = Refusing
        client = await stage.request(handshake() + text("early"))
        assert await client.closed() == (3504, "connection limit")
        assert client.texts == ["hello"]
        await eventually(lambda: stage.websocket.connections == 0)


# Slow peers

SMALL_QUEUE = settings.ClientSettings(queue_max_size=300_000)
CHUNK = text_frame(b"x" * 60_000)


async def slow_peer(stage: Stage) -> tuple[socket.socket, WebSocketConnection]:
    """Connect a peer with a small window that reads nothing, and fill its transport."""
    before = len(stage.sessions)
    peer = stage.open_socket(4096)
    await eventually(lambda: len(stage.sessions) > before)
    connection = stage.sessions[-1].connection
    connection.transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    turns_stuck = 0

    def stuck() -> bool:
        """Fill the kernel's buffers; return whether they accepted nothing in the last turns."""
        nonlocal turns_stuck
        turns_stuck += 1
        while connection._outbox is None:
            turns_stuck = 0
            connection.sink.deliver(CHUNK)
        return turns_stuck > 3

    await eventually(stuck)
    return peer, connection


async def read_all(peer: socket.socket) -> bytes:
    """Read up to the end of the connection."""
    data = bytearray()
    while True:
        try:
            chunk = peer.recv(1 << 20)
        except BlockingIOError:
            await task.deferLater(reactor, 0.002)
            continue
        except ConnectionResetError:
            return bytes(data)
        if not chunk:
            return bytes(data)
        data += chunk


async def test_commands_behind_long_replies_of_one_turn_go_on_when_these_have_left() -> None:
    async with staged(client=settings.ClientSettings(queue_max_size=100_000)) as stage:
        stage.websocket.turn_end = FlushAtTurnEnd(lambda: 0, partial(reactor.callLater, 0))
        client = await stage.open()
        stage.sessions[0].connection.dataReceived(b"".join(text(f"{n}{'x' * 20_000}") for n in range(10)))
        assert len(stage.sessions[0].received) < 10
        await eventually(lambda: len(client.texts) == 10)
        assert stage.count("slow") == 0
        client.leave()


async def test_a_client_that_does_not_read_is_closed_as_slow_and_its_queue_is_dropped() -> None:
    async with staged(client=SMALL_QUEUE) as stage:
        bystander = await stage.open()
        peer, connection = await slow_peer(stage)
        while connection.state == connection.STATE_OPEN:
            connection.sink.deliver(CHUNK)
            assert stage.websocket.queued.size == connection._outbox.size
        assert stage.count("slow") == 1
        assert connection._outbox.size < 100  # the queued frames were dropped; the close frame is queued
        for _ in range(1000):
            connection.sink.deliver(CHUNK)
        assert connection._outbox.size < 100
        await bystander.echo("unaffected")
        stage.advance(5.25)
        await eventually(lambda: stage.websocket.connections == 1)
        await eventually(lambda: stage.sessions[1].ends == 1)
        peer.close()
        bystander.leave()


async def test_a_slow_client_that_reads_again_gets_whole_frames_and_the_reason() -> None:
    async with staged(client=SMALL_QUEUE) as stage:
        peer, connection = await slow_peer(stage)
        while connection.state == connection.STATE_OPEN:
            connection.sink.deliver(CHUNK)
        frames = frames_in((await read_all(peer)).partition(b"\r\n\r\n")[2])
        assert {payload for opcode, payload in frames if opcode == 1} == {b"x" * 60_000}
        assert frames[-1] == (8, struct.pack("!H", 3008) + b"slow")
        peer.close()


async def test_a_client_that_catches_up_loses_nothing() -> None:
    async with staged(client=settings.ClientSettings(queue_max_size=3_000_000)) as stage:
        peer, connection = await slow_peer(stage)
        numbers = [b"%d " % number + b"y" * 1000 for number in range(2000)]
        for number in numbers:
            connection.send(number)
        assert connection._outbox is not None
        assert connection._outbox.size > 1_000_000
        connection.close(3001, "shutdown")
        frames = frames_in((await read_all(peer)).partition(b"\r\n\r\n")[2])
        texts = [payload for opcode, payload in frames if opcode == 1]
        assert texts[-2000:] == numbers
        assert frames[-1] == (8, struct.pack("!H", 3001) + b"shutdown")
        peer.close()
        await eventually(lambda: stage.websocket.connections == 0)


async def test_after_catching_up_frames_are_written_directly_again() -> None:
    async with staged() as stage:
        peer, connection = await slow_peer(stage)

        def drained() -> bool:
            with suppress(BlockingIOError):
                peer.recv(1 << 20)
            return connection._outbox is None

        await eventually(drained)
        assert not connection.deadline_bucket  # no deadline is left
        peer.close()


async def test_a_client_that_acknowledges_no_byte_is_closed_as_stalled() -> None:
    async with staged() as stage:
        peer, connection = await slow_peer(stage)
        stage.advance(3.0)
        assert stage.count("stalled") == 1
        assert connection.state != connection.STATE_OPEN
        stage.advance(5.25)
        await eventually(lambda: stage.websocket.connections == 0)
        peer.close()


async def test_a_client_that_acknowledges_bytes_in_each_interval_stays_open() -> None:
    async with staged() as stage:
        peer, connection = await slow_peer(stage)
        for _ in range(4):
            connection.sink.deliver(CHUNK)
        for _ in range(10):
            taken = connection._acknowledged_bytes()

            def some(taken: int = taken) -> bool:
                with suppress(BlockingIOError):
                    peer.recv(4096)
                return connection._acknowledged_bytes() > taken

            await eventually(some)
            stage.advance(1.0)  # one check of progress in each
        assert connection.state == connection.STATE_OPEN
        assert connection._outbox is not None
        peer.close()


async def test_pongs_for_a_peer_that_never_reads_are_queued() -> None:
    async with staged(client=SMALL_QUEUE) as stage:
        peer, connection = await slow_peer(stage)
        assert connection._outbox is not None
        before = connection._outbox.size
        peer.sendall(frame(9, b"p" * 100) * 10)
        await eventually(lambda: connection._outbox is not None and connection._outbox.size >= before + 10 * 102)
        peer.close()


async def test_a_slow_peer_that_closes_gets_the_close_frame_only() -> None:
    async with staged() as stage:
        peer, connection = await slow_peer(stage)
        connection.send(b"dropped")
        peer.sendall(frame(8, b"\x03\xe8"))
        await eventually(lambda: connection.state != connection.STATE_OPEN)
        frames = frames_in((await read_all(peer)).partition(b"\r\n\r\n")[2])
        assert (1, b"dropped") not in frames
        assert frames[-1] == (8, struct.pack("!H", 1000))
        peer.close()


async def test_messages_for_a_peer_that_has_gone_are_dropped() -> None:
    async with staged(client=SMALL_QUEUE) as stage:
        peer, connection = await slow_peer(stage)
        peer.close()
        await eventually(lambda: stage.websocket.connections == 0)
        for _ in range(10):
            connection.sink.deliver(CHUNK)
        connection.close(3001, "shutdown")
        connection.pause()
        connection.resume()
        assert stage.count("slow") == 0


# Peers that vanish

CONVERSATION = (
    handshake("Sec-WebSocket-Protocol: centrifuge-json", "Origin: http://localhost", "User-Agent: x" * 10)
    + text("one")
    + frame(9, b"ping")
    + frame(1, b"tw", fin=False)
    + frame(0, b"o")
    + text("three" * 30)
    + frame(8, b"\x03\xe8bye")
)


def _reset(client: Client) -> None:
    client.transport.abortConnection()


def _half_close(client: Client) -> None:
    client.transport.loseWriteConnection()


def _close(client: Client) -> None:
    client.transport.loseConnection()


@pytest.mark.parametrize("vanish", [_reset, _half_close, _close])
async def test_a_conversation_cut_at_every_byte(vanish: Callable[[Client], None]) -> None:
    async with staged() as stage:
        bystander = await stage.open()
        clients = []
        for cut in range(len(CONVERSATION) + 1):
            client = await stage.connect(CONVERSATION[:cut])
            await eventually(lambda: True)  # a turn of the loop, in which the server reads
            vanish(client)
            clients.append(client)
        await eventually(lambda: all(client.lost for client in clients))
        await eventually(lambda: stage.front.pending == 0 and stage.websocket.connections == 1)
        await eventually(lambda: all(session.ends == 1 for session in stage.sessions[1:]))
        assert not stage.failures
        await bystander.echo("unaffected")
        bystander.leave()


# Memory of an open connection


async def test_an_open_connection_keeps_no_data_of_its_handshake() -> None:
    async with staged() as stage:
        client = await stage.open("Cookie: session=marked")
        await client.echo("hello")
        kept = vars(stage.sessions[0].connection)
        assert len(kept) <= 10
        assert not any("marked" in repr(value) for value in kept.values())
        client.leave()


async def test_disconnects_are_counted_by_initiator_and_code() -> None:
    async with staged() as stage:

        def ends() -> dict[tuple[str, str], float]:
            return {
                (dict(sample.labels)["initiator"], dict(sample.labels)["code"]): sample.value
                for sample in stage.metrics.snapshot()
                if sample.name == "realtime_disconnects"
            }

        clients = [await stage.open() for _ in range(5)]
        clients[0].leave()
        clients[1].send(frame(8, struct.pack("!H", 1000)))
        stage.sessions[2].connection.close(3012, "no pong")
        stage.sessions[3].connection.close(4321, "of the application")
        clients[4].send(frame(1, b"not UTF-8: \xff"))
        await eventually(lambda: sum(ends().values()) == 5)
        assert ends() == {
            ("client", ""): 2,
            ("server", "3012"): 1,
            ("server", "application"): 1,
            ("server", "1007"): 1,
        }
        for client in clients[1:]:
            client.leave()
