"""The way out of a connection: straight, round, and together at the end of a turn."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from realtime.deadlines import Deadlines
from realtime.metrics import Counter
from realtime.process.transport import DirectServer
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd, Outgoing
from tests.transports.stage import eventually


class Lines:
    """A wire form: a message to a line."""

    encoding: Any = None

    def frame(self, payload: bytes) -> bytes:
        return payload + b"\n"


class Limits:
    """What a worker's connections share; its turns are ended by the test."""

    queue_max_size = 1_000_000
    write_timeout = 1.0
    close_timeout = 5.0

    def __init__(self) -> None:
        self.deadlines = Deadlines(0.0)
        self.queued = QueuedBytes()
        self.sent = Counter()
        self.turn = 0
        self.flushes: list[Callable[[], None]] = []
        self.ends = FlushAtTurnEnd(lambda: self.turn, lambda flush: self.flushes.append(flush))
        self.counted: list[str] = []

    def count(self, kind: str) -> None:
        self.counted.append(kind)

    def end_turn(self) -> None:
        self.turn += 1
        flushes, self.flushes = self.flushes, []
        for flush in flushes:
            flush()


class Connection(Outgoing, Protocol):
    form: Any = Lines()
    closing = False

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.made: Deferred[None] = Deferred()

    @property
    def is_closing(self) -> bool:
        return self.closing

    def close(self, code: int, reason: str) -> None:
        self.closing = True
        self.end(b"end\n")

    def connectionMade(self) -> None:
        self.factory = self.limits  # a Factory has set itself meanwhile
        self.begin()
        self.made.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lose_queue()


class Wire:
    """A transport that is not ours, and takes everything; each write by itself."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.shut = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def loseWriteConnection(self) -> None:
        self.shut = True

    def _ignore(self, *arguments: object) -> None: ...

    registerProducer = unregisterProducer = resumeProducing = _ignore


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def talk(limits: Limits) -> tuple[Connection, Wire]:
    connection, wire = Connection(limits), Wire()
    connection.makeConnection(wire)  # type: ignore[arg-type]
    return connection, wire


Talk = tuple[Connection, Wire]


def test_what_one_turn_says_to_a_client_leaves_in_two_writes(limits: Limits, talk: Talk) -> None:
    connection, wire = talk
    for number in range(10):
        connection.send(b"%d" % number)
    assert wire.writes == [b"0\n"]  # what may be all there is does not wait
    limits.end_turn()
    assert wire.writes == [b"0\n", b"".join(b"%d\n" % number for number in range(1, 10))]
    assert limits.sent.value == 10
    assert limits.queued.size == 0


def test_each_turn_begins_anew(limits: Limits, talk: Talk) -> None:
    connection, wire = talk
    for number in range(3):
        connection.send(b"%d" % number)
        limits.end_turn()
    assert wire.writes == [b"0\n", b"1\n", b"2\n"]


def test_a_frame_for_many_keeps_its_place_among_them(limits: Limits, talk: Talk) -> None:
    connection, wire = talk
    connection.send(b"a")
    connection.send(b"b")
    connection.sink.deliver(b"shared\n")
    connection.send(b"c")
    limits.end_turn()
    connection.sink.deliver(b"later\n")
    assert b"".join(wire.writes) == b"a\nb\nshared\nc\nlater\n"


def test_the_end_comes_behind_them(limits: Limits, talk: Talk) -> None:
    connection, wire = talk
    connection.send(b"a")
    connection.send(b"b")
    connection.close(3000, "")
    connection.send(b"too late")
    limits.end_turn()
    assert b"".join(wire.writes) == b"a\nb\nend\n"
    assert wire.shut


def test_a_connection_may_be_lost_before_the_turn_ends(limits: Limits, talk: Talk) -> None:
    connection, wire = talk
    connection.send(b"a")
    connection.send(b"b")
    connection.connectionLost()
    limits.end_turn()
    connection.send(b"c")
    connection.sink.deliver(b"d")
    assert wire.writes == [b"a\n"]
    assert limits.queued.size == 0


def test_the_limit_of_a_queue_holds_within_a_turn(limits: Limits, talk: Talk) -> None:
    connection, wire = talk
    limits.queue_max_size = 100
    for _ in range(3):
        connection.send(b"x" * 60)
    assert limits.counted == ["slow"]
    limits.end_turn()
    assert b"".join(wire.writes) == b"x" * 60 + b"\nend\n"
    assert limits.queued.size == 0


async def connected(limits: Limits, kind: type[Connection] = Connection) -> tuple[Any, socket.socket, Any]:
    """A connection over a real socket, and its peer, which reads when it is told to."""
    connection = kind(limits)
    port = reactor.listenTCP(0, Factory.forProtocol(lambda: connection), interface="127.0.0.1")
    port.transport = DirectServer
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", port.getHost().port))
    peer.setblocking(False)
    await connection.made
    return connection, peer, port


async def test_straight_and_round_and_straight_again_in_order(limits: Limits) -> None:
    connection, peer, port = await connected(limits)
    kernel = connection.transport.getHandle()
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    assert connection.sink.write == kernel.send
    assert connection.sink.fd == kernel.fileno()
    said, got = bytearray(), bytearray()

    def read() -> bool:
        try:
            got.extend(peer.recv(1 << 16))
        except BlockingIOError:
            return len(got) == len(said)
        return False

    for part in range(3):
        number = 0
        while not connection._stuffed or number % 50:
            number += 1
            line = b"%d %d " % (part, number) + bytes(97 + number % 26 for _ in range(997 * number % 3001))
            said.extend(line + b"\n")
            if number % 3:
                connection.sink.deliver(line + b"\n")
            else:
                connection.send(line)
            if number % 20 == 0:
                limits.end_turn()
        limits.end_turn()
        assert connection.sink.fd == -1  # nobody may send past what waits
        await eventually(read)
        assert got == said
        await eventually(lambda: connection.sink.write == kernel.send)
        assert limits.queued.size == 0
        assert not connection.bucket  # nobody watches any more whether the peer takes it
    connection.transport.abortConnection()
    await eventually(lambda: connection.sink.write is len)
    assert connection.sink.fd == -1
    connection.sink.deliver(b"to nobody")
    peer.close()
    await port.stopListening()


class LateConnection(Connection):
    """One that begins when a response is still on its way."""

    response = bytes(range(256)) * 20_000

    def connectionMade(self) -> None:
        self.transport.producerPaused = True  # as an earlier producer may have left it
        self.transport.write(self.response)
        super().connectionMade()


async def test_frames_come_behind_what_was_written_before_they_began(limits: Limits) -> None:
    connection, peer, port = await connected(limits, LateConnection)
    assert connection.transport._tempDataLen
    frames = [b"%d," % number for number in range(100)]
    expected, got = connection.response + b"".join(frames), bytearray()
    # The kernel has room again, before the loop has turned and written what waits.
    with suppress(BlockingIOError):
        while True:
            got.extend(peer.recv(1 << 20))
    for frame in frames:
        connection.sink.deliver(frame)

    def read() -> bool:
        try:
            got.extend(peer.recv(1 << 16))
        except BlockingIOError:
            return len(got) == len(expected)
        return False

    await eventually(read)
    assert got == expected
    await eventually(lambda: connection.sink.fd == connection.transport.fileno())
    connection.transport.abortConnection()
    await eventually(lambda: connection.sink.write is len)
    peer.close()
    await port.stopListening()


async def test_a_peer_that_has_gone_is_found_out_by_the_transport(limits: Limits) -> None:
    connection, peer, port = await connected(limits)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # it goes with a reset
    peer.close()
    for _ in range(3):
        connection.sink.deliver(b"anybody there?\n")
    await eventually(lambda: connection.sink.write is len)
    await port.stopListening()
