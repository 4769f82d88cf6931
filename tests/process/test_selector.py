"""The poller: what asyncio counts on, and the short way beside it."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtime.process.selector import MOST, ReadingSelector


@pytest.fixture
def poller() -> Iterator[ReadingSelector]:
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


def test_a_reader_is_called_and_asyncio_is_told_nothing(poller: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    poller.read(ours.fileno(), lambda: got.append(ours.recv(100)))
    assert poller.select(0) == []
    theirs.send(b"a")
    assert poller.select(1) == []
    assert got == [b"a"]
    poller.forget(ours.fileno())
    theirs.send(b"b")
    assert poller.select(0) == []
    assert got == [b"a"]


def test_one_descriptor_may_be_read_straight_and_written_by_asyncio(poller: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    poller.read(ours.fileno(), lambda: got.append(ours.recv(100)))
    key = poller.register(ours.fileno(), WRITE, "writer")
    theirs.send(b"a")
    assert poller.select(1) == [(key, WRITE)]
    assert got == [b"a"]
    poller.unregister(ours.fileno())
    theirs.send(b"b")
    assert poller.select(1) == []
    assert got == [b"a", b"b"]


def test_a_reader_hears_of_the_peers_end(poller: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    poller.read(ours.fileno(), lambda: got.append(ours.recv(100)))
    theirs.close()
    poller.select(1)
    assert got == [b""]


def test_whoever_is_forgotten_by_another_reader_is_not_called(poller: ReadingSelector) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def reader(number: int) -> None:
        called.append(number)
        poller.forget(pairs[1 - number][0].fileno())

    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        poller.read(ours.fileno(), lambda number=number: reader(number))
    poller.select(1)
    assert len(called) == 1
    for each in pairs:
        for end in each:
            end.close()


def test_it_is_a_selector(poller: ReadingSelector, pair: Pair) -> None:
    ours, theirs = pair
    fd = ours.fileno()
    key = poller.register(fd, READ, "reader")
    with pytest.raises(KeyError):
        poller.register(fd, READ)
    assert poller.get_key(fd) == key == poller.get_map()[fd]
    theirs.send(b"x")
    assert poller.select(1) == [(key, READ)]
    both = poller.modify(fd, READ | WRITE, "both")
    assert poller.select(1) == [(both, READ | WRITE)]
    other = poller.modify(fd, READ | WRITE, "other")
    assert poller.select(1) == [(other, READ | WRITE)]
    assert poller.unregister(fd) == other
    assert poller.select(0) == []
    with pytest.raises(KeyError):
        poller.get_key(fd)
    with pytest.raises(KeyError):
        poller.unregister(fd)


def test_a_closed_descriptor_is_taken_out_all_the_same(poller: ReadingSelector) -> None:
    ours, theirs = socket.socketpair()
    fd = ours.fileno()
    poller.register(fd, READ)
    ours.close()
    theirs.close()
    poller.unregister(fd)
    again, other = socket.socketpair()
    with again, other:
        key = poller.register(again.fileno(), WRITE)
        assert poller.select(1) == [(key, WRITE)]


def test_what_epoll_refuses_is_not_kept(poller: ReadingSelector, tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        for refused in (lambda: poller.register(file.fileno(), READ), lambda: poller.read(file.fileno(), print)):
            with pytest.raises(PermissionError):
                refused()
    assert not poller.get_map()
    assert poller.select(0) == []


def test_a_turn_has_an_end_and_nobody_is_left_out(poller: ReadingSelector) -> None:
    pipes = [os.pipe() for _ in range(MOST + 50)]
    called: set[int] = set()
    for number, (reader, writer) in enumerate(pipes):
        os.write(writer, b"x")
        poller.read(reader, lambda number=number: called.add(number))
    poller.select(0)
    assert len(called) == MOST
    poller.select(0)
    assert len(called) == MOST + 50
    for each in pipes:
        for end in each:
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


def test_an_asyncio_loop_runs_on_it() -> None:
    # In a process of its own: here a loop runs already.
    ran = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("50001\nTrue\n", "")
