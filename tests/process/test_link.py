"""A link: its writes, its cuts, and its end."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, capturedLogs
from twisted.python.failure import Failure

from realtime.process import link as link_module
from realtime.process.link import PEER_ENDED, REPLACED, Link, adopt
from realtime.pubsub.broker_messages import pack
from tests.system.brokers import until

LIMIT = 10_000


class Pipe(StringTransport):
    """A transport that logs each write. full: pauses its producer."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.full = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)
        if self.full and self.producer is not None:
            self.producer.pauseProducing()

    def drained(self) -> None:
        self.producer.resumeProducing()


class Bench:
    """A link on a pipe, with its received frames and the reason of its end."""

    def __init__(self, patience: int = 0) -> None:
        self.clock = Clock()
        self.pipe = Pipe()
        self.frames: list[tuple[int, bytes]] = []
        self.endings: list[str] = []
        soon = partial(self.clock.callLater, 0)
        self.link = Link(self.clock, soon, LIMIT, self.receive, self.end, patience=patience)
        self.link.makeConnection(self.pipe)

    def receive(self, number: int, body: bytes) -> None:
        self.frames.append((number, body))

    def end(self, link: Link, reason: str) -> None:
        assert link is self.link
        self.endings.append(reason)

    def turn(self) -> list[bytes]:
        """Run one turn of the loop; return its writes."""
        self.clock.advance(0)
        writes, self.pipe.writes = self.pipe.writes, []
        return writes

    def lose(self) -> None:
        self.link.connectionLost(Failure(ConnectionDone()))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_turn_makes_one_write(bench: Bench) -> None:
    for frame in (b"a", b"b", b"c"):
        bench.link.send(frame)
    assert bench.pipe.writes == []
    assert bench.turn() == [b"abc"]
    assert bench.turn() == []
    bench.link.send(b"d")
    assert bench.turn() == [b"d"]
    assert bench.link.backlog == 0


def test_a_full_transport_gets_nothing_until_it_is_drained(bench: Bench) -> None:
    bench.pipe.full = True
    bench.link.send(b"first")
    assert bench.turn() == [b"first"]
    bench.link.send(b"second")
    bench.link.send(b"third")
    assert bench.turn() == []
    assert bench.link.backlog == len(b"firstsecondthird")
    bench.pipe.drained()
    assert bench.turn() == [b"secondthird"]
    bench.pipe.full = False
    bench.pipe.drained()
    assert bench.link.backlog == 0


def test_a_long_queue_goes_out_in_batches(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "BATCH", 10)
    for frame in (b"1234", b"5678", b"abc", b"x" * 30, b"yz"):
        bench.link.send(frame)
    assert bench.turn() == [b"12345678", b"abc", b"x" * 30, b"yz"]


def test_a_peer_too_far_behind_is_cut(bench: Bench) -> None:
    bench.pipe.full = True
    bench.link.send(b"x" * 6000)
    bench.turn()
    bench.link.send(b"x" * 4000)
    assert not bench.pipe.disconnecting
    bench.link.send(b"x")
    assert bench.pipe.disconnecting
    assert bench.link.backlog == 0
    bench.link.send(b"more")
    assert bench.turn() == []
    bench.lose()
    assert bench.endings == ["the peer is too far behind"]


def test_frames_arrive_in_order(bench: Bench) -> None:
    stream = pack("a", 1) + pack("b") + pack("c", 2)
    bench.link.dataReceived(stream[:10])
    bench.link.dataReceived(stream[10:])
    assert bench.frames == [(1, b"\xa1a"), (0, b"\xa1b"), (2, b"\xa1c")]


def test_after_a_cut_nothing_is_received(bench: Bench) -> None:
    bench.link._on_frame = lambda number, body: (bench.receive(number, body), bench.link.cut("enough"))  # type: ignore
    bench.link.dataReceived(pack("a") * 3)
    bench.link.dataReceived(pack("a"))
    bench.link.cut("again")
    assert len(bench.frames) == 1
    bench.lose()
    assert bench.endings == ["enough"]


def test_a_bad_frame_cuts_the_link(bench: Bench) -> None:
    bench.link.dataReceived(b"\xff" * 12)
    assert bench.pipe.disconnecting
    bench.lose()
    assert "longer than" in bench.endings[0]


def test_an_exception_of_our_own_code_is_logged_and_cuts_the_link(bench: Bench) -> None:
    bench.link._on_frame = lambda number, body: 1 / 0  # type: ignore[assignment]
    with capturedLogs() as events:
        bench.link.dataReceived(pack("a"))
    assert [event["log_level"] for event in events] == [LogLevel.critical]
    assert bench.pipe.disconnecting


def test_the_end_is_reported_once(bench: Bench) -> None:
    bench.link.send(b"x")
    bench.lose()
    assert bench.endings == [PEER_ENDED]
    assert bench.turn() == []


def test_closing_sends_queued_frames(bench: Bench) -> None:
    bench.pipe.full = True
    bench.link.send(b"first")
    bench.turn()
    bench.link.send(b"second")
    bench.link.close()
    bench.link.close()
    assert bench.turn() == [b"second"]
    assert bench.pipe.disconnecting
    assert bench.pipe.producer is None
    bench.lose()
    assert bench.endings == ["closed"]
    assert bench.clock.getDelayedCalls() == []


def test_closing_has_a_deadline(bench: Bench) -> None:
    bench.link.close()
    aborted: list[None] = []
    bench.pipe.abortConnection = lambda: aborted.append(None)  # type: ignore[method-assign]
    bench.clock.advance(link_module.CLOSE_TIMEOUT)
    assert aborted == [None]


class Answering(Bench):
    """A link that answers each frame with 40 bytes."""

    def receive(self, number: int, body: bytes) -> None:
        super().receive(number, body)
        self.link.send(b"x" * 40)


def asked(*numbers: int) -> bytes:
    return b"".join(pack("c", number) for number in numbers)


def test_a_peer_that_asks_for_more_than_it_reads_waits() -> None:
    bench = Answering(patience=100)
    bench.pipe.full = True
    bench.link.dataReceived(asked(1, 2, 3, 4, 5, 6) + asked(7)[:5])
    assert [number for number, _ in bench.frames] == [1, 2, 3]
    assert bench.pipe.producerState == "paused"
    assert bench.turn() == [b"x" * 120]
    assert len(bench.frames) == 3  # the transport has the answers, but not the peer
    bench.pipe.full = False
    bench.pipe.drained()
    assert [number for number, _ in bench.frames] == [1, 2, 3, 4, 5, 6]
    assert bench.pipe.producerState == "paused"
    bench.turn()
    assert bench.pipe.producerState == "producing"
    bench.link.dataReceived(asked(7)[5:])
    assert [number for number, _ in bench.frames] == [1, 2, 3, 4, 5, 6, 7]


async def test_a_link_keeps_what_its_peer_may_not_have_handled() -> None:
    endings: list[str] = []
    reader, writer = (
        Link(
            reactor,
            partial(reactor.callLater, 0),
            2**24,
            lambda number, body: None,
            lambda link, reason: endings.append(reason),
            keeps=True,
        )
        for _ in range(2)
    )
    for end, link in zip(socket.socketpair(), (reader, writer), strict=True):
        adopt(reactor, end.detach(), link)
    frame = pack(b"x" * 100_000)
    for number in range(1, 101):
        writer.send(frame)
        await until(lambda sent=number: reader.count_handled() == sent * len(frame))
    reader.cut(REPLACED)
    await until(lambda: len(endings) == 2)
    writer.send(b"later")
    assert len(frame) < sum(map(len, writer._kept or ())) < 12 * len(frame)
    assert writer.take_rest(99 * len(frame)) == [frame, b"later"]
    assert (sorted(endings), writer.dropped) == (sorted([PEER_ENDED, REPLACED]), 0)


def test_unread_frames_of_a_cut_link_are_dropped() -> None:
    bench = Answering(patience=50)
    bench.pipe.full = True
    bench.link.dataReceived(asked(1, 2, 3))
    assert len(bench.frames) == 2
    bench.link.cut("enough")
    bench.pipe.drained()
    bench.turn()
    bench.lose()
    assert (len(bench.frames), bench.endings) == (2, ["enough"])


def test_an_invalid_frame_behind_unread_ones_cuts_the_link() -> None:
    bench = Answering(patience=50)
    bench.link.dataReceived(asked(1, 2) + b"\xff" * 12)
    assert bench.pipe.disconnected is False
    bench.turn()
    bench.lose()
    assert "longer than" in bench.endings[0]


class Selector(Clock):
    """A reactor that only logs its writers."""

    def __init__(self) -> None:
        super().__init__()
        self.writers: set[Any] = set()

    def addReader(self, reader: Any) -> None: ...

    def removeReader(self, reader: Any) -> None: ...

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)


def test_frames_leave_without_the_selector_while_the_peer_keeps_up() -> None:
    selector, (ours, theirs) = Selector(), socket.socketpair()
    link = Link(selector, partial(selector.callLater, 0), 2**24, lambda number, body: None, lambda *_: None)
    adopt(selector, ours.detach(), link)
    with theirs:
        link.send(b"first")
        link.send(b"second")
        selector.advance(0)
        assert theirs.recv(100) == b"firstsecond"
        assert not selector.writers
        link.send(b"x" * 2**22)
        link.send(b"last")
        selector.advance(0)
        (stream,) = selector.writers
        received = bytearray()
        while selector.writers:
            received += theirs.recv(2**20)
            stream.doWrite()
            selector.advance(0)
        while len(received) < 2**22 + 4:
            received += theirs.recv(2**20)
        assert received == b"x" * 2**22 + b"last"
        assert link.backlog == 0
        link.cut("enough")
        selector.advance(0)
        assert theirs.recv(100) == b""


def test_a_hang_up_is_known_before_the_last_frames_are_read(bench: Bench) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        bench.pipe.fileno = ours.fileno  # type: ignore[attr-defined]
        theirs.sendall(b"its last frames")
        assert not bench.link.is_hung_up
        theirs.close()
        assert bench.link.is_hung_up
    bench.link.cut("for a test")
    assert bench.link.is_hung_up
