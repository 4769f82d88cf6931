"""The live figures over a WebSocket: who may watch, what is sent, and what becomes of a viewer that does not read."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall, deferLater
from twisted.internet.threads import deferToThread
from twisted.web.resource import Resource
from twisted.web.server import Site

from realtime.deadlines import RESOLUTION
from realtime.operators import viewers
from realtime.operators.viewers import Viewers

HANDSHAKE = (
    "GET /live HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
)


class Figures:
    """Stands for `Live`."""

    def __init__(self) -> None:
        self.added: list[Callable[[bytes], None]] = []
        self.json = b'{"at":1}'

    def past(self) -> bytes:
        return b"[[0,[]]]"

    def tell(self, snapshot: bytes) -> None:
        for told in self.added:
            told(snapshot)


class Port:
    """Viewers on a port of their own. Its own name is "localhost"."""

    def __init__(self, reactor: Any) -> None:
        self.figures: Any = Figures()
        self.reactor = reactor
        self.viewers = Viewers(reactor, self.figures, Site(Resource()), lambda host: host.startswith("localhost"))
        self._sweeping = LoopingCall(self.viewers.sweep)
        self._sweeping.start(RESOLUTION)
        self._listening = reactor.listenTCP(0, self.viewers.front, interface="127.0.0.1")
        self.number = self._listening.getHost().port

    def connect(self, host: str = "localhost", more: str = "") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.number), timeout=20)
        client.sendall(HANDSHAKE.format(host=host, more=more).encode())
        return client

    async def open(self, host: str = "localhost", more: str = "") -> tuple[socket.socket, bytes]:
        """A connection and the first line of the answer, which is read to the end of its head."""
        client = self.connect(host, more)
        head = b""
        while b"\r\n\r\n" not in head:
            head += await deferToThread(client.recv, 1)
        return client, head.split(b"\r\n")[0]

    def close(self) -> Deferred[Any]:
        self.viewers.close()
        self._sweeping.stop()
        return self._listening.stopListening()


@pytest.fixture
def port() -> Iterator[Port]:
    from twisted.internet import reactor

    port = Port(reactor)
    yield port
    port.close()


async def message(client: socket.socket) -> Any:
    """The next text message, up to 64 KiB."""
    first, size = await deferToThread(client.recv, 2)
    assert first == 0x81
    if size == 126:
        size = int.from_bytes(await deferToThread(client.recv, 2, socket.MSG_WAITALL), "big")
    return json.loads(await deferToThread(client.recv, size, socket.MSG_WAITALL))


async def test_a_viewer_is_sent_the_past_once_and_then_every_snapshot(port: Port) -> None:
    client, status = await port.open(more="Origin: http://localhost\r\n")
    with client:
        assert status.startswith(b"HTTP/1.1 101 ")
        assert await message(client) == {"past": [[0, []]], "snapshot": {"at": 1}}
        for number in (2, 3):
            port.figures.tell(b'{"at":%d}' % number)
            assert await message(client) == {"snapshot": {"at": number}}


@pytest.mark.parametrize(
    ("host", "more", "status"),
    [
        ("evil.example", "", b"403"),
        ("evil.example", "Origin: http://evil.example\r\n", b"403"),
        ("localhost", "Origin: http://evil.example\r\n", b"403"),
        ("localhost", "Origin: null\r\n", b"403"),
        ("localhost", "Origin: http://localhost:1\r\n", b"403"),
        ("localhost:1", "Origin: http://localhost:1\r\n", b"101"),
        ("localhost", "", b"101"),
    ],
)
async def test_only_pages_of_this_port_may_watch(port: Port, host: str, more: str, status: bytes) -> None:
    client, line = await port.open(host, more)
    client.close()
    assert line.split()[1] == status


async def test_there_is_room_for_so_many_and_again_when_one_leaves(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = []
    for _ in range(viewers.MOST_VIEWERS):
        client, status = await port.open()
        assert b" 101 " in status
        clients.append(client)
    refused, status = await port.open()
    refused.close()
    assert b" 503 " in status
    clients.pop().close()
    while b" 101 " not in status:
        client, status = await port.open()
        clients.append(client)
    for client in clients:
        client.close()


async def test_one_that_does_not_read_is_dropped(port: Port) -> None:
    slow, _ = await port.open()
    with slow:
        assert len(port.viewers) == 1
        snapshot = json.dumps({"at": "x" * 1_000_000}).encode()
        while len(port.viewers):
            port.figures.tell(snapshot)
            await deferLater(port.reactor, 0)


async def test_what_a_viewer_says_means_nothing(port: Port) -> None:
    client, _ = await port.open()
    with client:
        await message(client)
        client.sendall(b"\x81\x82\0\0\0\0{}")
        port.figures.tell(b'{"at":2}')
        assert await message(client) == {"snapshot": {"at": 2}}


async def test_closing_sends_everybody_away(port: Port) -> None:
    client, _ = await port.open()
    with client:
        await message(client)
        port.viewers.close()
        assert (await deferToThread(client.recv, 1)) == b"\x88"
