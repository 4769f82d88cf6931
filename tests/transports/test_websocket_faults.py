"""WebSocket connections over real sockets: what the standard demands, and what no peer may get away with.

The numbers of the tables are those of the chapters of the Autobahn test suite that they are modelled on.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
import time
import zlib
from contextlib import suppress

import pytest
from twisted.internet import reactor, task

from realtime.config import settings
from realtime.http.frames import text_frame
from realtime.http.handshake import OpeningRequest
from realtime.transports.websocket import WebSocketConnection
from tests.transports.stage import Client, Echo, Stage, eventually, frame, handshake, staged, text

DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
COMPRESSING = settings.WebSocketSettings(compression=True)
PROTOBUF = "Sec-WebSocket-Protocol: centrifuge-protobuf"


def binary(payload: bytes) -> bytes:
    return frame(2, payload)


def pieces(payload: bytes, size: int, opcode: int = 1) -> bytes:
    """A message in fragments of `size` bytes."""
    parts = [payload[start : start + size] for start in range(0, len(payload), size)] or [b""]
    return b"".join(
        frame(0 if number else opcode, part, fin=number == len(parts) - 1) for number, part in enumerate(parts)
    )


class Heard(Echo):
    """Keeps what it hears, and says nothing."""

    def receive(self, payload: bytes) -> None:
        self.received.append(payload)


# What a conforming peer may do: bytes after the handshake, and what comes back before the echo of "end".
PASS: dict[str, tuple[bytes, list[tuple[int, bytes]]]] = {
    **{f"1.1 text of {n}": (frame(1, b"*" * n), [(1, b"*" * n)]) for n in (0, 125, 126, 127, 128, 65535, 65536)},
    "1.1 in pieces of 997": (pieces(b"*" * 65536, 997), [(1, b"*" * 65536)]),
    "2.1 empty ping": (frame(9), [(10, b"")]),
    "2.2 ping": (frame(9, b"Hello, world!"), [(10, b"Hello, world!")]),
    "2.3 binary ping": (frame(9, b"\x00\xff\xfe\xfd\x00"), [(10, b"\x00\xff\xfe\xfd\x00")]),
    "2.4 ping of 125": (frame(9, b"\xfe" * 125), [(10, b"\xfe" * 125)]),
    "2.7 unasked pong": (frame(10), []),
    "2.8 unasked pong with data": (frame(10, b"unsolicited"), []),
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
# Chapter 6, what is UTF-8: also the ends of each range, and characters outside Unicode's first plane.
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
async def test_what_a_conforming_peer_may_do(name: str) -> None:
    sent, expected = PASS[name]
    async with staged() as stage:
        whole, dribbling = await stage.open(), await stage.open()
        whole.send(sent + text("end"))
        await eventually(lambda: whole.frames[-1:] == [(1, b"end")])
        assert whole.frames == [*expected, (1, b"end")]
        if len(sent) < 500:
            for byte in sent + text("end"):
                stage.sessions[1].connection.dataReceived(bytes([byte]))
            await eventually(lambda: dribbling.frames[-1:] == [(1, b"end")])
            assert dribbling.frames == whole.frames
        for client in (whole, dribbling):
            client.leave()


# What must fail the connection: the bytes, and the close code.
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
    "5.9 continuation of nothing": (frame(0, b"a") + text("b"), 1002),
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
async def test_what_fails_the_connection(name: str) -> None:
    data, code = FAIL[name]
    async with staged() as stage:
        client = await stage.open()
        client.send(data + text("never heard"))
        assert (await client.closed())[0] == code
        await eventually(lambda: client.lost)
        assert b"never heard" not in stage.sessions[0].received
        assert sum(opcode == 8 for opcode, _ in client.frames) == 1
        assert stage.sessions[0].ends == 1
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


async def test_what_comes_behind_the_handshake_is_frames() -> None:
    async with staged() as stage:
        client = await stage.request(handshake() + text("one") + text("two"))
        await eventually(lambda: client.texts == ["one", "two"])
        client.leave()
        second = await stage.request(handshake() + handshake())
        assert (await second.closed())[0] == 1002
        assert second.received.count(b"HTTP/1.1") == 1


async def test_two_hundred_come_and_a_hundred_may() -> None:
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
        ((), "", text("{}"), binary(b"\0")),
        ((), "?format=json", text("{}"), binary(b"\0")),
        (("Sec-WebSocket-Protocol: centrifuge-json",), "", text("{}"), binary(b"\0")),
        ((PROTOBUF,), "", binary(b"\xff\0"), text("\0")),
        ((), "?format=protobuf", binary(b"\xff\0"), text("\0")),
        ((), "?cf_protocol=protobuf", binary(b"\xff\0"), text("\0")),
    ],
)
async def test_the_kind_of_messages_is_that_of_the_encoding(
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


# Unfinished messages


async def test_a_message_that_is_never_finished() -> None:
    async with staged() as stage:
        client, bystander = await stage.open(), await stage.open()
        client.send(frame(1, b"x" * 1000, fin=False))
        await eventually(lambda: stage.websocket.queued.size == 1000)
        stage.advance(9.5)
        for _ in range(3):  # a byte now and then does not help
            client.send(frame(0, b"x", fin=False))
            await eventually(lambda: True)
        assert client.close is None
        stage.advance(1.0)
        assert await client.closed() == (1008, "policy violation")
        assert stage.websocket.queued.size == 0
        await bystander.echo("unaffected")
        bystander.leave()


@pytest.mark.parametrize("start", [frame(1, b"x" * 100)[:50], frame(1, b"x" * 60_000)[:30_000]])
async def test_a_frame_that_is_never_finished(start: bytes) -> None:
    async with staged() as stage:
        client = await stage.open()
        client.send(start)
        await eventually(lambda: stage.websocket.queued.size > 0)
        stage.advance(10.5)
        assert await client.closed() == (1008, "policy violation")


async def test_messages_that_are_finished_in_time_leave_no_deadline() -> None:
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


async def test_a_message_is_not_late_while_the_server_does_not_read() -> None:
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


async def test_without_a_limit_a_message_may_take_for_ever() -> None:
    async with staged(websocket=settings.WebSocketSettings(message_timeout=0.0)) as stage:
        client = await stage.open()
        client.send(frame(1, b"x", fin=False))
        await eventually(lambda: stage.websocket.queued.size > 0)
        stage.advance(1000.0)
        client.send(frame(0, b"y"))
        await eventually(lambda: client.texts == ["xy"])
        client.leave()


async def test_a_peer_that_leaves_in_the_middle_of_a_message_leaves_nothing() -> None:
    async with staged() as stage:
        for start in (frame(1, b"x" * 1000, fin=False), frame(1, b"x" * 1000)[:500]):
            client = await stage.open()
            client.send(start)
            await eventually(lambda: stage.websocket.queued.size > 0)
            client.leave()
            await eventually(lambda: stage.websocket.connections == 0)
            assert stage.websocket.queued.size == 0


# Compression


def deflated(payload: bytes, level: int = 6) -> bytes:
    """The payload of a compressed message, as a client makes it."""
    deflater = zlib.compressobj(level, zlib.DEFLATED, -15)
    return (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\0\0\xff\xff")


def zipped(payload: bytes, opcode: int = 1) -> bytes:
    return frame(opcode, deflated(payload), rsv=4)


def extensions(client: Client) -> bytes:
    return b"".join(line for line in client.response.split(b"\r\n") if line.lower().startswith(b"sec-websocket-ext"))


async def test_both_sides_compress() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        client = await stage.open(DEFLATE)
        assert b"server_no_context_takeover; client_no_context_takeover" in extensions(client)
        message = "again and again " * 100
        client.send(zipped(message.encode()) + text("plain") + zipped(b"ok"))
        await eventually(lambda: client.texts == [message, "plain", "ok"])
        first = client.received.partition(b"\r\n\r\n")[2]
        assert first[0] == 0xC1
        assert len(first) < 200
        client.leave()


async def test_compressed_messages_in_fragments_with_pings_between() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        client = await stage.open(DEFLATE)
        message = "".join(map(chr, range(32, 2000)))
        payload = deflated(message.encode())
        sent = b"".join(
            frame(0 if start else 1, payload[start : start + 7], fin=False, rsv=0 if start else 4)
            + (frame(9, b"p") if start % 700 == 0 else b"")
            for start in range(0, len(payload), 7)
        )
        client.send(sent + frame(0))
        await eventually(lambda: client.texts == [message])
        client.leave()


async def test_protobuf_and_the_unidirectional_endpoint_compress_too() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        client = await stage.open(DEFLATE, PROTOBUF)
        client.send(zipped(b"\xff\0" * 100, opcode=2))
        await eventually(lambda: client.frames == [(2, b"\xff\0" * 100)])
        assert client.received.partition(b"\r\n\r\n")[2][0] == 0xC2
        client.leave()
    async with staged(websocket=settings.UniWebSocketSettings(compression=True)) as stage:
        client = await stage.open(DEFLATE)
        client.send(zipped(b"{}" * 100))
        await eventually(lambda: client.texts == ["{}" * 100])
        client.leave()


async def test_what_goes_to_many_is_compressed_once() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        offers = ("", "; server_max_window_bits=15", "; server_max_window_bits=12; client_max_window_bits")
        clients = [await stage.open(f"Sec-WebSocket-Extensions: permessage-deflate{offer}") for offer in offers]
        clients += [await stage.open("Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=9")]
        clients += [await stage.open(), await stage.open(DEFLATE, PROTOBUF)]
        forms = [session.connection.form for session in stage.sessions]
        assert forms[0] is forms[1] is forms[2]
        assert len(set(forms)) == 4
        for client in clients:
            client.leave()


async def test_compression_is_off_unless_it_is_asked_for() -> None:
    async with staged() as stage:
        client = await stage.open(DEFLATE)
        assert extensions(client) == b""
        client.send(zipped(b"hello"))
        assert (await client.closed())[0] == 1002


async def test_offers_that_can_not_be_kept_are_declined_without_a_word() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        for offers in ("x", "permessage-deflate; server_max_window_bits=7", "permessage-deflate; a=b;;=", '"' * 500):
            client = await stage.open(f"Sec-WebSocket-Extensions: {offers}")
            assert extensions(client) == b""
            await client.echo("plain")
            client.leave()
        client = await stage.open("Sec-WebSocket-Extensions: x", "Sec-WebSocket-Extensions: permessage-deflate")
        assert b"permessage-deflate" in extensions(client)
        client.leave()


async def test_small_messages_stay_as_they_are() -> None:
    async with staged(websocket=settings.WebSocketSettings(compression=True, compression_min_size=100)) as stage:
        client = await stage.open(DEFLATE)
        for length, first in ((99, 0x81), (100, 0xC1)):
            before = len(client.received)
            client.send(text("x" * length))
            await eventually(lambda length=length: "x" * length in client.texts)
            assert client.received[before] == first
        client.leave()


BROKEN_COMPRESSION: dict[str, tuple[bytes, int]] = {
    "reserved bit 2": (frame(1, deflated(b"a"), rsv=6), 1002),
    "reserved bit 3": (frame(1, deflated(b"a"), rsv=5), 1002),
    "a compressed ping": (frame(9, deflated(b"a"), rsv=4), 1002),
    "a compressed close": (frame(8, deflated(b"\x03\xe8"), rsv=4), 1002),
    "the bit on a continuation": (frame(1, b"\xf2", fin=False, rsv=4) + frame(0, b"\x48", rsv=4), 1002),
    "the bit on a continuation of a plain one": (frame(1, b"a", fin=False) + frame(0, b"b", rsv=4), 1002),
    "garbage": (frame(1, b"\xff" * 50, rsv=4), 1007),
    "cut off": (frame(1, deflated(b"again and again " * 20)[:9], rsv=4), 1007),
    "with more behind": (frame(1, deflated(b"hello") + b"\0\0\xff\xff" + b"\xff\xff\xff", rsv=4), 1007),
    "empty": (frame(1, b"", rsv=4), 1007),
    "not UTF-8": (zipped(b"a\xff"), 1007),
    "context of the message before": (zipped(b"Hello") + frame(1, b"\xf2\x00\x11\x00\x00", rsv=4), 1007),
    "binary": (zipped(b"\0", opcode=2), 3501),
    "60 MB of zeros": (frame(1, deflated(bytes(60 << 20), 9), rsv=4), 1009),
    "60 MB of zeros in 1000 fragments": (
        (lambda data: frame(1, data[:61], fin=False, rsv=4) + pieces(data[61:], 61, opcode=0))(
            deflated(bytes(60 << 20), 9)
        ),
        1009,
    ),
    "60 MB of zeros after a good message": (zipped(b"hello") + frame(1, deflated(bytes(60 << 20), 9), rsv=4), 1009),
    "one byte over the limit": (zipped(b"x" * 655_361), 1009),
    "too long as it is sent": (frame(1, random.Random(1).randbytes(65_537), rsv=4), 1009),
    "too many fragments": (
        frame(1, b"", fin=False, rsv=4) + frame(0, b"", fin=False) * 1100,
        1008,
    ),
}


@pytest.mark.parametrize("name", BROKEN_COMPRESSION)
async def test_broken_compression(name: str) -> None:
    data, code = BROKEN_COMPRESSION[name]
    async with staged(websocket=COMPRESSING) as stage:
        client, bystander = await stage.open(DEFLATE), await stage.open(DEFLATE)
        client.send(data)
        assert (await client.closed())[0] == code
        await eventually(lambda: client.lost)
        assert stage.websocket.queued.size == 0
        assert len(stage.sessions[0].received) == ("good" in name or "before" in name)
        assert not stage.failures
        await bystander.echo("unaffected")
        bystander.leave()


async def test_the_largest_inflated_message_passes() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        stage.make_session = Heard
        client = await stage.open(DEFLATE)
        client.send(zipped(b"x" * 655_360))
        await eventually(lambda: len(stage.sessions[0].received) == 1)
        assert len(stage.sessions[0].received[0]) == 655_360
        client.leave()
    limited = settings.WebSocketSettings(compression=True, decompressed_message_size_limit=1000)
    async with staged(websocket=limited) as stage:
        client = await stage.open(DEFLATE)
        client.send(zipped(b"x" * 1000))
        await eventually(lambda: len(client.texts) == 1)
        client.send(zipped(b"x" * 1001))
        assert (await client.closed())[0] == 1009


async def test_an_idle_connection_keeps_neither_compressor_nor_decompressor() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        client = await stage.open(DEFLATE)
        client.send(zipped(b"again and again " * 20))
        await eventually(lambda: len(client.texts) == 1)
        kept = vars(stage.sessions[0].connection)
        assert kept["_perMessageCompress"]._inflater is None
        assert len(kept) <= 20  # with what a message by Autobahn leaves
        client.leave()


async def test_a_compressed_conversation_cut_at_every_byte() -> None:
    payload = deflated("grüße ".encode() * 20)
    talk = zipped(b"one") + frame(1, payload[:5], fin=False, rsv=4) + frame(9, b"p") + frame(0, payload[5:]) + frame(8)
    async with staged(websocket=COMPRESSING) as stage:
        bystander = await stage.open(DEFLATE)
        clients = [await stage.open(DEFLATE) for _ in talk]
        for cut, client in enumerate(clients):
            client.send(talk[:cut])
        await eventually(lambda: b"one" in stage.sessions[-1].received)
        for cut, client in enumerate(clients):
            if cut % 2:
                client.leave()
            else:
                client.transport.abortConnection()
        await eventually(lambda: stage.websocket.connections == 1)
        assert stage.websocket.queued.size == 0
        assert all(session.ends == 1 for session in stage.sessions[1:])
        assert not stage.failures
        await bystander.echo("unaffected")
        bystander.leave()


# The unidirectional endpoint

UNI = settings.UniWebSocketSettings(enabled=True)


async def test_the_first_message_is_heard_and_later_ones_are_not() -> None:
    async with staged(websocket=UNI) as stage:
        client = await stage.open()
        client.send(text('{"token":"x"}') + text("{}") + text("anything") * 3)
        await eventually(lambda: stage.count("ignored") == 4)
        assert stage.sessions[0].received == [b'{"token":"x"}']
        assert client.texts == ['{"token":"x"}']
        stage.sessions[0].connection.send(b'{"channel":"c"}')
        await eventually(lambda: len(client.texts) == 2)
        client.leave()


async def test_the_request_may_come_in_the_address() -> None:
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


async def test_who_goes_on_talking_is_shown_out() -> None:
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


async def test_each_has_a_secret_of_its_own_there_and_nobody_elsewhere() -> None:
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


async def test_protobuf_is_not_spoken_there() -> None:
    async with staged(websocket=UNI) as stage:
        client = await stage.request(handshake(PROTOBUF, path=UNI.handler_prefix + "?format=protobuf"))
        assert client.status == 101
        assert b"centrifuge-protobuf" not in client.response
        client.send(binary(b"\0"))
        assert (await client.closed())[0] == 3501


# Pings by frames

FRAME_PINGS = "/connection/websocket?cf_ws_frame_ping_pong=true"


async def pinged(stage: Stage, client: Client, number: int) -> None:
    """Let time pass until the ping of that number."""
    before = stage.now
    while sum(opcode == 9 for opcode, _ in client.frames) < number:
        assert stage.now - before <= 26.0
        stage.advance(0.25)
        await eventually(lambda: True)


async def test_frame_pings() -> None:
    async with staged() as stage:
        client = await stage.request(handshake(path=FRAME_PINGS))
        assert not stage.sessions[0].connection.pings
        for number in range(1, 4):
            await pinged(stage, client, number)
            client.send(frame(10))
            await client.echo(f"answered {number}")  # so the pong has been read
        assert stage.count("pong") == 0
        stage.advance(12.0)
        assert client.close is None
        client.leave()


async def test_frame_pings_that_are_not_answered() -> None:
    async with staged() as stage:
        client = await stage.request(handshake(path=FRAME_PINGS))
        await pinged(stage, client, 1)
        await client.echo("this is no pong")
        stage.advance(8.5)
        assert await client.closed() == (3012, "no pong")


async def test_a_client_that_is_not_read_owes_no_pong() -> None:
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
async def test_frame_pings_that_ask_for_no_pong(client: settings.ClientSettings) -> None:
    async with staged(client=client) as stage:
        peer = await stage.request(handshake(path=FRAME_PINGS))
        stage.advance(101.0)
        await peer.echo("still open")
        pings = sum(opcode == 9 for opcode, _ in peer.frames)
        assert pings in (range(4, 6) if client.ping_interval else (0,))
        peer.leave()


# Floods


async def test_unasked_pongs_are_counted_and_too_many_are_too_many() -> None:
    async with staged() as stage:
        client = await stage.open()
        client.send(frame(10, b"p") * 40)
        await client.echo("still open")
        assert stage.count("pong") == 40
        client.send(frame(10, b"p") * 10_000)
        assert await client.closed() == (1008, "policy violation")


class Slow(Echo):
    """Takes its time for each message. `turns`: the number of messages before each turn of the loop."""

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


async def test_many_messages_in_one_segment_are_handled_a_slice_at_a_time_and_in_order() -> None:
    async with staged() as stage:
        stage.make_session = Slow
        client = await stage.open()
        numbers = [b"%d" % number for number in range(100)]
        client.send(b"".join(frame(1, number) for number in numbers))
        await eventually(lambda: len(stage.sessions[0].received) == 100)
        assert stage.sessions[0].received == numbers
        await eventually(lambda: sum(stage.sessions[0].stretches) == 100)
        assert len(stage.sessions[0].stretches) > 10
        assert stage.sessions[0].connection.is_read
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


async def test_a_flood_of_tiny_messages_does_not_keep_the_others_waiting() -> None:
    async with staged() as stage:
        stage.make_session = lambda *of: (Heard if len(stage.sessions) == 1 else Echo)(*of)
        bystander = await stage.open()
        flooder = await stage.open()
        flooder.send(text("{}") * 100_000)
        answered = 0
        while len(stage.sessions[1].received) < 100_000:
            before = len(stage.sessions[1].received)
            await bystander.echo(f"{answered}")
            answered += 1
            # Of the flood, no more than a few slices' worth comes between a question and its answer.
            assert len(stage.sessions[1].received) - before < 20_000
        assert answered > 5
        for client in (bystander, flooder):
            client.leave()


async def test_what_was_read_waits_while_the_session_pauses() -> None:
    class Patient(Heard):
        def receive(self, payload: bytes) -> None:
            super().receive(payload)
            self.connection.pause()

    async with staged() as stage:
        stage.make_session = Patient
        client = await stage.open()
        client.send(text("one") + text("two") + frame(1, b"th", fin=False) + frame(0, b"ree") + text("four"))
        heard = stage.sessions[0].received
        for number in range(1, 5):
            await eventually(lambda number=number: len(heard) >= number)
            assert len(heard) == number
            stage.sessions[0].connection.resume()
        assert heard == [b"one", b"two", b"three", b"four"]
        client.leave()


async def test_a_session_that_resumes_within_its_message_is_not_entered_again() -> None:
    class Eager(Heard):
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


async def test_a_peer_that_takes_no_replies_is_not_read_until_it_does() -> None:
    queue = settings.ClientSettings(queue_max_size=4_000_000)
    async with staged(client=queue, websocket=settings.WebSocketSettings(write_timeout=0.0)) as stage:
        bystander = await stage.open()
        peer = stage.open_socket(4096)
        await eventually(lambda: len(stage.sessions) == 2)
        connection = stage.sessions[1].connection
        connection.transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        command, sent, taken = text("x" * 10_000), 0, bytearray()
        message = memoryview(command * 2000)
        while not connection._held:
            with suppress(BlockingIOError):
                sent += peer.send(message[sent : sent + 100_000])
            await task.deferLater(reactor, 0)
        # Its replies wait, half of what may wait; what it sends on is the kernel's to keep.
        heard = len(stage.sessions[1].received)
        with suppress(BlockingIOError):
            while sent < len(message):
                sent += peer.send(message[sent : sent + 100_000])
        for number in range(5):
            await bystander.echo(f"unaffected {number}")
        assert len(stage.sessions[1].received) == heard < 2000
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


async def test_pings_of_a_peer_that_never_reads_end_it() -> None:
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


# Bytes that come one by one


async def test_dribbling_costs_no_more_than_its_bytes() -> None:
    async with staged() as stage:
        stage.make_session = Heard
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


def test_the_table_of_texts_is_right() -> None:
    for value in BAD_TEXTS:
        with pytest.raises(UnicodeDecodeError):
            value.decode()
    assert len(set(itertools.chain(PASS, FAIL))) == len(PASS) + len(FAIL)
