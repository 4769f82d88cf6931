"""The clients' port, with raw requests over real sockets: limits, deadlines, refusals, and routing by path."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest
from twisted.internet import reactor, task

from realtime.config import settings
from realtime.handlers.results import PreparedResponse
from realtime.http.request import Refusal
from realtime.transports import frontend
from tests.transports.stage import ACCEPT, PATH, Stage, eventually, handshake, staged, text

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


async def test_a_page_and_a_websocket_on_one_port() -> None:
    async with staged() as stage:
        page = await stage.request(b"GET /x?y HTTP/1.1\r\nHost: h\r\n\r\n")
        await eventually(lambda: page.received.endswith(b"page /x "))
        assert page.status == 200
        socket = await stage.open()
        assert f"Sec-WebSocket-Accept: {ACCEPT}".encode() in socket.response
        assert b"Server: realtime\r\n" in socket.response
        await socket.echo("hello")
        page.leave()
        socket.leave()


async def test_a_request_with_a_body_reaches_the_site_whole() -> None:
    async with staged() as stage:
        client = await stage.connect(b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n01234")
        client.send(b"56789")
        await eventually(lambda: client.received.endswith(b"page /p 0123456789"))
        chunked = await stage.connect(b"POST /p HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        chunked.send(b"0\r\n\r\n")
        await eventually(lambda: chunked.received.endswith(b"page /p abc"))
        client.leave()
        chunked.leave()


async def test_requests_on_one_connection() -> None:
    post = b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
    async with staged() as stage:
        client = await stage.request(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
        client.send(post)
        await eventually(lambda: client.received.endswith(b"page /b abc"))
        client.send(post.replace(b"/b", b"/c") + post.replace(b"/b", b"/d") + GET)  # pipelined
        await eventually(lambda: client.received.endswith(b"page / "))
        assert re.findall(rb"page (\S+)", bytes(client.received)) == [b"/a", b"/b", b"/c", b"/d", b"/"]
        for byte in post.replace(b"/b", b"/e"):
            client.send(bytes([byte]))
        await eventually(lambda: client.received.endswith(b"page /e abc"))
        client.leave()


@pytest.mark.parametrize(
    "name", ["folded line", "vertical tab", "odd coding", "length and chunks", "many headers", "zeros"]
)
async def test_a_later_request_is_checked_like_the_first(name: str) -> None:
    async with staged() as stage:
        post = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
        client = await stage.connect(post + REFUSED[name][0] + b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n")
        await eventually(lambda: client.lost)
        statuses = re.findall(rb"HTTP/1.1 (\d+)", bytes(client.received))
        assert statuses == [b"200", b"%d" % REFUSED[name][1]]
        assert b"smuggled" not in client.received


async def test_a_later_head_that_trickles_in_is_cut_at_the_deadline() -> None:
    async with staged() as stage:
        client = await stage.request(GET)
        stage.advance(20)
        assert not client.lost
        client.send(b"G")
        await eventually(lambda: any(front._parser for front in stage.front.idle))
        stage.advance(5.25)
        await eventually(lambda: client.lost)
        assert stage.count("head_timeout") == 1


async def test_no_request_follows_a_chunked_body() -> None:
    async with staged() as stage:
        chunked = (
            b"POST /a HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        )
        client = await stage.connect(chunked + GET)
        await eventually(lambda: client.lost)
        assert re.findall(rb"page (\S+)", bytes(client.received)) == [b"/a"]


async def test_a_peer_that_does_not_read_its_response_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "HTTP_USER_TIMEOUT", 50)
    async with staged() as stage:
        peer = stage.open_socket(4096, b"GET /large HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        await eventually(lambda: stage.gauge("realtime_http_connections") == 1)
        await eventually(lambda: stage.gauge("realtime_http_connections") == 0)
        peer.close()


async def test_a_head_in_single_bytes() -> None:
    async with staged() as stage:
        client = await stage.connect()
        for byte in handshake():
            client.send(bytes([byte]))
            if random.random() < 0.1:
                await eventually(lambda: True)
        await eventually(lambda: client.status == 101)
        await client.echo("works")
        client.leave()


async def test_bytes_after_the_handshake_are_frames() -> None:
    async with staged() as stage:
        client = await stage.request(handshake() + text("at once") + text("and more"))
        await eventually(lambda: client.texts == ["at once", "and more"])
        client.leave()


async def test_the_session_gets_the_opening_request() -> None:
    async with staged() as stage:
        client = await stage.request(handshake("Cookie: a=b", "X-Forwarded-For: 6.6.6.6", path=PATH + "?t=%C3%A4"))
        assert client.status == 101
        request = stage.sessions[0].request
        assert request.headers["cookie"] == "a=b"
        assert (request.path, request.query) == (PATH, {"t": "ä"})
        assert request.remote_address == "127.0.0.1"
        client.leave()


LINE = b"GET / HTTP/1.1\r\nHost: h\r\n"
REFUSED: dict[str, tuple[bytes, int]] = {
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "zeros": (b"\x00" * 64, 400),
    "socks": (b"\x05\x01\x00", 400),
    "blank line first": (b"\r\n" + GET, 400),
    "bare line feeds": (b"GET / HTTP/1.1\nHost: h\n\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (LINE + b"Host: h\r\n\r\n", 400),
    "folded line": (LINE + b"A: b\r\n c\r\n\r\n", 400),
    "space before colon": (LINE + b"A : b\r\n\r\n", 400),
    "vertical tab": (LINE + b"A: b\x0bc\r\n\r\n", 400),
    "next line": (LINE + b"A: b\x85c\r\n\r\n", 400),
    "long path": (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
    "long header": (LINE + b"A: " + b"x" * 9000 + b"\r\n\r\n", 431),
    "many headers": (LINE + b"A: b\r\n" * 2000 + b"\r\n", 431),
    "two lengths": (LINE + b"Content-Length: 4\r\nContent-Length: 40\r\n\r\n", 400),
    "length and chunks": (LINE + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "odd length": (LINE + b"Content-Length: +4\r\n\r\n", 400),
    "odd coding": (LINE + b"Transfer-Encoding: xchunked\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "1,000 parameters": (b"GET /?" + b"a&" * 1000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    "plain GET": (f"GET {PATH} HTTP/1.1\r\nHost: h\r\n\r\n".encode(), 426),
    "redirect": (f"GET {PATH}?redirect=http://x&after=1 HTTP/1.1\r\nHost: h\r\n\r\n".encode(), 426),
    "old version": (handshake().replace(b"Version: 13", b"Version: 8"), 426),
    "POST": (handshake().replace(b"GET", b"POST"), 405),
    "HTTP/1.0": (handshake().replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
    "no key": (handshake().replace(b"Sec-WebSocket-Key", b"X"), 400),
    "two keys": (handshake("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="), 400),
    "body": (handshake("Content-Length: 4") + b"GET ", 400),
    "foreign origin": (handshake("Origin: http://evil.example"), 403),
    "null origin": (handshake("Origin: null"), 403),
}


async def test_a_query_of_too_many_parameters_is_counted_as_such() -> None:
    async with staged() as stage:
        client = await stage.request(REFUSED["1,000 parameters"][0])
        assert client.status == 400
        assert stage.count("parameters") == 1


@pytest.mark.parametrize("name", REFUSED)
async def test_a_refusal_is_one_complete_response_and_closes_the_connection(name: str) -> None:
    data, status = REFUSED[name]
    async with staged() as stage:
        client = await stage.request(data + b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n")
        await eventually(lambda: client.lost)
        assert client.status == status
        body = bytes(client.received.partition(b"\r\n\r\n")[2])
        assert f"Content-Length: {len(body)}\r\n".encode() in client.response + b"\r\n"
        assert b"Connection: close" in client.response
        assert b"Location" not in client.response
        assert client.received.count(b"HTTP/1.1 ") == 1
        assert b"smuggled" not in client.received
        assert not stage.sessions
        assert not stage.failures


async def test_refusals_are_counted_by_kind() -> None:
    async with staged() as stage:
        for name in ("TLS hello", "long path", "many headers", "plain GET", "null origin", "HTTP/2"):
            await stage.request(REFUSED[name][0])
        counts = {
            kind: stage.count(kind) for kind in ("head_syntax", "head_size", "handshake", "origin", "head_version")
        }
        assert counts == {"head_syntax": 1, "head_size": 2, "handshake": 1, "origin": 1, "head_version": 1}


async def test_random_bytes_never_raise() -> None:
    dice = random.Random(7)
    async with staged() as stage:
        bystander = await stage.open()
        for _ in range(200):
            client = await stage.connect(dice.randbytes(dice.randint(1, 300)))
            client.leave()
        await bystander.echo("still here")
        await eventually(lambda: stage.front.pending == 0)
        assert not stage.failures
        bystander.leave()


@pytest.mark.parametrize(
    "path",
    [
        PATH + "/",
        "/" + PATH,
        PATH.upper(),
        PATH.replace("web", "%77eb"),
        "/x/.." + PATH,
        PATH + "%00",
        PATH + ";a",
        "/connection",
    ],
)
async def test_only_the_exact_path_opens_a_websocket(path: str) -> None:
    async with staged() as stage:
        client = await stage.request(handshake(path=path))
        assert client.status == 200  # the site answered
        assert not stage.sessions
        client.leave()


async def test_a_site_path_does_not_redirect() -> None:
    async with staged() as stage:
        for path in ("/?redirect=http://x", "//x", "/%2f%2fx"):
            client = await stage.request(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            assert client.status == 200
            assert b"Location" not in client.response
            client.leave()


async def test_a_silent_connection_is_closed_at_the_deadline() -> None:
    async with staged() as stage:
        client = await stage.connect()
        await eventually(lambda: stage.front.pending == 1)
        assert stage.gauge("realtime_pending_connections") == 1
        stage.advance(4.5)
        assert stage.front.pending == 1
        stage.advance(1.0)
        await eventually(lambda: client.lost)
        assert client.received == b""
        assert stage.count("head_timeout") == 1


async def test_a_head_that_trickles_in_does_not_move_the_deadline() -> None:
    async with staged() as stage:
        clients = [await stage.connect() for _ in range(20)]
        await eventually(lambda: stage.front.pending == 20)
        for byte in LINE[:10]:
            for client in clients:
                client.send(bytes([byte]))
            await eventually(lambda: True)
            stage.advance(0.5)
        stage.advance(0.5)
        for client in clients:
            await eventually(lambda client=client: client.lost)
            assert client.status == 408
        assert stage.front.pending == 0


async def test_a_finished_head_has_no_deadline() -> None:
    async with staged() as stage:
        client = await stage.open()
        stage.advance(60)
        await client.echo("alive")
        client.leave()


async def test_a_peer_that_does_not_close_after_a_refusal_is_aborted() -> None:
    async with staged() as stage:
        peer = stage.open_socket(65536, b"GET / HTTP/1.1\n")
        await eventually(lambda: stage.count("head_syntax") == 1)
        for _ in range(3):  # the peer may still send, without causing a reset
            peer.sendall(b"x" * 1000)
            await eventually(lambda: True)
        stage.advance(1.75)
        assert stage.front.pending == 1
        stage.advance(0.5)
        await eventually(lambda: stage.front.pending == 0)
        assert peer.recv(10000).startswith(b"HTTP/1.1 400 ")
        peer.close()


async def test_a_peer_that_goes_on_sending_after_a_refusal_is_aborted() -> None:
    async with staged() as stage:
        client = await stage.connect(LINE)
        client.send(b"A: b\r\n" * 200_000)
        await eventually(lambda: client.status == 431)
        await eventually(lambda: client.lost or stage.front.pending == 1)
        stage.advance(3)
        await eventually(lambda: client.lost)
        assert stage.front.pending == 0


async def test_an_overloaded_worker_refuses_websockets_without_counting_bad_input() -> None:
    async with staged() as stage:
        stage.refusal = Refusal(503, "too busy", "pressure")
        refused = await stage.request(handshake())
        assert refused.status == 503
        assert re.search(rb"Retry-After: (\d+)", refused.response)
        assert stage.websocket.connections == 0
        assert not [
            sample for sample in stage.metrics.snapshot() if sample.name == "realtime_bad_input" and sample.value
        ]
        bad = await stage.request(handshake().replace(b"Version: 13", b"Version: 12"))
        assert bad.status == 426  # of two reasons, the permanent one is reported
        stage.refusal = None
        client = await stage.open()
        client.leave()


async def test_the_connection_limit() -> None:
    async with staged(client=settings.ClientSettings(connection_limit=2)) as stage:
        first, second = await stage.open(), await stage.open()
        waits = set()
        for _ in range(20):
            refused = await stage.request(handshake())
            assert refused.status == 503
            match = re.search(rb"Retry-After: (\d+)", refused.response)
            assert match is not None
            waits.add(int(match[1]))
        assert waits <= set(range(3, 11))
        assert len(waits) > 1
        assert stage.count("connection_limit") == 20
        assert stage.gauge("realtime_connections") == 2
        page = await stage.request(GET)
        assert page.status == 200
        await first.echo("undisturbed")
        second.leave()
        await eventually(lambda: stage.websocket.connections == 1)
        third = await stage.open()
        for client in (first, third, page):
            client.leave()


async def test_an_allowed_origin() -> None:
    async with staged(client=settings.ClientSettings(allowed_origins=("https://*.example",))) as stage:
        client = await stage.open("Origin: https://App.example")
        await client.echo("hello")
        refused = await stage.request(handshake("Origin: http://localhost"))
        assert refused.status == 403
        client.leave()


async def test_the_same_origin_needs_no_setting() -> None:
    async with staged() as stage:
        client = await stage.request(handshake("Origin: https://app.example:8000", host="app.example:8000"))
        assert client.status == 101
        client.leave()


async def test_an_empty_websocket_path_leaves_all_requests_to_the_site() -> None:
    async with staged(websocket=settings.WebSocketSettings(handler_prefix="")) as stage:
        client = await stage.request(handshake())
        assert client.status == 200
        client.leave()


# Many requests on one connection

PIPELINE = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def test_pipelined_requests_are_answered_in_turns_with_other_work() -> None:
    # Faults 1.1: 64 KiB of requests were one step of half a second.
    async with staged() as stage:
        turns: list[float] = []

        def turn() -> None:
            turns.append(time.thread_time())

        looping = task.LoopingCall(turn)
        clients = [await stage.connect() for _ in range(5)]
        looping.start(0)
        for client in clients:
            client.send(PIPELINE * 2000)
        await eventually(lambda: all(client.received.count(b"page / ") == 2000 for client in clients))
        looping.stop()
        steps = [after - before for before, after in itertools.pairwise(turns)]
        # The slice, one request of each connection, and the work of the clients in this process.
        assert max(steps) < 0.05
        assert len(steps) > 50
        assert all(client.received.count(b"HTTP/1.1 200 OK") == 2000 for client in clients)
        for client in clients:
            client.leave()


async def test_requests_behind_a_slow_answer_wait_and_do_not_pile_up() -> None:
    async with staged() as stage:
        client = await stage.connect(b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n")
        await eventually(lambda: len(stage.page.pending) == 1)
        client.send(PIPELINE * 40_000)  # a megabyte
        await eventually(lambda: any(front._is_reading_paused for front in fronts(stage)))
        (front,) = fronts(stage)
        assert len(front._waiting) < 4 * frontend.MAX_WAITING
        stage.page.pending.pop().respond(PreparedResponse(200, b"slow"))
        await eventually(lambda: client.received.count(b"HTTP/1.1 200 OK") == 40_001)
        assert client.received.index(b"slow") < client.received.index(b"page /")
        client.leave()


async def test_data_that_arrives_between_the_steps_of_a_pipeline_comes_after_it() -> None:
    async with staged() as stage:
        client = await stage.connect()
        paths = [b"/%d" % number for number in range(3000)]
        for start in range(0, 3000, 100):
            client.send(b"".join(PIPELINE.replace(b"/ ", path + b" ") for path in paths[start : start + 100]))
            await task.deferLater(reactor, 0)
        await eventually(lambda: client.received.endswith(b"page /2999 "))
        assert re.findall(rb"page (/\d+)", bytes(client.received)) == paths
        client.leave()


async def test_a_peer_that_does_not_read_gets_no_further_responses() -> None:
    async with staged() as stage:
        peer = stage.open_socket(4096, b"GET /large HTTP/1.1\r\nHost: h\r\n\r\n" * 3)
        await eventually(lambda: any(front._is_congested for front in fronts(stage)))
        (front,) = fronts(stage)
        assert sum(map(len, front.transport._tempDataBuffer)) + len(front.transport.dataBuffer) <= 16_000_500
        peer.close()


async def test_a_chunk_of_bodies_and_heads_is_parsed_in_any_segmentation() -> None:
    dice = random.Random(5)
    requests = b"".join(
        b"POST /%d HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (number, number) + b"x" * number
        for number in range(40)
    )
    async with staged() as stage:
        for _ in range(5):
            client = await stage.connect()
            start = 0
            while start < len(requests):
                size = dice.randint(1, 200)
                client.send(requests[start : start + size])
                start += size
                if dice.random() < 0.3:
                    await task.deferLater(reactor, 0)
            await eventually(lambda client=client: client.received.endswith(b"page /39 " + b"x" * 39))
            found = re.findall(rb"page (/\d+) (x*)", bytes(client.received))
            assert found == [(b"/%d" % number, b"x" * number) for number in range(40)]
            client.leave()


def fronts(stage: Stage) -> list[frontend.HTTPFrontend]:
    """Return the frontends of the open connections."""
    return [front for front in stage.fronts if not front._is_lost]


# Kept-alive connections


async def test_the_keepalive_timeout_is_longer_than_that_of_proxies_by_default() -> None:
    # Faults 12.3.
    assert settings.HTTPServerSettings().keepalive_timeout > 60
    async with staged(http_server=settings.HTTPServerSettings(keepalive_timeout=90)) as stage:
        client = await stage.request(GET)
        stage.advance(80)
        client.send(GET)
        await eventually(lambda: client.received.count(b"page /") == 2)
        stage.advance(89)
        assert not client.lost
        stage.advance(2)
        await eventually(lambda: client.lost)
        assert stage.count("head_timeout") == 0


async def test_a_drain_announces_the_end_of_each_connection() -> None:
    # Faults 10.6.
    async with staged() as stage:
        client = await stage.request(GET)
        assert b"Connection: close" not in client.response
        stage.front.start_draining()
        assert not client.lost
        client.send(GET)
        await eventually(lambda: client.lost)
        assert client.received.count(b"HTTP/1.1 200 OK") == 2
        assert client.received.count(b"Connection: close") == 1


async def test_idle_connections_make_room_for_new_ones() -> None:
    # Faults 2.1.
    async with staged(client=settings.ClientSettings(connection_limit=5)) as stage:
        idle = [await stage.request(GET) for _ in range(5)]
        first = await stage.open()
        await eventually(lambda: idle[0].lost)
        others = [await stage.open() for _ in range(3)]
        await eventually(lambda: all(client.lost for client in idle[:4]))
        assert not idle[4].lost
        assert stage.metrics.counter("realtime_http_connections_dropped", "").value == 4
        for client in (first, *others, idle[4]):
            client.leave()


async def test_a_connection_with_an_unanswered_request_is_not_idle() -> None:
    async with staged(client=settings.ClientSettings(connection_limit=2)) as stage:
        busy = await stage.connect(b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n")
        await eventually(lambda: len(stage.page.pending) == 1)
        clients = [await stage.request(GET) for _ in range(4)]
        assert not busy.lost
        stage.page.pending.pop().respond(PreparedResponse(200, b"slow"))
        await eventually(lambda: busy.received.endswith(b"slow"))
        for client in (busy, *clients):
            client.leave()


async def test_the_limit_of_an_address() -> None:
    limited = settings.ClientSettings(connection_limit_per_address=2, trusted_proxies=("127.0.0.1",))
    async with staged(client=limited) as stage:
        first = await stage.open("X-Forwarded-For: 192.0.2.1")
        second = await stage.request(b"GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
        assert second.status == 200
        third = await stage.request(handshake("X-Forwarded-For: 192.0.2.1"))
        assert third.status == 503
        assert stage.count("connection_limit_per_address") == 1
        other = await stage.open("X-Forwarded-For: 192.0.2.2")
        first.leave()
        await eventually(lambda: stage.websocket.connections == 1)
        again = await stage.open("X-Forwarded-For: 192.0.2.1")
        for client in (second, other, again):
            client.leave()
        await eventually(lambda: not stage.admission._addresses)


# Heads


async def test_a_long_header_fits_a_raised_limit() -> None:
    # Faults 12.2.
    line = b"Cookie: " + b"x" * 30_000 + b"\r\n"
    async with staged(http_server=settings.HTTPServerSettings(max_header_bytes=65536)) as stage:
        client = await stage.request(b"GET / HTTP/1.1\r\nHost: h\r\n" + line + b"\r\n")
        assert client.status == 200
        client.leave()


async def test_a_target_in_absolute_form() -> None:
    # Faults 12.4.
    async with staged() as stage:
        client = await stage.request(b"GET http://localhost/x?y HTTP/1.1\r\nHost: other\r\n\r\n")
        await eventually(lambda: client.received.endswith(b"page /x "))
        client.leave()


async def test_http_1_0_gets_a_response_and_the_end() -> None:
    async with staged() as stage:
        client = await stage.request(b"GET /x HTTP/1.0\r\n\r\n")
        await eventually(lambda: client.lost)
        assert client.received.endswith(b"page /x ")
        assert b"Connection: close" in client.response


async def test_a_page_whose_name_was_pointed_at_this_server_is_refused() -> None:
    # Faults 12.7: DNS rebinding makes a foreign page one of the same origin.
    async with staged(client=settings.ClientSettings(insecure=True)) as stage:
        for host in ("evil", "evil.example", "evil.example:8000"):
            refused = await stage.request(handshake(f"Origin: http://{host}", host=host))
            assert refused.status == 403
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "named.example"):
            client = await stage.request(handshake(f"Origin: http://{host}", host=host))
            assert client.status == 101, host
            client.leave()
    async with staged() as stage:  # clients need a token
        client = await stage.request(handshake("Origin: http://chat.example", host="chat.example"))
        assert client.status == 101
        client.leave()
