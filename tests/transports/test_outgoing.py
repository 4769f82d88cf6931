"""Outgoing side of a connection: direct writes, queued writes, and one write at the end of a turn."""

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

from realtime.client_log import ClientLog
from realtime.deadlines import Deadlines
from realtime.metrics import Counter, Metrics, bad_input_counter
from realtime.process.transport import DirectServer
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd, Outgoing
from tests.transports.stage import eventually


class Lines:
    """A wire format with one message for each line."""

    encoding: Any = None

    def frame(self, payload: bytes) -> bytes:
        return payload + b"\n"


class Context:
    """The context of the connections; the test ends the loop turns."""

    queue_max_size = 1_000_000
    write_timeout = 1.0
    close_timeout = 5.0

    def __init__(self) -> None:
        self.deadlines = Deadlines(0.0)
        self.queued = QueuedBytes()
        self.sent = Counter()
        self.turn = 0
        self.flushes: list[Callable[[], None]] = []
        self.turn_end = FlushAtTurnEnd(lambda: self.turn, lambda flush: self.flushes.append(flush))
        self.metrics = Metrics()
        self.client_log = ClientLog(self.metrics)

    def counted(self, kind: str) -> int:
        return bad_input_counter(self.metrics, kind).value

    def end_turn(self) -> None:
        self.turn += 1
        flushes, self.flushes = self.flushes, []
        for flush in flushes:
            flush()


class Connection(Outgoing, Protocol):
    form: Any = Lines()
    closing = False

    def __init__(self, context: Context) -> None:
        self.context = context
        self.made: Deferred[None] = Deferred()

    @property
    def is_closing(self) -> bool:
        return self.closing

    def close(self, code: int, reason: str) -> None:
        self.closing = True
        self.finish_writing(b"end\n")

    def connectionMade(self) -> None:
        self.factory = self.context  # a Factory has set itself meanwhile
        self.start_writing()
        self.made.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.stop_writing()


class Wire:
    """A transport other than DirectServer; it accepts all data and records each write."""

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
def context() -> Context:
    return Context()


@pytest.fixture
def talk(context: Context) -> tuple[Connection, Wire]:
    connection, wire = Connection(context), Wire()
    connection.makeConnection(wire)  # type: ignore[arg-type]
    return connection, wire


Talk = tuple[Connection, Wire]


def test_all_messages_of_one_turn_leave_in_two_writes(context: Context, talk: Talk) -> None:
    connection, wire = talk
    for number in range(10):
        connection.send(b"%d" % number)
    assert wire.writes == [b"0\n"]  # the first message is not delayed
    context.end_turn()
    assert wire.writes == [b"0\n", b"".join(b"%d\n" % number for number in range(1, 10))]
    assert context.sent.value == 10
    assert context.queued.size == 0


def test_held_messages_leave_in_one_write(context: Context, talk: Talk) -> None:
    connection, wire = talk
    assert connection.hold()
    connection.send(b"a")
    connection.sink.deliver(b"shared\n")
    assert not connection.hold()  # the caller is not the one to release
    connection.send(b"b")
    assert wire.writes == []
    connection.release()
    assert wire.writes == [b"a\nshared\nb\n"]
    assert context.queued.size == 0


def test_a_connection_that_closes_while_it_is_held_sends_everything(context: Context, talk: Talk) -> None:
    connection, wire = talk
    connection.hold()
    connection.send(b"a")
    connection.close(3000, "bye")
    connection.release()
    assert wire.writes[0].startswith(b"a\n") and len(wire.writes) == 1
    assert wire.shut


def test_the_first_message_of_each_turn_is_written_at_once(context: Context, talk: Talk) -> None:
    connection, wire = talk
    for number in range(3):
        connection.send(b"%d" % number)
        context.end_turn()
    assert wire.writes == [b"0\n", b"1\n", b"2\n"]


def test_a_fan_out_frame_keeps_its_place_among_messages(context: Context, talk: Talk) -> None:
    connection, wire = talk
    connection.send(b"a")
    connection.send(b"b")
    connection.sink.deliver(b"shared\n")
    connection.send(b"c")
    context.end_turn()
    connection.sink.deliver(b"later\n")
    assert b"".join(wire.writes) == b"a\nb\nshared\nc\nlater\n"


def test_the_last_frame_follows_queued_messages(context: Context, talk: Talk) -> None:
    connection, wire = talk
    connection.send(b"a")
    connection.send(b"b")
    connection.close(3000, "")
    connection.send(b"too late")
    context.end_turn()
    assert b"".join(wire.writes) == b"a\nb\nend\n"
    assert wire.shut


def test_a_connection_may_be_lost_before_the_turn_ends(context: Context, talk: Talk) -> None:
    connection, wire = talk
    connection.send(b"a")
    connection.send(b"b")
    connection.connectionLost()
    context.end_turn()
    connection.send(b"c")
    connection.sink.deliver(b"d")
    assert wire.writes == [b"a\n"]
    assert context.queued.size == 0


def test_the_limit_of_a_queue_holds_within_a_turn(context: Context, talk: Talk) -> None:
    connection, wire = talk
    context.queue_max_size = 100
    for _ in range(3):
        connection.send(b"x" * 60, is_push=True)
    assert context.counted("slow") == 1
    context.end_turn()
    assert b"".join(wire.writes) == b"x" * 60 + b"\nend\n"
    assert context.queued.size == 0


async def connected(context: Context, kind: type[Connection] = Connection) -> tuple[Any, socket.socket, Any]:
    """Return a connection on a real socket, its peer, and the port; the peer reads only when the test does."""
    connection = kind(context)
    port = reactor.listenTCP(0, Factory.forProtocol(lambda: connection), interface="127.0.0.1")
    port.transport = DirectServer
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", port.getHost().port))
    peer.setblocking(False)
    await connection.made
    return connection, peer, port


async def test_frames_keep_their_order_from_direct_to_queued_to_direct_writes(context: Context) -> None:
    connection, peer, port = await connected(context)
    kernel = connection.transport.getHandle()
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    assert connection.sink.send == kernel.send
    assert connection.sink.fd == kernel.fileno()
    sent, got = bytearray(), bytearray()

    def read() -> bool:
        try:
            got.extend(peer.recv(1 << 16))
        except BlockingIOError:
            return len(got) == len(sent)
        return False

    for part in range(3):
        number = 0
        while not connection._is_transport_full or number % 50:
            number += 1
            line = b"%d %d " % (part, number) + bytes(97 + number % 26 for _ in range(997 * number % 3001))
            sent.extend(line + b"\n")
            if number % 3:
                connection.sink.deliver(line + b"\n")
            else:
                connection.send(line)
            if number % 20 == 0:
                context.end_turn()
        context.end_turn()
        assert connection.sink.fd == -1  # no sender may bypass the queue
        await eventually(read)
        assert got == sent
        await eventually(lambda: connection.sink.send == kernel.send)
        assert context.queued.size == 0
        assert not connection.deadline_bucket  # the check of progress is over
    connection.transport.abortConnection()
    await eventually(lambda: connection.sink.send is len)
    assert connection.sink.fd == -1
    connection.sink.deliver(b"dropped")
    peer.close()
    await port.stopListening()


class LateConnection(Connection):
    """A connection that starts to write while an HTTP response is still buffered."""

    response = bytes(range(256)) * 20_000

    def connectionMade(self) -> None:
        self.transport.producerPaused = True  # as an earlier producer may have left it
        self.transport.write(self.response)
        super().connectionMade()


async def test_frames_follow_data_written_before_start_writing(context: Context) -> None:
    connection, peer, port = await connected(context, LateConnection)
    assert connection.transport._tempDataLen
    frames = [b"%d," % number for number in range(100)]
    expected, got = connection.response + b"".join(frames), bytearray()
    # The kernel's buffer has room again before the next loop turn writes the buffered rest.
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
    await eventually(lambda: connection.sink.send is len)
    peer.close()
    await port.stopListening()


async def test_the_transport_detects_a_peer_that_has_gone(context: Context) -> None:
    connection, peer, port = await connected(context)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # it goes with a reset
    peer.close()
    for _ in range(3):
        connection.sink.deliver(b"hello?\n")
    await eventually(lambda: connection.sink.send is len)
    await port.stopListening()


def test_an_exception_of_one_connection_does_not_keep_the_others_from_being_flushed() -> None:
    log: list[str] = []

    class Connection(Outgoing):
        def __init__(self, name: str, *, fails: bool = False) -> None:
            self.name, self.fails = name, fails

        def flush(self) -> None:
            if self.fails:
                raise RuntimeError("a bug")
            log.append(f"{self.name} flushed")

        def abort(self) -> None:
            log.append(f"{self.name} aborted")

    ends: list[Callable[[], None]] = []
    turn_end = FlushAtTurnEnd(call_at_end=ends.append)
    for connection in (Connection("a"), Connection("b", fails=True), Connection("c")):
        turn_end.schedule(connection)
    ends[0]()
    assert log == ["a flushed", "b aborted", "c flushed"]


async def read_exactly(peer: socket.socket, size: int) -> None:
    """Read this many bytes from a peer that has read nothing yet."""
    left = size

    def read() -> bool:
        nonlocal left
        with suppress(BlockingIOError):
            left -= len(peer.recv(1 << 20))
        return left <= 0

    await eventually(read)
    assert left == 0


async def test_replies_make_no_peer_slow_and_pushes_do(context: Context) -> None:
    context.queue_max_size = 100_000
    connection, peer, port = await connected(context)
    assert connection.is_drained
    drained: list[bool] = []
    sent = 0
    while not connection.is_congested:
        connection.send(b"r" * 999_999)
        sent += 1_000_000
        context.end_turn()
    connection.when_drained(lambda: drained.append(connection.is_drained))
    connection.send(b"r" * 999_999)
    connection.send(b"p" * 99_999, is_push=True)
    assert not connection.is_drained and context.counted("slow") == 0
    await read_exactly(peer, sent + 1_000_000 + 100_000)
    await eventually(lambda: drained == [True])
    assert not connection.is_congested
    while not connection.is_congested:
        connection.send(b"r" * 999_999)
        context.end_turn()
    for _ in range(2):
        connection.send(b"p" * 60_000, is_push=True)
    assert context.counted("slow") == 1
    connection.transport.abortConnection()
    await eventually(lambda: connection.sink.send is len)
    assert drained == [True]
    peer.close()
    await port.stopListening()


async def test_unsent_bytes_are_those_that_the_peer_has_not_acknowledged(context: Context) -> None:
    connection, peer, port = await connected(context)
    taken = []
    for is_paced in (False, True):
        connection.pace(is_paced)
        size = 0
        while connection.is_drained:
            connection.send(b"x" * 9_999)
            size += 10_000
            context.end_turn()
        taken.append(size)
        assert 0 < connection.unsent() <= size
        await read_exactly(peer, size)
        await eventually(lambda: connection.is_drained and connection.unsent() == 0)
    # The kernel takes less from a paced connection, apart from what the peer's buffer has room for.
    assert taken[1] < taken[0]
    connection.transport.abortConnection()
    await eventually(lambda: connection.sink.send is len)
    connection.pace(False)
    assert connection.unsent() == 0
    peer.close()
    await port.stopListening()
