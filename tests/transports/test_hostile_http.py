"""Hostile requests over real sockets: ambiguous framing, forged addresses, endless requests."""

from __future__ import annotations

import random
import re
import socket

import pytest

from realtime.config import settings
from tests.transports.stage import PATH, Client, Stage, eventually, handshake, staged

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"


def request(*lines: bytes, first: bytes = b"POST /p HTTP/1.1") -> bytes:
    return b"\r\n".join([first, b"Host: h", *lines, b"", b""])


def chunked(body: bytes) -> bytes:
    return request(b"Transfer-Encoding: chunked") + body


_LENGTHS = """+5 -1 -0 1_0 0x5 5.0 5e0 5_ 5, 5,5 5,,5 ;5 5; 5;a five '5' "5" (5) 0b1 \u00bd \u0663 \uff10 -
9999999999999999999"""
_CODINGS = """xchunked chunkedx chunk chunked,chunked gzip,chunked chunked,gzip identity chunked,identity deflate
compress chunked;q=1 ,chunked chunked, "chunked" 'chunked' chunked\\ trailers,chunked \u0441hunked x-gzip,chunked"""
LENGTHS = [*_LENGTHS.split(), "5 5", "5\t6", "5\x0b"]
CODINGS = [*_CODINGS.split(), "chu nked", "chunked\xa0", "chunked\x0b"]
AMBIGUOUS: dict[str, bytes] = {
    **{f"length {value!r}": request(b"Content-Length: " + value.encode()) for value in LENGTHS},
    **{f"coding {value!r}": request(b"Transfer-Encoding: " + value.encode()) for value in CODINGS},
    "no length": request(b"Content-Length:"),
    "no coding": request(b"Transfer-Encoding:"),
    "the same length twice": request(b"Content-Length: 0", b"Content-Length: 0"),
    "two lengths": request(b"Content-Length: 0", b"Content-Length: 42"),
    "a length and a coding": request(b"Content-Length: 42", b"Transfer-Encoding: chunked"),
    "a coding and a length": request(b"Transfer-Encoding: chunked", b"Content-Length: 0"),
    "two codings": request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "a coding in HTTP/1.0": request(b"Transfer-Encoding: chunked", first=b"POST /p HTTP/1.0"),
    **{
        f"{prefix + name + suffix!r}": request(prefix + name + suffix + b": 0", b"X: y")
        for name in (b"Content-Length", b"Transfer-Encoding")
        for prefix, suffix in ((b"", b" "), (b"", b"\t"), (b"", b"\x00"), (b"\x0b", b""), (b" ", b""), (b"", b"\r"))
    },
    "a folded line": request(b"Content-Length:", b" 42"),
    "a folded coding": request(b"Transfer-Encoding:", b"\tchunked"),
    "a bare line feed": request(b"X: y\nContent-Length: 42"),
    "a bare carriage return": request(b"X: y\rContent-Length: 42"),
    "two carriage returns": request(b"X: y\r\r\nContent-Length: 42"),
    "a NUL": request(b"X: y\x00Content-Length: 42"),
    "a line without a colon": request(b"Content-Length 42"),
    "an empty name": request(b": 42"),
    "two hosts": request(b"Host: other"),
    "a head that ends with line feeds": b"POST /p HTTP/1.1\nHost: h\nContent-Length: 42\n\n",
}
# Chunked bodies whose end two parsers may see in different places.
CHUNKS: dict[str, bytes] = {
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "a size that is none": b"xyz\r\nabc\r\n0\r\n\r\n",
    "a signed size": b"+3\r\nabc\r\n0\r\n\r\n",
    "a negative size": b"-1\r\nabc\r\n0\r\n\r\n",
    "a size with a prefix": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a size with an underscore": b"0_3\r\nabc\r\n0\r\n\r\n",
    "a huge size": b"ffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "a size of many digits": b"0" * 5000 + b"3\r\nabc\r\n0\r\n\r\n",
    "a space before the size": b" 3\r\nabc\r\n0\r\n\r\n",
    "a NUL in an extension": b"3;a=\x00\r\nabc\r\n0\r\n\r\n",
    "a line feed in an extension": b"3;a=b\nabc\r\n0\r\n\r\n",
    "an endless extension": b"3;" + b"a" * 20_000 + b"\r\nabc\r\n0\r\n\r\n",
    "bare line feeds": b"3\nabc\n0\n\n",
    "more than its size": b"3\r\nabcdef\r\n0\r\n\r\n",
    "less than its size": b"5\r\nabc\r\n0\r\n\r\n",
    "no line end after it": b"3\r\nabc0\r\n\r\n",
}


async def refused(stage: Stage, data: bytes) -> list[bytes]:
    """Send a request; return the statuses of all responses, up to the end of the connection."""
    client = await stage.connect(data + SMUGGLED * 2)
    await eventually(lambda: client.lost)
    assert b"smuggled" not in client.received
    return re.findall(rb"HTTP/1.1 (\d+)", bytes(client.received))


async def test_ambiguous_framing_is_400_and_later_requests_are_not_answered() -> None:
    assert len(AMBIGUOUS) >= 60
    async with staged() as stage:
        for name, data in AMBIGUOUS.items():
            assert await refused(stage, data) == [b"400"], name
        assert not stage.failures


async def test_ambiguous_framing_after_a_valid_request_is_400() -> None:
    good = request(b"Content-Length: 3") + b"abc"
    async with staged() as stage:
        for name, data in AMBIGUOUS.items():
            assert await refused(stage, good + data) == [b"200", b"400"], name


@pytest.mark.parametrize("name", CHUNKS)
async def test_no_request_after_a_chunked_body_is_answered(name: str) -> None:
    async with staged() as stage:
        client = await stage.connect(chunked(CHUNKS[name]) + SMUGGLED * 2)
        await eventually(lambda: bool(client.received) or client.lost or stage.front.serving == 1)
        if not client.lost:
            client.transport.loseWriteConnection()
        await eventually(lambda: client.lost)
        assert b"smuggled" not in client.received
        assert len(re.findall(rb"HTTP/1.1 \d+", bytes(client.received))) <= 1
        assert not stage.failures


# -- forged client addresses ------------------------------------------------------------------------------------------

FORGED = [
    "X-Forwarded-For: 6.6.6.6",
    "X-Forwarded-For: 127.0.0.1, 6.6.6.6",
    "X-Real-IP: 6.6.6.6",
    "Forwarded: for=6.6.6.6",
    "True-Client-IP: 6.6.6.6",
    "CF-Connecting-IP: 6.6.6.6",
    "X-Client-IP: 6.6.6.6",
]


@pytest.mark.parametrize("line", FORGED)
async def test_forwarded_addresses_of_untrusted_peers_are_ignored(line: str) -> None:
    async with staged() as stage:
        client = await stage.open(line)
        assert stage.sessions[0].request.remote_address == "127.0.0.1"
        client.leave()
    trusting = settings.ClientSettings(trusted_proxies=("10.0.0.0/8",))
    async with staged(client=trusting) as stage:
        client = await stage.open(line)
        assert stage.sessions[0].request.remote_address == "127.0.0.1"
        client.leave()


@pytest.mark.parametrize(
    "header", [b"PROXY TCP4 6.6.6.6 127.0.0.1 1 2\r\n", b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"]
)
async def test_a_proxy_protocol_header_is_refused(header: bytes) -> None:
    async with staged() as stage:
        client = await stage.request(header + handshake())
        assert client.status == 400
        await eventually(lambda: client.lost)
        assert not stage.sessions


# -- endless requests -------------------------------------------------------------------------------------------------


async def test_unfinished_heads_do_not_block_other_connections() -> None:
    async with staged() as stage:
        slow = [await stage.connect(b"G") for _ in range(300)]
        await eventually(lambda: stage.front.pending == 300)
        for number in range(8):
            for client in slow:
                client.send(b"x")
            newcomer = await stage.open()
            await newcomer.echo(f"newcomer {number}")
            newcomer.leave()
            stage.advance(0.5)
        assert not any(client.lost for client in slow)
        stage.advance(1.25)
        for client in slow:
            await eventually(lambda client=client: client.lost)
            assert client.status == 408
        assert stage.count("head_timeout") == 300


async def test_a_head_of_many_megabytes_is_not_buffered() -> None:
    async with staged() as stage:
        bystander = await stage.open()
        client = await stage.connect(b"GET / HTTP/1.1\r\nHost: h\r\n")
        line = b"X: " + b"y" * 1000 + b"\r\n"
        client.send(line * 5_000)
        await eventually(lambda: client.status == 431)
        await bystander.echo("unaffected")
        stage.advance(3)
        await eventually(lambda: client.lost)
        assert stage.count("head_size") == 1
        bystander.leave()


# -- damaged requests -------------------------------------------------------------------------------------------------


async def test_damaged_handshakes_open_a_websocket_or_are_refused() -> None:
    dice = random.Random(3)
    offers = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    good = handshake("Origin: http://localhost", offers, "Sec-WebSocket-Protocol: centrifuge-json")
    websocket = settings.WebSocketSettings(compression=True)
    async with staged(websocket=websocket) as stage:
        bystander = await stage.open()
        statuses = set()
        for _ in range(200):
            data = bytearray(good)
            for _ in range(dice.randint(1, 3)):
                data[dice.randrange(len(data) - 4)] = dice.randrange(256)
            client: Client = await stage.connect(bytes(data))
            await eventually(lambda client=client: b"\r\n\r\n" in client.received)
            statuses.add(client.status)
            client.transport.abortConnection()
        assert statuses <= {101, 200, 400, 403, 404, 405, 426, 505}
        assert {101, 400} <= statuses
        await eventually(lambda: stage.websocket.connections == 1)
        await bystander.echo("unaffected")
        assert not stage.failures
        bystander.leave()


async def test_resets_at_any_moment_leave_no_state() -> None:
    dice = random.Random(4)
    data = handshake() + b"\x81\x85\0\0\0\0hello" * 50 + request(b"Content-Length: 3") + b"abc"
    async with staged() as stage:
        for _ in range(300):
            peer = socket.create_connection(("127.0.0.1", stage.port))
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.sendall(data[: dice.randrange(len(data))])
            if dice.random() < 0.5:
                await eventually(lambda: True)
            peer.close()
        await eventually(lambda: stage.front.pending == stage.websocket.connections == 0)
        await eventually(lambda: all(session.ends == 1 for session in stage.sessions))
        assert not stage.failures


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *(PATH + end for end in ("/", "//", "/.", "%2f", "%20", ";x", ".html", "%00", "%0d%0aX:y", "\\")),
        *(start + PATH for start in ("/", "/.", "/x/..", "/%2e", "//h", "/%2f")),
        *(PATH.replace("/websocket", end) for end in ("/Websocket", "%2fwebsocket", "/web%73ocket", "/../websocket")),
    ],
)
async def test_only_the_exact_spelling_of_the_path_opens_a_websocket(path: str) -> None:
    async with staged() as stage:
        client = await stage.request(handshake(path=path))
        assert client.status == 200  # of the page that serves all other paths
        assert b"Location" not in client.response
        assert not stage.sessions
        client.leave()
