"""Compressed WebSocket connections over real sockets: negotiation, both directions, and invalid compressed data."""

from __future__ import annotations

import random
import zlib

import pytest

from realtime.config import settings
from tests.transports.stage import Client, eventually, frame, staged, text
from tests.transports.test_websocket_faults import PROTOBUF, Silent, pieces

DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
COMPRESSING = settings.WebSocketSettings(compression=True)


def deflated(payload: bytes, level: int = 6) -> bytes:
    """Return the payload of a compressed message, as a client makes it."""
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


async def test_connections_with_one_window_share_a_wire_format() -> None:
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


async def test_compression_is_off_by_default() -> None:
    async with staged() as stage:
        client = await stage.open(DEFLATE)
        assert extensions(client) == b""
        client.send(zipped(b"hello"))
        assert (await client.closed())[0] == 1002


async def test_unsupported_offers_are_declined_and_the_connection_stays_uncompressed() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        for offers in ("x", "permessage-deflate; server_max_window_bits=7", "permessage-deflate; a=b;;=", '"' * 500):
            client = await stage.open(f"Sec-WebSocket-Extensions: {offers}")
            assert extensions(client) == b""
            await client.echo("plain")
            client.leave()
        client = await stage.open("Sec-WebSocket-Extensions: x", "Sec-WebSocket-Extensions: permessage-deflate")
        assert b"permessage-deflate" in extensions(client)
        client.leave()


async def test_messages_below_the_minimum_size_are_not_compressed() -> None:
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
    "with trailing data": (frame(1, deflated(b"hello") + b"\0\0\xff\xff" + b"\xff\xff\xff", rsv=4), 1007),
    "empty": (frame(1, b"", rsv=4), 1007),
    "not UTF-8": (zipped(b"a\xff"), 1007),
    "context of the message before": (zipped(b"Hello") + frame(1, b"\xf2\x00\x11\x00\x00", rsv=4), 1007),
    "60 MB of zeros": (frame(1, deflated(bytes(60 << 20), 9), rsv=4), 1009),
    "60 MB of zeros in 1000 fragments": (
        (lambda data: frame(1, data[:61], fin=False, rsv=4) + pieces(data[61:], 61, opcode=0))(
            deflated(bytes(60 << 20), 9)
        ),
        1009,
    ),
    "60 MB of zeros after a good message": (zipped(b"hello") + frame(1, deflated(bytes(60 << 20), 9), rsv=4), 1009),
    "one byte over the limit of a command": (zipped(b"x" * 65_537), 1009),
    "one byte over the limit of a batch, commands before": (zipped(b"\n" * 655_361), 1009),
    "compressed size over the limit": (frame(1, random.Random(1).randbytes(1_310_721), rsv=4), 3013),
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
        assert bool(stage.sessions[0].received) == ("good" in name or "before" in name)
        assert not stage.failures
        await bystander.echo("unaffected")
        bystander.leave()


async def test_an_inflated_batch_of_the_largest_size_is_accepted() -> None:
    async with staged(websocket=COMPRESSING) as stage:
        stage.make_session = Silent
        client = await stage.open(DEFLATE)
        client.send(zipped((b"x" * 65_535 + b"\n") * 10))
        await eventually(lambda: sum(map(len, stage.sessions[0].received)) == 655_360)
        client.send(zipped(b"x" * 65_536))
        await eventually(lambda: len(stage.sessions[0].received[-1]) == 65_536)
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
        assert len(kept) <= 20  # including the attributes that Autobahn sets for a message
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
        await eventually(lambda: all(session.ends == 1 for session in stage.sessions[1:]))
        assert not stage.failures
        await bystander.echo("unaffected")
        bystander.leave()
