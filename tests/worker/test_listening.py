"""Listening ports of a worker, on sockets that the test opened as the supervisor does."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from twisted.internet import reactor, tcp
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.worker.listening import MAX_ACCEPTS, adopt
from tests.transports.stage import eventually


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        listening.setblocking(False)
        yield listening


def connect(listening: socket.socket) -> socket.socket:
    return socket.create_connection(listening.getsockname()[:2], timeout=5)


def is_descriptor_of(fd: int, listening: socket.socket) -> bool:
    """Return whether `fd` is open and refers to the socket; Twisted may have opened another file under its number."""
    try:
        return os.fstat(fd).st_ino == os.fstat(listening.fileno()).st_ino
    except OSError:
        return False


def accept_all(listening: socket.socket) -> int:
    """Accept the queued connections of a socket, and return their number."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            listening.accept()[0].close()
            count += 1
    return count


async def test_an_adopted_port_serves_and_its_end_leaves_the_queue(listening: socket.socket) -> None:
    served: Deferred[None] = Deferred()

    class Serve(Protocol):
        def connectionMade(self) -> None:
            assert self.transport is not None
            self.transport.loseConnection()
            served.callback(None)

    fd = os.dup(listening.fileno())
    assert is_descriptor_of(fd, listening)
    port = adopt(reactor, fd, Factory.forProtocol(Serve))
    assert not is_descriptor_of(fd, listening)
    with connect(listening):
        await served
    await port.stopListening()
    # The original socket still listens: a new client waits in its queue, and is accepted.
    with connect(listening):
        assert accept_all(listening) == 1


async def test_one_turn_of_the_loop_accepts_a_bounded_number(listening: socket.socket) -> None:
    class Count(Protocol):
        def connectionMade(self) -> None:
            turns[-1] += 1

    turns: list[int] = []
    port = adopt(reactor, os.dup(listening.fileno()), Factory.forProtocol(Count))
    with ExitStack() as clients:
        for _ in range(3 * MAX_ACCEPTS + 2):
            clients.enter_context(connect(listening))
        for _ in range(5):
            turns.append(0)
            port.doRead()
    assert turns == [MAX_ACCEPTS, MAX_ACCEPTS, MAX_ACCEPTS, 2, 0]
    await port.stopListening()


async def test_a_crowd_without_descriptors_is_one_line_in_the_log(listening: socket.socket) -> None:
    port = adopt(reactor, os.dup(listening.fileno()), Factory.forProtocol(Protocol))
    events: list[LogEvent] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as clients:
        for _ in range(3 * MAX_ACCEPTS):
            clients.enter_context(connect(listening))
        globalLogPublisher.addObserver(events.append)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, limits[1]))
        plugs: list[int] = []
        try:
            with suppress(OSError):
                while True:
                    plugs.append(os.dup(0))
            for _ in range(3 * MAX_ACCEPTS):
                port.doRead()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            globalLogPublisher.removeObserver(events.append)
            for plug in plugs:
                os.close(plug)
    assert ["turned away" in formatEvent(event) for event in events] == [True]
    await port.stopListening()


async def test_connections_get_the_transport_and_their_acceptance_is_charged_to_http(listening: socket.socket) -> None:
    class OwnServer(tcp.Server):
        pass

    now = 0

    class Slow(Factory):
        def buildProtocol(self, address: Any) -> Protocol:
            nonlocal now
            now += 7
            return made.append(Protocol()) or made[-1]  # type: ignore[func-returns-value]

    made: list[Protocol] = []
    ledger = LoopTimeLedger(lambda: now)
    port = adopt(reactor, os.dup(listening.fileno()), Slow(), OwnServer, ledger)
    with connect(listening):
        port.doRead()
        assert type(made[0].transport) is OwnServer
        assert ledger.open(LoopWork.HTTP).spent == 7
        assert ledger.current is ledger.open(LoopWork.OTHER)
        made[0].transport.abortConnection()  # type: ignore[union-attr]
    await port.stopListening()


async def test_a_failed_connection_is_closed_and_the_next_one_is_served(listening: socket.socket) -> None:
    class Fails(Protocol):
        def connectionMade(self) -> None:
            if len(made) == 1:
                raise RuntimeError("a bug")
            self.transport.loseConnection()  # type: ignore[union-attr]

    class Failing(Factory):
        def buildProtocol(self, address: Any) -> Protocol:
            made.append(Fails())
            return made[-1]

    made: list[Protocol] = []
    port = adopt(reactor, os.dup(listening.fileno()), Failing())
    for _ in range(2):
        with connect(listening) as client:
            client.setblocking(False)
            await eventually(lambda client=client: is_closed(client))  # type: ignore[misc]
    assert len(made) == 2
    await port.stopListening()


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


async def test_a_port_on_an_ipv6_socket(listening: socket.socket) -> None:
    try:
        inherited = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    port = adopt(reactor, inherited.detach(), Factory.forProtocol(Protocol))
    assert port.addressFamily == socket.AF_INET6
    assert port.getHost().host == "::1"
    await port.stopListening()


async def test_a_default_timeout_of_the_application_blocks_no_accept(
    listening: socket.socket, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: socket.setdefaulttimeout(None))
    socket.setdefaulttimeout(5.0)
    port = adopt(reactor, os.dup(listening.fileno()), Factory.forProtocol(Protocol))
    began = time.monotonic()
    with connect(listening):
        port.doRead()
        port.doRead()
    assert time.monotonic() - began < 4
    await port.stopListening()
