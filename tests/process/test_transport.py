"""The transport that writes immediately: order, producers and closing behave as in Twisted."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from zope.interface import implementer

from realtime.process.transport import DirectServer


@implementer(IPushProducer)
class Recorder(Protocol):
    """Server side of a connection; it records the calls of its transport."""

    def __init__(self) -> None:
        self.made: Deferred[None] = Deferred()
        self.lost: Deferred[None] = Deferred()
        self.pauses = self.resumes = 0

    def connectionMade(self) -> None:
        self.made.callback(None)

    def connectionLost(self, reason: Any = None) -> None:
        self.lost.callback(None)

    def pauseProducing(self) -> None:
        self.pauses += 1

    def resumeProducing(self) -> None:
        self.resumes += 1

    def stopProducing(self) -> None: ...


@pytest.fixture
def pair() -> Any:
    """A recorder on a DirectServer, and the client's plain socket with a small window."""
    recorder = Recorder()
    port = reactor.listenTCP(0, Factory.forProtocol(lambda: recorder), interface="127.0.0.1")
    port.transport = DirectServer
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port.getHost().port))
    yield recorder, client
    client.close()
    port.stopListening()
    if recorder.transport is not None:
        recorder.transport.abortConnection()


async def turn() -> None:
    await deferLater(reactor, 0.001)


async def read_all(client: socket.socket, until: int) -> bytes:
    """Read in small pieces while the loop runs, up to `until` bytes or the end of the stream."""
    client.setblocking(False)
    got = bytearray()
    while len(got) < until:
        try:
            piece = client.recv(3000)
        except BlockingIOError:
            await turn()
            continue
        if not piece:
            break
        got += piece
        await turn()
    return bytes(got)


async def test_write_sends_before_it_returns(pair: Any) -> None:
    recorder, client = pair
    await recorder.made
    recorder.transport.write(b"at once")
    assert client.recv(100) == b"at once"  # and the loop has not turned
    assert not recorder.transport.dataBuffer


async def test_bytes_refused_by_the_socket_follow_in_order(pair: Any) -> None:
    recorder, client = pair
    await recorder.made
    recorder.transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pieces = [bytes([65 + number % 26]) * (1 + number * 37 % 5000) for number in range(400)]
    for number, piece in enumerate(pieces):
        recorder.transport.write(piece)
        if number % 50 == 0:
            await turn()
    whole = b"".join(pieces)
    assert await read_all(client, len(whole)) == whole
    recorder.transport.write(b"direct again!!")
    assert await read_all(client, 14) == b"direct again!!"


async def test_a_producer_is_paused_and_resumed(pair: Any) -> None:
    recorder, client = pair
    await recorder.made
    recorder.transport.registerProducer(recorder, True)
    sent = 0
    while not recorder.pauses:
        recorder.transport.write(b"x" * 16384)
        sent += 16384
    assert not recorder.resumes
    await read_all(client, sent)
    await turn()
    assert recorder.resumes == 1
    recorder.transport.unregisterProducer()


async def test_buffered_data_is_written_before_the_connection_closes(pair: Any) -> None:
    recorder, client = pair
    await recorder.made
    recorder.transport.write(b"y" * 1_000_000)
    recorder.transport.write(b"last words")
    recorder.transport.loseConnection()
    got = await read_all(client, 2_000_000)
    assert len(got) == 1_000_010 and got.endswith(b"last words")
    await recorder.lost


async def test_nothing_is_written_after_a_half_close(pair: Any) -> None:
    recorder, client = pair
    await recorder.made
    recorder.transport.write(b"end")
    recorder.transport.loseWriteConnection()
    await turn()
    recorder.transport.write(b"too late")
    assert await read_all(client, 100) == b"end"


async def test_a_lost_peer_is_reported_by_connection_lost_and_not_by_write(pair: Any) -> None:
    recorder, client = pair
    await recorder.made
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
    client.close()
    for _ in range(3):
        recorder.transport.write(b"anybody there?")
    assert not recorder.lost.called
    await recorder.lost
    recorder.transport.write(b"nobody")
