"""A connection reaches exactly one worker or returns to the sender. Both ends are in this process."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.python.failure import Failure

from realtime.process import fd_passing
from realtime.process.fd_passing import ANSWER_TIMEOUT, MAX_IN_FLIGHT, FdReceiver, FdSender, pair


class Reactor:
    """Keeps the readers, and a time that the test sets."""

    def __init__(self) -> None:
        self.readers: list[Any] = []
        self.now = 0.0

    def addReader(self, reader: Any) -> None:
        self.readers.append(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.remove(reader)

    def seconds(self) -> float:
        return self.now


class Scene:
    """A sender, a receiver, and connections with a client at their other ends."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        ours, theirs = pair()
        self.sender = FdSender(self.reactor, ours)
        self.adopted: list[socket.socket] = []
        self.refuse: Exception | None = None
        self.receiver = FdReceiver(self.reactor, theirs.detach(), self.adopt)
        self.settled: list[bool] = []
        self.clients: list[socket.socket] = []
        self.connections: list[socket.socket] = []

    def adopt(self, fd: int) -> None:
        if self.refuse:
            raise self.refuse
        self.adopted.append(socket.socket(fileno=os.dup(fd)))

    def send(self) -> bool:
        client, connection = socket.socketpair()
        self.clients.append(client)
        self.connections.append(connection)
        return self.sender.send(connection, self.settled.append)

    def wait(self, seconds: float) -> None:
        self.reactor.now += seconds
        self.sender.reclaim_overdue()

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        for sock in (*self.clients, *self.connections, *self.adopted):
            sock.close()


def claims() -> int:
    """Return the number of open claims in this process."""
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return links.count("anon_inode:[eventfd]")


@pytest.fixture
def scene() -> Iterator[Scene]:
    before = claims()
    scene = Scene()
    yield scene
    scene.close()
    assert claims() == before
    assert scene.reactor.readers == []


def test_an_adopted_connection_belongs_to_the_worker_alone(scene: Scene) -> None:
    assert scene.send()
    scene.receiver.doRead()
    assert scene.settled == []
    scene.sender.doRead()
    assert scene.settled == [True]
    scene.adopted[0].sendall(b"hello")
    assert scene.clients[0].recv(10) == b"hello"
    scene.adopted[0].close()
    assert scene.clients[0].recv(10) == b""


def test_a_worker_that_does_not_answer_in_time_can_not_adopt_later(scene: Scene) -> None:
    scene.send()
    scene.wait(ANSWER_TIMEOUT / 2)
    assert scene.settled == []
    scene.wait(ANSWER_TIMEOUT / 2)
    assert scene.settled == [False]
    scene.receiver.doRead()
    assert scene.adopted == []
    scene.sender.doRead()
    assert scene.settled == [False]


def test_a_claimed_connection_is_not_taken_back(scene: Scene) -> None:
    scene.send()
    scene.receiver.doRead()
    scene.wait(10 * ANSWER_TIMEOUT)
    assert scene.settled == []
    scene.sender.doRead()
    assert scene.settled == [True]


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("a bug")])
def test_a_connection_that_can_not_be_adopted_returns_to_the_sender(scene: Scene, error: Exception) -> None:
    scene.refuse = error
    scene.send()
    scene.receiver.doRead()
    scene.sender.doRead()
    assert scene.settled == [False]
    assert scene.connections[0].fileno() >= 0


def test_a_connection_whose_client_has_left_goes_to_no_other_worker(scene: Scene) -> None:
    scene.refuse = OSError(errno.ENOTCONN, "Transport endpoint is not connected")
    scene.send()
    scene.receiver.doRead()
    scene.sender.doRead()
    assert scene.settled == [True]


@pytest.mark.parametrize("free", [0, 1])
def test_a_worker_at_its_limit_of_descriptors_loses_no_connection(scene: Scene, free: int) -> None:
    scene.send()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    plugs = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, limits[1]))
    try:
        while True:
            plugs.append(os.dup(0))
    except OSError:
        for _ in range(free):
            os.close(plugs.pop())
        scene.receiver.doRead()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for plug in plugs:
            os.close(plug)
    scene.sender.doRead()
    assert (scene.adopted, scene.settled) == ([], [False])


def test_unanswered_connections_of_a_dead_worker_return_to_the_sender(scene: Scene) -> None:
    for _ in range(3):
        scene.send()
    scene.receiver._receive()
    scene.receiver.close()
    scene.sender.doRead()
    assert scene.settled == [True, False, False]
    assert not scene.sender.has_room
    assert not scene.send()


def test_a_connection_claimed_by_a_dying_worker_returns_to_the_sender(scene: Scene) -> None:
    scene.send()
    claim = next(iter(scene.sender._transfers.values())).claim
    assert fd_passing.take_claim(claim)
    scene.receiver.close()
    scene.sender.worker_ended()
    assert scene.settled == [False]


def test_a_claimed_connection_stays_with_the_worker_when_the_sender_closes(scene: Scene) -> None:
    scene.send()
    scene.receiver.doRead()
    scene.send()
    scene.sender.close()
    assert scene.settled == [True, False]
    scene.adopted[0].sendall(b"hello")
    assert scene.clients[0].recv(10) == b"hello"


def test_the_number_in_flight_is_bounded(scene: Scene) -> None:
    given = [scene.send() for _ in range(MAX_IN_FLIGHT + 1)]
    assert given == [True] * MAX_IN_FLIGHT + [False]
    assert scene.sender.in_flight == MAX_IN_FLIGHT
    while len(scene.adopted) < MAX_IN_FLIGHT:
        scene.receiver.doRead()  # a batch at a time
    scene.sender.doRead()
    assert scene.settled == [True] * MAX_IN_FLIGHT
    assert scene.send()


def test_a_full_socket_is_no_error(scene: Scene) -> None:
    scene.sender._stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    given = [scene.send() for _ in range(MAX_IN_FLIGHT)]
    assert given[0] and not given[-1]


def test_a_default_timeout_of_the_application_blocks_no_read(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: socket.setdefaulttimeout(None))
    socket.setdefaulttimeout(600.0)  # longer than the limit of a test
    scene = Scene()
    scene.receiver.doRead()
    scene.close()


@given(message=st.binary(max_size=32), fds=st.integers(0, 3))
def test_an_invalid_message_ends_the_stream_or_is_refused(message: bytes, fds: int) -> None:
    reactor = Reactor()
    ours, theirs = pair()
    receiver = FdReceiver(reactor, theirs.detach(), lambda fd: pytest.fail("adopted"))
    before = len(os.listdir("/proc/self/fd"))
    null = os.open(os.devnull, os.O_RDONLY)
    socket.send_fds(ours, [message], [null] * fds)
    os.close(null)
    receiver.doRead()
    if len(message) == 8:
        number_and_verdict = ours.recv(16)
        assert number_and_verdict == message + b"\0"
    else:
        assert not receiver.open
    assert len(os.listdir("/proc/self/fd")) == before - (not receiver.open)
    receiver.close()
    ours.close()


@given(answer=st.binary(min_size=1, max_size=16))
def test_an_invalid_answer_settles_all_connections(answer: bytes) -> None:
    reactor = Reactor()
    ours, theirs = pair()
    sender = FdSender(reactor, ours)
    client, connection = socket.socketpair()
    settled: list[bool] = []
    with client, connection, theirs:
        sender.send(connection, settled.append)
        theirs.send(answer)
        sender.doRead()
        # An answer about an unclaimed connection is accepted.
        assert len(settled) == (len(answer) != 9 or answer[:8] == bytes(8))
        sender.close()
        assert len(settled) == 1


def test_the_reactor_may_notice_the_end_first(scene: Scene) -> None:
    scene.send()
    scene.receiver.close()
    scene.sender.connectionLost(Failure(ConnectionError()))
    assert scene.settled == [False]


def test_a_missing_supervisor_is_no_error(scene: Scene) -> None:
    scene.send()
    scene.sender._stream.close()
    scene.receiver.doRead()
    assert len(scene.adopted) == 1
    assert not scene.receiver.open
    scene.reactor.removeReader(scene.sender)
    scene.sender.open = False
    os.close(scene.sender._transfers.popitem()[1].claim)
