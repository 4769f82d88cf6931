"""twisted.web's side of the operators' port: limits of a request, and one answer to each."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall, deferLater
from twisted.internet.threads import deferToThread
from twisted.web.http import OK

from realtime.operators import site
from realtime.operators.site import OperatorRequest, OperatorSite


class Port:
    """A port that answers each request with its path, and remembers the requests."""

    def __init__(self, reactor: Any) -> None:
        self.requests: list[OperatorRequest] = []
        self._listening = reactor.listenTCP(0, OperatorSite(self._answer), interface="127.0.0.1")

    def _answer(self, request: OperatorRequest) -> None:
        self.requests.append(request)
        request.reply(OK, "text/plain", request.path)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._listening.getHost().port), timeout=20)

    async def exchange(self, data: bytes) -> bytes:
        """Send `data`. Returns all bytes until the server closes the connection."""
        with self.connect() as client:
            client.sendall(data)
            received = b""
            while more := await deferToThread(client.recv, 65536):
                received += more
            return received

    def close(self) -> Deferred[Any]:
        stopped: Deferred[Any] = self._listening.stopListening()
        return stopped


@pytest_twisted.async_yield_fixture
async def port() -> AsyncIterator[Port]:
    from twisted.internet import reactor

    port = Port(reactor)
    yield port
    await port.close()


async def test_a_keep_alive_connection_has_an_answer_to_each_request(port: Port) -> None:
    answer = await port.exchange(
        b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nHEAD /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    )
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert (b"\r\n\r\n/1HTTP" in answer, answer[-4:]) == (True, b"\r\n\r\n")


@pytest.mark.parametrize("body", [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"])
async def test_a_request_with_a_body_is_refused_and_not_answered_besides(port: Port, body: bytes) -> None:
    answer = await port.exchange(b"GET / HTTP/1.1\r\nHost: a\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert (answer.count(b"HTTP/1.1"), port.requests) == (1, [])


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 501 + b"\r\n"]
)
async def test_a_head_that_is_too_large_is_refused(port: Port, head: bytes) -> None:
    with port.connect() as client:
        client.sendall(head)
        received = await deferToThread(client.recv, 65536)
    assert not received or received.startswith(b"HTTP/1.1 400 ")
    assert port.requests == []


async def test_a_slow_head_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    from twisted.internet import reactor

    monkeypatch.setattr(site, "IDLE", 0.3)
    port = Port(reactor)
    with port.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(200):
                client.sendall(b"X: y\r\n")
                await deferLater(reactor, 0.05)
    await port.close()


async def test_pipelined_requests_have_a_turn_of_the_loop_each(port: Port) -> None:
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1

    looping = LoopingCall(turn)
    looping.start(0)
    try:
        last = b"GET /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        data = await port.exchange(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200 + last)
    finally:
        looping.stop()
    assert data.count(b"HTTP/1.1 200 OK") == 201
    assert turns >= 200


async def test_a_client_that_keeps_pipelining_is_cut(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "MAX_HELD", 1000)
    from twisted.internet import reactor

    peer = port.connect()
    peer.setblocking(False)
    cut = False
    for _ in range(2000):
        try:
            peer.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        except BlockingIOError:
            pass
        except ConnectionError:
            cut = True
            break
        await deferLater(reactor, 0)
    assert cut
    peer.close()
