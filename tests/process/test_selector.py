"""The selector: the interface for asyncio, and direct readers."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtime.process.selector import MAX_EVENTS, ReadingSelector


@pytest.fixture
def selector() -> Iterator[ReadingSelector]:
    made = ReadingSelector()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def test_a_direct_reader_is_called_and_its_events_are_not_returned(selector: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    selector.add_direct_reader(ours.fileno(), lambda: got.append(ours.recv(100)))
    assert selector.select(0) == []
    theirs.send(b"a")
    assert selector.select(1) == []
    assert got == [b"a"]
    selector.remove_direct_reader(ours.fileno())
    theirs.send(b"b")
    assert selector.select(0) == []
    assert got == [b"a"]


def test_one_descriptor_may_have_a_direct_reader_and_an_asyncio_writer(selector: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    selector.add_direct_reader(ours.fileno(), lambda: got.append(ours.recv(100)))
    key = selector.register(ours.fileno(), WRITE, "writer")
    theirs.send(b"a")
    assert selector.select(1) == [(key, WRITE)]
    assert got == [b"a"]
    selector.unregister(ours.fileno())
    theirs.send(b"b")
    assert selector.select(1) == []
    assert got == [b"a", b"b"]


def test_a_direct_reader_is_called_when_the_peer_closes(selector: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    selector.add_direct_reader(ours.fileno(), lambda: got.append(ours.recv(100)))
    theirs.close()
    selector.select(1)
    assert got == [b""]


def test_a_direct_reader_removed_by_another_is_not_called(selector: ReadingSelector) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def reader(number: int) -> None:
        called.append(number)
        selector.remove_direct_reader(pairs[1 - number][0].fileno())

    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        selector.add_direct_reader(ours.fileno(), lambda number=number: reader(number))
    selector.select(1)
    assert len(called) == 1
    for pair in pairs:
        for end in pair:
            end.close()


def test_writing_follows_all_reading_of_the_turn(selector: ReadingSelector) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    done: list[object] = []

    def read(number: int) -> None:
        pairs[number][0].recv(100)
        done.append(number)
        selector.call_after_reading(lambda: done.append("written"))

    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        selector.add_direct_reader(ours.fileno(), lambda number=number: read(number))
    selector.select(1)
    assert sorted(map(str, done[:2])) == ["0", "1"] and done[2:] == ["written", "written"]
    for pair in pairs:
        for end in pair:
            end.close()


def test_the_selector_interface(selector: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    fd = ours.fileno()
    key = selector.register(fd, READ, "reader")
    with pytest.raises(KeyError):
        selector.register(fd, READ)
    assert selector.get_key(fd) == key == selector.get_map()[fd]
    theirs.send(b"x")
    assert selector.select(1) == [(key, READ)]
    both = selector.modify(fd, READ | WRITE, "both")
    assert selector.select(1) == [(both, READ | WRITE)]
    other = selector.modify(fd, READ | WRITE, "other")
    assert selector.select(1) == [(other, READ | WRITE)]
    assert selector.unregister(fd) == other
    assert selector.select(0) == []
    with pytest.raises(KeyError):
        selector.get_key(fd)
    with pytest.raises(KeyError):
        selector.unregister(fd)


def test_a_closed_descriptor_can_be_unregistered(selector: ReadingSelector) -> None:
    ours, theirs = socket.socketpair()
    fd = ours.fileno()
    selector.register(fd, READ)
    ours.close()
    theirs.close()
    selector.unregister(fd)
    again, other = socket.socketpair()
    with again, other:
        key = selector.register(again.fileno(), WRITE)
        assert selector.select(1) == [(key, WRITE)]


def test_a_descriptor_refused_by_epoll_is_not_registered(selector: ReadingSelector, tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        for refused in (
            lambda: selector.register(file.fileno(), READ),
            lambda: selector.add_direct_reader(file.fileno(), print),
        ):
            with pytest.raises(PermissionError):
                refused()
    assert not selector.get_map()
    assert selector.select(0) == []


def test_a_turn_handles_a_limited_number_of_events_and_the_next_one_the_rest(selector: ReadingSelector) -> None:
    pipes = [os.pipe() for _ in range(MAX_EVENTS + 50)]
    called: set[int] = set()
    for number, (reader, writer) in enumerate(pipes):
        os.write(writer, b"x")
        selector.add_direct_reader(reader, lambda number=number: called.add(number))
    selector.select(0)
    assert len(called) == MAX_EVENTS
    selector.select(0)
    assert len(called) == MAX_EVENTS + 50
    for pipe in pipes:
        for end in pipe:
            os.close(end)


LOOP = """
import asyncio
from realtime.process.selector import ReadingSelector

async def serve(reader, writer):
    writer.write(await reader.readline())
    writer.close()

async def talk():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"x" * 50_000 + b"\\n")
    print(len(await reader.read()))
    began = loop.time()
    await asyncio.sleep(0.0123)
    print(loop.time() - began >= 0.0122)
    writer.close()
    server.close()

loop = asyncio.SelectorEventLoop(ReadingSelector())
loop.run_until_complete(talk())
loop.close()
"""


class Peer:
    """The owner of a descriptor, and its protocol, which reads what arrives."""

    def __init__(self, selector: ReadingSelector, number: int, order: list[int]) -> None:
        self.is_known = False
        self.protocol = self
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        selector.add_direct_reader(self.ours.fileno(), lambda: order.append(self.ours.recv(1)[0]), guest=self)
        self.theirs.send(bytes([number]))


def test_strangers_are_read_after_clients_for_one_slice_of_each_turn(
    selector: ReadingSelector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realtime.process.selector.STRANGER_SLICE", 0.0)  # one stranger in each turn
    order: list[int] = []
    peers = [Peer(selector, number, order) for number in range(20)]
    try:
        peers[-1].is_known = True
        selector.select(1)
        assert order == [19, 0]
        peers[0].theirs.send(bytes([0]))  # comes after all that wait
        peers[-1].theirs.send(bytes([19]))
        selector.select(1)
        assert order == [19, 0, 19, 1]
        while len(order) < 22:
            selector.select(1)
        assert order == [19, 0, 19, *range(1, 19), 0]
    finally:
        for peer in peers:
            selector.remove_direct_reader(peer.ours.fileno())
            peer.ours.close()
            peer.theirs.close()


def test_an_asyncio_loop_runs_on_the_selector() -> None:
    # In a separate process: a loop runs already in this one.
    ran = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("50001\nTrue\n", "")


FILE_OBJECTS = """
import asyncio, socket
from realtime.process.selector import ReadingSelector

class CountingSelector(ReadingSelector):
    selects = 0

    def select(self, timeout=None):
        self.selects += 1
        return super().select(timeout)

async def talk():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    received, writable = asyncio.Queue(), asyncio.Event()
    loop.add_reader(ours, lambda: received.put_nowait(ours.recv(10)))
    theirs.send(b"a")
    print(await asyncio.wait_for(received.get(), 20))
    before = selector.selects
    await asyncio.sleep(0.2)
    print("idle" if selector.selects - before < 10 else "spins")
    loop.add_writer(ours, writable.set)
    await asyncio.wait_for(writable.wait(), 20)
    print(loop.remove_writer(ours), loop.remove_writer(ours.fileno()))
    theirs.send(b"b")
    print(await asyncio.wait_for(received.get(), 20))
    loop.add_reader(ours.fileno(), lambda: received.put_nowait(b"replaced " + ours.recv(10)))
    theirs.send(b"c")
    print(await asyncio.wait_for(received.get(), 20))
    print(loop.remove_reader(ours), loop.remove_reader(ours))
    loop.add_reader(theirs, print)
    theirs.close()
    print(loop.remove_reader(theirs))
    before = selector.selects
    await asyncio.sleep(0.2)
    print("idle" if selector.selects - before < 10 else "spins")
    ours.close()

selector = CountingSelector()
loop = asyncio.SelectorEventLoop(selector)
loop.run_until_complete(talk())
loop.close()
"""


def test_an_application_may_register_socket_objects_with_the_loop() -> None:
    ran = subprocess.run([sys.executable, "-c", FILE_OBJECTS], capture_output=True, text=True, timeout=120)
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [
        "b'a'",
        "idle",
        "True False",
        "b'b'",
        "b'replaced c'",
        "True False",
        "True",
        "idle",
    ]


def test_a_file_object_and_its_descriptor_are_one_registration(selector: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    key = selector.register(ours, READ, "reader")
    assert (key.fileobj, key.fd) == (ours, ours.fileno())
    with pytest.raises(KeyError):
        selector.register(ours.fileno(), READ)
    assert selector.get_key(ours) == selector.get_key(ours.fileno()) == key
    theirs.send(b"x")
    assert selector.select(1) == [(key, READ)]
    assert selector.modify(ours.fileno(), WRITE, "writer").fileobj is ours
    selector.unregister(ours)
    for absent in (ours, ours.fileno()):
        with pytest.raises(KeyError):
            selector.get_key(absent)


def test_a_closed_file_object_can_not_be_registered(selector: ReadingSelector) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    theirs.close()
    with pytest.raises(ValueError, match="no descriptor"):
        selector.register(ours, READ)
