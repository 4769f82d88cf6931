"""WebSocket connections over real sockets: the rules of RFC 6455, limits, and hostile peers.

The numbers in the tables name the chapters of the Autobahn test suite.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from contextlib import suppress

import pytest
from twisted.internet import reactor, task

from realtime.config import settings
from realtime.http.frames import text_frame
from realtime.http.handshake import OpeningRequest
from realtime.transports.websocket import WebSocketConnection
from tests.transports.stage import Client, Echo, Stage, eventually, frame, handshake, staged, text

PROTOBUF = "Sec-WebSocket-Protocol: centrifuge-protobuf"


def binary(payload: bytes) -> bytes:
    return frame(2, payload)


def pieces(payload: bytes, size: int, opcode: int = 1) -> bytes:
    """Build a message in fragments of `size` bytes."""
    parts = [payload[start : start + size] for start in range(0, len(payload), size)] or [b""]
    return b"".join(
        frame(0 if number else opcode, part, fin=number == len(parts) - 1) for number, part in enumerate(parts)
    )


class Silent(Echo):
    """A session that records messages and sends none."""

    def receive(self, payload: bytes) -> None:
        self.received.append(payload)


# Valid frames: bytes after the handshake, and the frames received before the echo of "end".
PASS: dict[str, tuple[bytes, list[tuple[int, bytes]]]] = {
    **{f"1.1 text of {n}": (frame(1, b"*" * n), [(1, b"*" * n)]) for n in (0, 125, 126, 127, 128, 65535, 65536)},
    "1.1 in pieces of 997": (pieces(b"*" * 65536, 997), [(1, b"*" * 65536)]),
    "2.1 empty ping": (frame(9), [(10, b"")]),
    "2.2 ping": (frame(9, b"Hello, world!"), [(10, b"Hello, world!")]),
    "2.3 binary ping": (frame(9, b"\x00\xff\xfe\xfd\x00"), [(10, b"\x00\xff\xfe\xfd\x00")]),
    "2.4 ping of 125": (frame(9, b"\xfe" * 125), [(10, b"\xfe" * 125)]),
    "2.7 unsolicited pong": (frame(10), []),
    "2.8 unsolicited pong with data": (frame(10, b"unsolicited"), []),
    "2.9 pong, then ping": (frame(10, b"x") + frame(9, b"y"), [(10, b"y")]),
    "2.10 ten pings": (b"".join(frame(9, bytes([n])) for n in range(10)), [(10, bytes([n])) for n in range(10)]),
    "5.3 two fragments": (frame(1, b"one", fin=False) + frame(0, b"two"), [(1, b"onetwo")]),
    "5.6 ping between": (
        frame(1, b"one", fin=False) + frame(9, b"p") + frame(0, b"two"),
        [(10, b"p"), (1, b"onetwo")],
    ),
    "5.19 pings between": (
        frame(1, b"1", fin=False)
        + frame(0, b"2", fin=False)
        + frame(9, b"a")
        + frame(0, b"3", fin=False)
        + frame(9, b"b")
        + frame(0, b"4"),
        [(10, b"a"), (10, b"b"), (1, b"1234")],
    ),
    "5.x pong between": (frame(1, b"a", fin=False) + frame(10) + frame(0, b"b"), [(1, b"ab")]),
    "6.1 empty": (frame(1), [(1, b"")]),
    "6.1 empty fragments": (frame(1, fin=False) + frame(0, fin=False) + frame(0), [(1, b"")]),
    "6.1 empty around": (frame(1, fin=False) + frame(0, b"middle", fin=False) + frame(0), [(1, b"middle")]),
    "mask of zero": (frame(1, b"a", mask=b"\0\0\0\0"), [(1, b"a")]),
    "mask of ones": (frame(1, b"abcdefghi", mask=b"\xff\xff\xff\xff"), [(1, b"abcdefghi")]),
}
# Chapter 6, valid UTF-8, with the ends of each range and characters outside Unicode's first plane.
GOOD_TEXTS = [
    "Hello-µ@ßöäüàá-UTF-8!!",
    "κόσμε",
    *map(chr, (0x00, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0xFFFE, 0xFFFF, 0x10000, 0x1FFFF, 0x10FFFF)),
]
_BAD_TEXTS = """
80 bf 80bf 80bf80 80bf80bf80bf c020 c320 e02020 f0202020 c0 e080 f08080 f8808080 fc80808080 df efbf f7bfbf fbbfbfbf
fdbfbfbfbf fe ff fefeffff c0af e080af f08080af f8808080af fc80808080af c1bf e09fbf f08fbfbf f887bfbfbf fc83bfbfbfbf
c080 e08080 f0808080 f880808080 fc8080808080 eda080 edadbf edae80 edafbf edb080 edbe80 edbfbf eda080edb080 edadbfedbfbf
f4908080 f7bfbfbf cebae1bdb9cf83cebcceb5eda080656469746564 cebae1bdb9cf83cebcceb5f4908080656469746564 ce cebae1
cebae1bd cebae1bdb9cf cebae1bdb9cf83ce
"""
BAD_TEXTS = [bytes.fromhex(digits) for digits in _BAD_TEXTS.split()]
PASS |= {f"6 {value!r}": (text(value), [(1, value.encode())]) for value in GOOD_TEXTS}
PASS |= {f"6 {value!r} by byte": (pieces(value.encode(), 1), [(1, value.encode())]) for value in GOOD_TEXTS}


@pytest.mark.parametrize("name", PASS)
async def test_valid_frames_are_accepted(name: str) -> None:
    sent, expected = PASS[name]
    async with staged() as stage:
        whole, bytewise = await stage.open(), await stage.open()
        whole.send(sent + text("end"))
        await eventually(lambda: whole.frames[-1:] == [(1, b"end")])
        assert whole.frames == [*expected, (1, b"end")]
        if len(sent) < 500:
            for byte in sent + text("end"):
                stage.sessions[1].connection.dataReceived(bytes([byte]))
            await eventually(lambda: bytewise.frames[-1:] == [(1, b"end")])
            assert bytewise.frames == whole.frames
        for client in (whole, bytewise):
            client.leave()


# Invalid frames: the bytes and the close code.
FAIL: dict[str, tuple[bytes, int]] = {
    **{f"3 reserved bits {rsv}": (frame(1, b"a", rsv=rsv), 1002) for rsv in range(1, 8)},
    **{f"3 ping with reserved bits {rsv}": (frame(9, b"a", rsv=rsv), 1002) for rsv in range(1, 8)},
    **{f"3 close with reserved bits {rsv}": (frame(8, rsv=rsv), 1002) for rsv in range(1, 8)},
    "3 reserved bit in a fragment": (frame(1, b"a", fin=False) + frame(0, b"b", rsv=4), 1002),
    **{f"4 opcode {opcode}": (frame(opcode), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    **{
        f"4 opcode {opcode} inside a message": (frame(1, b"a", fin=False) + frame(opcode, b"b") + frame(0, b"c"), 1002)
        for opcode in (3, 7, 11, 15)
    },
    "5.1 ping in two": (frame(9, b"a", fin=False) + frame(0, b"b"), 1002),
    "5.2 pong in two": (frame(10, b"a", fin=False) + frame(0, b"b"), 1002),
    "5.9 continuation without message": (frame(0, b"a") + text("b"), 1002),
    "5.10 the same, unfinished": (frame(0, b"a", fin=False) + text("b"), 1002),
    "5.15 continuation after the end": (
        frame(1, b"a", fin=False) + frame(0, b"b") + frame(0, b"c", fin=False) + text("d"),
        1002,
    ),
    "5.18 text inside a message": (frame(1, b"a", fin=False) + frame(1, b"b"), 1002),
    "5.x binary inside a message": (frame(1, b"a", fin=False) + frame(2, b"b"), 1002),
    **{f"6 {value.hex()}": (frame(1, value), 1007) for value in BAD_TEXTS},
    **{f"6 {value.hex()} by byte": (pieces(value, 1), 1007) for value in BAD_TEXTS},
    **{f"6 {value.hex()} at the end": (frame(1, b"a" * 200 + value), 1007) for value in BAD_TEXTS},
    "7.3.2 close of one byte": (frame(8, b"a"), 1002),
    "7.3.6 close of 126": (frame(8, b"\x03\xe8" + b"*" * 124), 1002),
    "7.5.1 close reason not UTF-8": (frame(8, b"\x03\xe8" + BAD_TEXTS[-1]), 1007),
    **{
        f"7.9 close code {code}": (frame(8, struct.pack("!H", code)), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65535)
    },
    "no mask": (frame(1, b"a", mask=None), 1002),
    "no mask on a ping": (frame(9, b"a", mask=None), 1002),
    "no mask on a close": (frame(8, mask=None), 1002),
    **{
        f"{length} bytes in a length of {bits} bits": (bytes((0x81, code)) + length.to_bytes(bits // 8, "big"), 1002)
        for bits, code, lengths in ((16, 0xFE, (0, 1, 125)), (64, 0xFF, (0, 125, 126, 65535)))
        for length in lengths
    },
}
FAIL = {name: (data if len(data) > 10 else data + b"\0\0\0\0", code) for name, (data, code) in FAIL.items()}


@pytest.mark.parametrize("name", FAIL)
async def test_invalid_frames_fail_the_connection(name: str) -> None:
    data, code = FAIL[name]
    async with staged() as stage:
        client = await stage.open()
        client.send(data + text("never received"))
        assert (await client.closed())[0] == code
        await eventually(lambda: client.lost)
        assert b"never received" not in stage.sessions[0].received
        assert sum(opcode == 8 for opcode, _ in client.frames) == 1
        await eventually(lambda: stage.sessions[0].ends == 1)
        assert not stage.failures


CLOSES = [b"", *(struct.pack("!H", code) for code in (*range(1000, 1004), *range(1007, 1012), 3000, 3999, 4000, 4999))]


@pytest.mark.parametrize("payload", [*CLOSES, b"\x03\xe8" + b"*" * 123, b"\x03\xe8" + "κόσμε".encode()])
async def test_good_closes_are_answered_once(payload: bytes) -> None:
    async with staged() as stage:
        client = await stage.open()
        client.send(text("before") + frame(8, payload) + text("after") + frame(9) + frame(8, payload))
        await eventually(lambda: client.lost)
        assert client.frames == [(1, b"before"), (8, b"\x03\xe8")]
        assert stage.sessions[0].received == [b"before"]


# The opening handshake


async def test_data_after_the_handshake_is_frames() -> None:
    async with staged() as stage:
        client = await stage.request(handshake() + text("one") + text("two"))
        await eventually(lambda: client.texts == ["one", "two"])
        client.leave()
        second = await stage.request(handshake() + handshake())
        assert (await second.closed())[0] == 1002
        assert second.received.count(b"HTTP/1.1") == 1


async def test_of_two_hundred_connections_the_first_hundred_are_accepted() -> None:
    async with staged(client=settings.ClientSettings(connection_limit=100)) as stage:
        clients = [await stage.request(handshake()) for _ in range(200)]
        assert [client.status for client in clients] == [101] * 100 + [503] * 100
        assert all(b"Retry-After: " in client.response for client in clients[100:])
        await eventually(lambda: all(client.lost for client in clients[100:]))
        for client in clients[:100]:
            await client.echo("undisturbed")
            client.leave()


# Text and binary


@pytest.mark.parametrize(
    ("more", "path", "good", "bad"),
    [
        ((), "", text("{}"), binary(b"\xff")),
        ((), "?format=json", text("{}"), binary(b"\xff")),
        (("Sec-WebSocket-Protocol: centrifuge-json",), "", text("{}"), binary(b"\xff")),
        ((PROTOBUF,), "", binary(b"\xff\0"), text("\0")),
        ((), "?format=protobuf", binary(b"\xff\0"), text("\0")),
        ((), "?cf_protocol=protobuf", binary(b"\xff\0"), text("\0")),
    ],
)
async def test_the_type_of_messages_must_match_the_encoding(
    more: tuple[str, ...], path: str, good: bytes, bad: bytes
) -> None:
    async with staged() as stage:
        client = await stage.request(handshake(*more, path="/connection/websocket" + path))
        client.send(good)
        await eventually(lambda: len(client.frames) == 1)
        assert client.frames[0] == (1, b"{}") if good == text("{}") else (2, b"\xff\0")
        client.send(bad + good)
        assert await client.closed() == (3501, "bad request")
        assert len(stage.sessions[0].received) == 1
        assert stage.count("inappropriate") == 1
        asked = more[0].encode() if more else b"Sec-WebSocket-Protocol"
        assert (asked in client.response) == bool(more)


# Incomplete messages


async def test_an_unfinished_message_times_out() -> None:
    async with staged() as stage:
        client, bystander = await stage.open(), await stage.open()
        client.send(frame(1, b"x" * 1000, fin=False))
        await eventually(lambda: stage.websocket.queued.size == 1000)
        stage.advance(9.5)
        for _ in range(3):  # further bytes do not extend the deadline
            client.send(frame(0, b"x", fin=False))
            await eventually(lambda: True)
        assert client.close is None
        stage.advance(1.0)
        assert await client.closed() == (1008, "policy violation")
        assert stage.websocket.queued.size == 0
        await bystander.echo("unaffected")
        bystander.leave()


@pytest.mark.parametrize("start", [frame(1, b"x" * 100)[:50], frame(1, b"x" * 60_000)[:30_000]])
async def test_an_unfinished_frame_times_out(start: bytes) -> None:
    async with staged() as stage:
        client = await stage.open()
        client.send(start)
        await eventually(lambda: stage.websocket.queued.size > 0)
        stage.advance(10.5)
        assert await client.closed() == (1008, "policy violation")


async def test_messages_finished_in_time_leave_no_deadline() -> None:
    async with staged() as stage:
        client = await stage.open()
        for number in range(5):
            client.send(frame(1, b"%d" % number, fin=False))
            await eventually(lambda: stage.websocket.queued.size > 0)
            stage.advance(9.0)
            client.send(frame(0, b"."))
            await eventually(lambda number=number: f"{number}." in client.texts)
        stage.advance(60.0)
        await client.echo("still open")
        client.leave()


async def test_a_message_does_not_time_out_while_the_server_does_not_read() -> None:
    async with staged() as stage:
        client = await stage.open()
        connection = stage.sessions[0].connection
        client.send(frame(1, b"one", fin=False))
        await eventually(lambda: stage.websocket.queued.size > 0)
        connection.pause()
        client.send(frame(0, b" two"))
        stage.advance(60.0)
        connection.resume()
        await eventually(lambda: client.texts == ["one two"])
        client.leave()


async def test_without_message_timeout_a_message_may_stay_unfinished() -> None:
    async with staged(websocket=settings.WebSocketSettings(message_timeout=0.0)) as stage:
        client = await stage.open()
        client.send(frame(1, b"x", fin=False))
        await eventually(lambda: stage.websocket.queued.size > 0)
        stage.advance(1000.0)
        client.send(frame(0, b"y"))
        await eventually(lambda: client.texts == ["xy"])
        client.leave()


async def test_a_peer_that_leaves_within_a_message_leaves_no_buffered_bytes() -> None:
    async with staged() as stage:
        for start in (frame(1, b"x" * 1000, fin=False), frame(1, b"x" * 1000)[:500]):
            client = await stage.open()
            client.send(start)
            await eventually(lambda: stage.websocket.queued.size > 0)
            client.leave()
            await eventually(lambda: stage.websocket.connections == 0)
            assert stage.websocket.queued.size == 0


# The unidirectional endpoint

UNI = settings.UniWebSocketSettings(enabled=True)


@pytest.mark.parametrize("one_way", [False, True])
async def test_json_may_come_in_a_binary_frame(one_way: bool) -> None:
    async with staged(**({"websocket": UNI} if one_way else {})) as stage:
        client = await stage.open()
        client.send(binary('{"text":"é"}'.encode()))
        await eventually(lambda: bool(stage.sessions[0].received))
        assert stage.sessions[0].received == ['{"text":"é"}'.encode()]
        client.leave()


async def test_a_unidirectional_client_may_send_one_message() -> None:
    async with staged(websocket=UNI) as stage:
        client = await stage.open()
        client.send(text('{"token":"x"}') + text("{}") + text("anything") * 3)
        await eventually(lambda: stage.count("ignored") == 4)
        assert stage.sessions[0].received == [b'{"token":"x"}']
        assert client.texts == ['{"token":"x"}']
        stage.sessions[0].connection.send(b'{"channel":"c"}')
        await eventually(lambda: len(client.texts) == 2)
        client.leave()


async def test_the_connect_request_may_be_in_the_query() -> None:
    async with staged(websocket=UNI) as stage:
        path = UNI.handler_prefix + "?cf_connect=%7B%22name%22%3A%22%C3%A4%22%7D"
        client = await stage.request(handshake(path=path) + text('{"name":"another"}'))
        await eventually(lambda: stage.count("ignored") == 1)
        assert stage.sessions[0].received == ['{"name":"ä"}'.encode()]
        assert client.texts == ['{"name":"ä"}']
        client.leave()
        empty = await stage.request(handshake(path=UNI.handler_prefix + "?cf_connect=") + text("{}"))
        await eventually(lambda: empty.texts == ["{}"])
        empty.leave()


async def test_a_flood_of_ignored_messages_closes_the_connection() -> None:
    async with staged(websocket=UNI) as stage:
        client = await stage.open()
        client.send(text("{}") * 1000)
        assert await client.closed() == (1008, "policy violation")
        assert len(stage.sessions[0].received) == 1


async def test_a_disconnect_is_pushed_before_the_close_frame() -> None:
    async with staged(websocket=UNI) as stage:
        client = await stage.open()
        stage.sessions[0].connection.send(b"{}")
        stage.sessions[0].connection.close(3001, "shutdown")
        assert await client.closed() == (3001, "shutdown")
        assert client.texts == ["{}", '{"disconnect":{"code":3001,"reason":"shutdown"}}']
        broken = await stage.open()
        broken.send(frame(1, b"\xff"))
        assert (await broken.closed())[0] == 1007
        assert broken.texts == []


async def test_each_unidirectional_connection_has_a_secret_and_others_have_none() -> None:
    async with staged(websocket=UNI) as stage:
        clients = [await stage.open() for _ in range(3)]
        assert len({session.connection.secret for session in stage.sessions}) == 3
        assert all(len(session.connection.secret) >= 32 for session in stage.sessions)
        for client in clients:
            client.leave()
    async with staged() as stage:
        client = await stage.open()
        assert stage.sessions[0].connection.secret == ""
        client.leave()


async def test_a_unidirectional_websocket_does_not_support_protobuf() -> None:
    async with staged(websocket=UNI) as stage:
        client = await stage.request(handshake(PROTOBUF, path=UNI.handler_prefix + "?format=protobuf"))
        assert client.status == 101
        assert b"centrifuge-protobuf" not in client.response
        client.send(binary(b"\xff"))
        assert (await client.closed())[0] == 3501


# Pings by frames

FRAME_PINGS = "/connection/websocket?cf_ws_frame_ping_pong=true"


async def pinged(stage: Stage, client: Client, number: int) -> None:
    """Advance time until ping frame `number` was received."""
    before = stage.now
    while sum(opcode == 9 for opcode, _ in client.frames) < number:
        assert stage.now - before <= 26.0
        stage.advance(0.25)
        await eventually(lambda: True)


async def test_frame_pings() -> None:
    async with staged() as stage:
        client = await stage.request(handshake(path=FRAME_PINGS))
        assert not stage.sessions[0].connection.needs_pings
        for number in range(1, 4):
            await pinged(stage, client, number)
            client.send(frame(10))
            await client.echo(f"answered {number}")  # so the server has read the pong
        assert stage.count("pong") == 0
        stage.advance(12.0)
        assert client.close is None
        client.leave()


async def test_a_missing_pong_for_a_frame_ping_closes_the_connection() -> None:
    async with staged() as stage:
        client = await stage.request(handshake(path=FRAME_PINGS))
        await pinged(stage, client, 1)
        await client.echo("this is no pong")
        stage.advance(8.5)
        assert await client.closed() == (3012, "no pong")


async def test_a_client_that_is_not_read_needs_no_pong() -> None:
    async with staged() as stage:
        client = await stage.request(handshake(path=FRAME_PINGS))
        connection = stage.sessions[0].connection
        connection.pause()
        stage.advance(60.0)
        client.send(frame(10))
        connection.resume()
        await client.echo("still open")
        client.leave()


@pytest.mark.parametrize(
    "client", [settings.ClientSettings(ping_interval=0.0, pong_timeout=0.0), settings.ClientSettings(pong_timeout=0.0)]
)
async def test_frame_pings_without_pong_timeout(client: settings.ClientSettings) -> None:
    async with staged(client=client) as stage:
        peer = await stage.request(handshake(path=FRAME_PINGS))
        stage.advance(101.0)
        await peer.echo("still open")
        pings = sum(opcode == 9 for opcode, _ in peer.frames)
        assert pings in (range(4, 6) if client.ping_interval else (0,))
        peer.leave()


# Floods


async def test_unsolicited_pongs_are_counted_and_limited() -> None:
    async with staged() as stage:
        client = await stage.open()
        client.send(frame(10, b"p") * 40)
        await client.echo("still open")
        assert stage.count("pong") == 40
        client.send(frame(10, b"p") * 10_000)
        assert await client.closed() == (1008, "policy violation")


class Slow(Echo):
    """A session that needs 1 ms for each message. stretches: numbers of messages between loop turns."""

    def __init__(self, connection: WebSocketConnection, request: OpeningRequest) -> None:
        super().__init__(connection, request)
        self.stretches: list[int] = []
        self.stretch = 0

    def receive(self, payload: bytes) -> None:
        if not self.stretch:
            reactor.callLater(0, self.turn)
        self.stretch += 1
        self.received.append(payload)
        until = time.monotonic() + 0.001
        while time.monotonic() < until:
            pass

    def turn(self) -> None:
        self.stretches.append(self.stretch)
        self.stretch = 0


async def test_many_messages_in_one_segment_are_processed_in_time_slices_and_in_order() -> None:
    async with staged() as stage:
        stage.make_session = Slow
        client = await stage.open()
        numbers = [b"%d" % number for number in range(100)]
        client.send(b"".join(frame(1, number) for number in numbers))
        await eventually(lambda: len(stage.sessions[0].received) == 100)
        assert stage.sessions[0].received == numbers
        await eventually(lambda: sum(stage.sessions[0].stretches) == 100)
        assert len(stage.sessions[0].stretches) > 10
        assert stage.sessions[0].connection.is_reading
        client.leave()


async def test_peers_that_flood_take_turns() -> None:
    async with staged() as stage:
        stage.make_session = Slow
        clients = [await stage.open() for _ in range(3)]
        for client in clients:
            client.send(text("{}") * 60)
        await eventually(lambda: any(len(session.received) == 60 for session in stage.sessions))
        assert all(len(session.received) > 30 for session in stage.sessions)
        await eventually(lambda: all(len(session.received) == 60 for session in stage.sessions))
        for client in clients:
            client.leave()


async def test_a_flood_of_tiny_messages_does_not_delay_other_clients() -> None:
    async with staged() as stage:
        stage.make_session = lambda *of: (Silent if len(stage.sessions) == 1 else Echo)(*of)
        bystander = await stage.open()
        flooder = await stage.open()
        flooder.send(text("{}") * 100_000)
        answered = 0
        while len(stage.sessions[1].received) < 100_000:
            before = len(stage.sessions[1].received)
            await bystander.echo(f"{answered}")
            answered += 1
            # Between a request and its response, at most a few time slices of the flood are processed.
            assert len(stage.sessions[1].received) - before < 20_000
        assert answered > 5
        for client in (bystander, flooder):
            client.leave()


async def test_received_messages_are_queued_while_the_session_is_paused() -> None:
    class Patient(Silent):
        def receive(self, payload: bytes) -> None:
            super().receive(payload)
            self.connection.pause()

    async with staged() as stage:
        stage.make_session = Patient
        client = await stage.open()
        client.send(text("one") + text("two") + frame(1, b"th", fin=False) + frame(0, b"ree") + text("four"))
        received = stage.sessions[0].received
        for number in range(1, 5):
            await eventually(lambda number=number: len(received) >= number)
            assert len(received) == number
            stage.sessions[0].connection.resume()
        assert received == [b"one", b"two", b"three", b"four"]
        client.leave()


async def test_resume_within_receive_does_not_reenter_the_session() -> None:
    class Eager(Silent):
        entered = 0

        def receive(self, payload: bytes) -> None:
            self.entered += 1
            assert self.entered == 1
            super().receive(payload)
            self.connection.pause()
            self.connection.resume()
            self.entered -= 1

    async with staged() as stage:
        stage.make_session = Eager
        client = await stage.open()
        client.send(text("{}") * 500)
        await eventually(lambda: len(stage.sessions[0].received) == 500)
        assert not stage.failures
        client.leave()


async def test_a_peer_that_does_not_read_replies_is_not_read_until_it_does() -> None:
    queue = settings.ClientSettings(queue_max_size=4_000_000)
    async with staged(client=queue, websocket=settings.WebSocketSettings(write_timeout=0.0)) as stage:
        bystander = await stage.open()
        peer = stage.open_socket(4096)
        await eventually(lambda: len(stage.sessions) == 2)
        connection = stage.sessions[1].connection
        connection.transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        command, sent, taken = text("x" * 10_000), 0, bytearray()
        message = memoryview(command * 2000)
        while not connection._is_blocked:
            with suppress(BlockingIOError):
                sent += peer.send(message[sent : sent + 100_000])
            await task.deferLater(reactor, 0)
        # The replies fill half of the outbox; further commands stay in the kernel's buffers.
        received = len(stage.sessions[1].received)
        with suppress(BlockingIOError):
            while sent < len(message):
                sent += peer.send(message[sent : sent + 100_000])
        for number in range(5):
            await bystander.echo(f"unaffected {number}")
        assert len(stage.sessions[1].received) == received < 2000
        assert connection._outbox.size < 2_200_000
        assert stage.count("slow") == 0
        while len(taken) < 2000 * 10_004:
            with suppress(BlockingIOError):
                taken += peer.recv(1 << 20)
            with suppress(BlockingIOError):
                sent += peer.send(message[sent : sent + 100_000])
            await task.deferLater(reactor, 0)
        assert len(stage.sessions[1].received) == 2000
        peer.close()
        bystander.leave()


async def test_pings_of_a_peer_that_never_reads_close_its_connection() -> None:
    async with staged(client=settings.ClientSettings(queue_max_size=300_000)) as stage:
        peer = stage.open_socket(4096)
        await eventually(lambda: len(stage.sessions) == 1)
        connection = stage.sessions[0].connection
        connection.transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        chunk = text_frame(b"x" * 60_000)
        while connection._outbox is None:
            connection.sink.deliver(chunk)
            await task.deferLater(reactor, 0)
        peer.sendall(frame(9, b"p" * 125) * 1000)
        await eventually(lambda: connection.is_closing)
        assert stage.websocket.queued.size < 20_000
        stage.advance(5.5)
        await eventually(lambda: stage.websocket.connections == 0)
        peer.close()


# Single bytes


async def test_the_time_for_single_bytes_is_linear() -> None:
    async with staged() as stage:
        stage.make_session = Silent
        client = await stage.open()
        connection = stage.sessions[0].connection

        def cost(size: int) -> float:
            data = text("x" * size)
            before = time.process_time()
            for byte in data:
                connection.dataReceived(bytes((byte,)))
            return time.process_time() - before

        small, large = (min(cost(size) for _ in range(2)) for size in (2_000, 32_000))
        assert large < 3 * 16 * small
        client.leave()


def test_the_tables_are_consistent() -> None:
    for value in BAD_TEXTS:
        with pytest.raises(UnicodeDecodeError):
            value.decode()
    assert len(set(itertools.chain(PASS, FAIL))) == len(PASS) + len(FAIL)
