"""HTTP requests over real sockets: bodies within their limits, refusals, and idle connections."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.logger import globalLogPublisher

from realtime.config.settings import HTTPServerSettings
from tests.driving import on_loop
from tests.transports.http_site import KEY, LIMIT, Site, fetch, post, site_for_test, status_of


@pytest.fixture
def site() -> Iterator[Site]:
    with site_for_test() as site:
        yield site


WITH_KEY = f"X-API-Key: {KEY}".encode()


@pytest.mark.parametrize("path", ["/api/publish", "/take"])
@on_loop
async def test_a_declared_body_over_the_limit_is_refused_by_its_head(site: Site, path: str) -> None:
    @site.app.http.post("/take")
    async def take(request: Any) -> Any:
        return len(request.body)

    await site.start()
    answer = await site.raw(post(path, b"", WITH_KEY, b"Content-Length: 200000000"))
    assert status_of(answer) == 413
    assert b"Connection: close" in answer
    assert site.faults() == {"body_too_large": 1}


@pytest.mark.parametrize("path", ["/api/publish", "/take"])
@on_loop
async def test_a_body_of_very_many_tiny_chunks_is_refused(site: Site, path: str) -> None:
    @site.app.http.post("/take")
    async def take(request: Any) -> Any:
        return len(request.body)

    await site.start()
    answer = await site.raw(
        post(path, b"1\r\nx\r\n" * (LIMIT - 1) + b"0\r\n\r\n", WITH_KEY, b"Transfer-Encoding: chunked")
    )
    assert status_of(answer) == 400
    assert b"Connection: close" in answer
    assert site.faults() == {"body_syntax": 1}


@on_loop
async def test_chunked_body_is_refused_at_the_byte_that_passes_the_limit(site: Site) -> None:
    calls = []

    @site.app.http.post("/take")
    async def take(request: Any) -> Any:
        calls.append(len(request.body))
        return len(request.body)

    await site.start()
    chunked = b"Transfer-Encoding: chunked"
    fits = b"1000\r\n" + b"x" * LIMIT + b"\r\n0\r\n\r\n"
    assert (await site.raw(post("/take", fits, chunked))).endswith(b"\r\n\r\n4096")
    one_more = b"1000\r\n" + b"x" * LIMIT + b"\r\n1\r\nx\r\n"
    assert status_of(await site.raw(post("/take", one_more, chunked))) == 413
    assert status_of(await site.raw(post("/take", one_more + b"0\r\n\r\n", chunked))) == 413
    assert calls == [LIMIT]


@on_loop
async def test_a_refusal_arrives_while_the_peer_is_still_sending(site: Site) -> None:
    await site.start()
    answer = await site.raw(
        post("/api/publish", b"", WITH_KEY, b"Content-Length: 3000000"), *[b"x" * 100_000 for _ in range(20)]
    )
    assert status_of(answer) == 413


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/publish", [WITH_KEY], b"HTTP/1.1 100 Continue"),
        ("/api/publish", [b"X-API-Key: wrong"], b"HTTP/1.1 401 Unauthorized"),
        ("/api/publish", [WITH_KEY, b"Content-Encoding: gzip"], b"HTTP/1.1 415 Unsupported Media Type"),
        ("/nowhere", [], b"HTTP/1.1 404 Not Found"),
    ],
)
@on_loop
async def test_100_continue_is_sent_only_for_an_acceptable_request(
    site: Site, path: str, headers: list[bytes], status: bytes
) -> None:
    await site.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(post(path, b"", *headers, b"Expect: 100-continue", b"Content-Length: 2"))
    assert (await reader.readline()).strip() == status
    writer.close()


@on_loop
async def test_a_body_over_the_limit_gets_no_100_continue(site: Site) -> None:
    await site.start()
    answer = await site.raw(post("/api/publish", b"", WITH_KEY, b"Expect: 100-continue", b"Content-Length: 200000000"))
    assert status_of(answer) == 413


@on_loop
async def test_a_trickling_body_has_an_absolute_deadline() -> None:
    site = Site(body_timeout=0.2)
    await site.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(post("/api/publish", b"", WITH_KEY, b"Content-Length: 1000"))
        answer = asyncio.ensure_future(reader.read())
        while not answer.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)
        assert status_of(await answer) == 408
        assert site.faults() == {"body_timeout": 1}
        writer.close()
    finally:
        await site.stop()


@on_loop
async def test_compressed_body_is_refused(site: Site) -> None:
    url = await site.start()
    answer = await fetch(
        "POST",
        f"{url}/api/publish",
        data=gzip.compress(b'{"channel":"plain","data":1}'),
        headers={"X-API-Key": KEY, "Content-Encoding": "gzip"},
    )
    assert answer.status_code == 415
    assert site.faults() == {"body_encoding": 1}


@on_loop
async def test_a_refused_peer_that_does_not_close_is_aborted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime.transports.frontend.LINGER", 0.1)
    await site.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(post("/api/publish", b"", b"Content-Length: 10"))
    assert status_of(await reader.read()) == 401
    with pytest.raises(ConnectionError):  # the aborted connection answers with a reset
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)
    writer.close()


@on_loop
async def test_large_body_within_the_limit_arrives_whole() -> None:
    site = Site(max_body_size=0)

    @site.app.http.post("/take")
    def take(request: Any) -> Any:
        return {"size": len(request.body), "last": request.body[-1:].decode()}

    url = await site.start()
    try:
        answer = await fetch("POST", f"{url}/take", data=b"x" * 2_000_000 + b"y")
        assert json.loads(answer.content) == {"size": 2_000_001, "last": "y"}
    finally:
        await site.stop()


@on_loop
async def test_an_idle_timeout_is_not_logged() -> None:
    site = Site(http_server=HTTPServerSettings(keepalive_timeout=0.05))
    await site.start()
    events: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(events.append)
    try:
        answer = await site.raw(b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n")
    finally:
        globalLogPublisher.removeObserver(events.append)
        await site.stop()
    assert status_of(answer) == 404
    assert not events


@pytest.fixture
def small_site() -> Iterator[Site]:
    server = HTTPServerSettings(max_queued_body_bytes=200_000)
    with site_for_test(http_server=server, max_body_size=1_000_000) as site:
        yield site


@on_loop
async def test_incomplete_bodies_have_bounded_memory_together(small_site: Site) -> None:
    site = small_site

    @site.app.http.post("/take")
    async def take(request: Any) -> Any:
        return len(request.body)

    await site.start()
    waiting = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(2)]
    for _, writer in waiting:
        writer.write(post("/take", b"x" * 140_000, b"Content-Length: 150000"))
        await writer.drain()
    answers = [asyncio.ensure_future(reader.read(12)) for reader, _ in waiting]
    done, pending = await asyncio.wait(answers, return_when="FIRST_COMPLETED")
    assert [task.result() for task in done] == [b"HTTP/1.1 503"]
    assert status_of(await site.raw(post("/take", b"y" * 60_000, b"Content-Length: 60000"))) == 200
    for _, writer in waiting:
        writer.write(b"x" * 10_000)
    assert [await task for task in pending] == [b"HTTP/1.1 200"]
    for _, writer in waiting:
        writer.close()
    assert site.faults() == {"body_memory": 1}
    assert site.front.body_bytes == 0


@pytest.mark.parametrize(("size", "closes"), [(100, False), (101, True)])
@on_loop
async def test_a_connection_stays_open_after_a_wrong_key_with_a_short_body(size: int, closes: bool) -> None:
    site = Site(max_refused_body_size=100)
    await site.start()
    try:
        call = (
            b"POST /api/info HTTP/1.1\r\nHost: x\r\nX-API-Key: wrong\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
        )
        last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answers = await site.raw(call + last)
        assert answers.count(b"HTTP/1.1 401 ") == 1
        assert answers.count(b"HTTP/1.1 404 ") == (not closes)
        assert site.faults() == {"api_key": 1}
    finally:
        await site.stop()
