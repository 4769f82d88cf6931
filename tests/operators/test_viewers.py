"""The live page's feed: who may watch, what is sent, and the end of a viewer that does not read."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from realtime.operators import page, viewers
from realtime.operators.site import OperatorRequest, OperatorSite
from realtime.operators.viewers import MAX_STALL, MAX_VIEWERS, Viewers


class Figures:
    """Stands for `LiveFigures`."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[bytes], None]] = []
        self.json = b'{"at":1}'

    def past(self) -> bytes:
        return b"[[0,[]]]"

    def add_listener(self, listener: Callable[[bytes], None]) -> None:
        self._listeners.append(listener)

    def publish(self, snapshot: bytes) -> None:
        for listener in self._listeners:
            listener(snapshot)


class Time:
    """The reactor's clock, which the test can set forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def seconds(self) -> float:
        return self.ahead


class Port:
    """A port whose every request opens a stream."""

    def __init__(self, reactor: Any) -> None:
        self.figures = Figures()
        self.reactor = reactor
        self.time = Time()
        self.viewers = Viewers(self.time, self.figures)
        self._listening = reactor.listenTCP(0, OperatorSite(self._answer), interface="127.0.0.1")
        self.number = self._listening.getHost().port

    def _answer(self, request: OperatorRequest) -> None:
        self.viewers.open(request)

    async def request(self, method: str = "GET", version: str = "1.1") -> tuple[socket.socket, int, str]:
        """A connection that has sent a request, and status and head of its answer."""
        client = socket.create_connection(("127.0.0.1", self.number), timeout=20)
        client.sendall(f"{method} /live HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += await deferToThread(client.recv, 1)
        return client, int(head.split()[1]), head.decode().lower()

    async def stall(self) -> Any:
        """The only viewer, once its socket takes no more."""
        (viewer,) = self.viewers._viewers
        waits = 0
        while waits < 10:
            waits = 0 if viewer._paused_at is None else waits + 1
            self.figures.publish(b'"%b"' % (b"x" * 1_000_000))
            await deferLater(self.reactor, 0.01)
        return viewer

    async def until(self, viewers: int) -> None:
        """Wait until this number of streams is open."""
        while len(self.viewers) != viewers:
            await deferLater(self.reactor, 0.01)

    def close(self) -> Deferred[Any]:
        self.viewers.close()
        stopped: Deferred[Any] = self._listening.stopListening()
        return stopped


@pytest_twisted.async_yield_fixture
async def port() -> AsyncIterator[Port]:
    from twisted.internet import reactor

    port = Port(reactor)
    yield port
    await port.close()


async def line(client: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        text += await deferToThread(client.recv, 1)
    return text


async def chunk(client: socket.socket) -> str:
    """The next chunk of a response (RFC 9112, 7.1); "" for the last one."""
    size = int(await line(client), 16)
    content = await deferToThread(client.recv, size + 2, socket.MSG_WAITALL)
    return bytes(content[:-2]).decode()


async def test_a_viewer_is_sent_the_past_once_and_then_every_snapshot(port: Port) -> None:
    client, status, head = await port.request()
    with client:
        assert (status, "content-type: text/event-stream\r\n" in head) == (200, True)
        assert "cache-control: no-store\r\n" in head
        retry, data, *end = (await chunk(client)).split("\n")
        assert (retry, end) == ("retry: 1000", ["", ""])
        assert json.loads(data.removeprefix("data: ")) == {"past": [[0, []]], "snapshot": {"at": 1}}
        for number in (2, 3):
            port.figures.publish(b'{"at":%d}' % number)
            assert await chunk(client) == f'data: {{"snapshot":{{"at":{number}}}}}\n\n'


async def test_the_number_of_viewers_is_limited_and_a_place_is_free_again_when_one_leaves(port: Port) -> None:
    clients = []
    for _ in range(MAX_VIEWERS):
        client, status, _ = await port.request()
        assert status == 200
        clients.append(client)
    refused, status, head = await port.request()
    with refused:
        assert (status, "retry-after: 5\r\n" in head) == (503, True)
        assert await line(refused) == b"20 live pages are open, which is the limit; close one, or read /snapshot\n"
    asked, status, _ = await port.request("HEAD")
    asked.close()
    assert status == 503
    clients.pop().close()
    await port.until(MAX_VIEWERS - 1)
    client, status, _ = await port.request()
    assert status == 200
    clients.append(client)
    for client in clients:
        client.close()
    await port.until(0)


async def test_head_has_no_stream(port: Port) -> None:
    client, status, head = await port.request("HEAD")
    with client:
        assert (status, "text/event-stream" in head) == (200, True)
        assert len(port.viewers) == 0


async def test_a_viewer_that_does_not_read_misses_snapshots_and_is_dropped(port: Port) -> None:
    client, _, _ = await port.request()
    with client:
        viewer = await port.stall()
        transport = viewer._request.channel.transport
        for _ in range(20):
            port.time.ahead += (MAX_STALL - 1) / 20
            port.figures.publish(b'"%b"' % (b"x" * 1_000_000))
            await deferLater(port.reactor, 0)
        buffered = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
        assert buffered <= 1_200_000, "snapshots are queued"
        assert len(port.viewers) == 1
        port.time.ahead += 2
        port.figures.publish(b'"dropped"')
        await port.until(0)


async def test_a_viewer_that_reads_again_in_time_is_sent_the_newest(port: Port) -> None:
    client, _, _ = await port.request()
    with client:
        viewer = await port.stall()
        port.figures.publish(b'"missed"')
        port.time.ahead += MAX_STALL - 1
        received = b""
        while viewer._paused_at is not None:
            received += await deferToThread(client.recv, 1 << 20)
        port.time.ahead += MAX_STALL
        port.figures.publish(b'"newest"')
        while b"newest" not in received[-200:]:
            received += await deferToThread(client.recv, 1 << 20)
        assert b"missed" not in received
        assert len(port.viewers) == 1


async def test_closing_ends_the_response_and_the_connection(port: Port) -> None:
    client, _, _ = await port.request()
    with client:
        await chunk(client)
        port.viewers.close()
        assert await chunk(client) == ""
        assert await deferToThread(client.recv, 1) == b""
        assert len(port.viewers) == 0


async def test_closing_does_not_wait_for_a_viewer_that_does_not_read(port: Port) -> None:
    client, _, _ = await port.request()
    with client:
        await port.stall()
        port.viewers.close()
        await port.until(0)


async def test_http_1_0_is_sent_events_without_chunks(port: Port) -> None:
    client, status, head = await port.request(version="1.0")
    with client:
        assert (status, "transfer-encoding" in head) == (200, False)
        assert await line(client) == b"retry: 1000\n"


def test_the_path_is_the_one_that_the_page_opens() -> None:
    _, script = page.load()[b"/live.js"]
    assert b'new EventSource("%b")' % viewers.PATH.lstrip(b"/") in script
