"""Frames with descriptors over a real socket pair. Both ends are in this process."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor, task

from realtime.process.fd_stream import FdStream, close_all, stream_pair
from tests.transports.stage import eventually


class Ends:
    """Both ends of a stream. frames: received by the second one, with the contents of their descriptors."""

    def __init__(self) -> None:
        ours, theirs = stream_pair()
        self.ended: list[str] = []
        self.frames: list[tuple[bytes, list[str]]] = []
        self.sender = FdStream(reactor, ours.detach(), self._unexpected, lambda: self.ended.append("sender"))
        self.receiver = FdStream(reactor, theirs.detach(), self._receive, lambda: self.ended.append("receiver"))

    def _unexpected(self, body: bytes, descriptors: list[int]) -> None:
        raise AssertionError

    def _receive(self, body: bytes, descriptors: list[int]) -> None:
        self.frames.append((body, [os.read(descriptor, 10).decode() for descriptor in descriptors]))
        close_all(descriptors)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


@contextmanager
def pipes(*contents: str) -> Iterator[list[int]]:
    """Readable ends of pipes with these contents."""
    readable = []
    for content in contents:
        end, other = os.pipe()
        os.write(other, content.encode())
        os.close(other)
        readable.append(end)
    try:
        yield readable
    finally:
        close_all(readable)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_frames_keep_their_order_and_their_descriptors(ends: Ends) -> None:
    long = bytes(1_000_000)  # longer than the socket's buffer
    with pipes("a", "b", "c") as (first, second, third):
        ends.sender.send(b"one", [first, second])
        ends.sender.send(b"")
        ends.sender.send(long, [third])
        ends.sender.send(b"end")
        await eventually(lambda: len(ends.frames) == 4)
    assert ends.frames == [(b"one", ["a", "b"]), (b"", []), (long, ["c"]), (b"end", [])]


async def test_a_receiver_without_free_descriptors_gets_the_frame_without_any(ends: Ends) -> None:
    before = open_descriptors()
    with pipes("a", "b") as descriptors:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        ends.sender.send(b"one", descriptors)
        ends.sender.send(b"two")
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))  # room for one of the two
        try:
            await eventually(lambda: len(ends.frames) == 2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        ends.sender.send(b"three", descriptors)
        await eventually(lambda: len(ends.frames) == 3)
    assert ends.frames == [(b"one", []), (b"two", []), (b"three", ["a", "b"])]
    assert open_descriptors() == before


async def test_the_end_of_one_side_is_reported_once_and_drops_an_incomplete_frame(ends: Ends) -> None:
    before = open_descriptors()
    with pipes("a") as descriptors:
        ends.sender.send(bytes(1_000_000), descriptors)
        ends.sender.close()
        await eventually(lambda: ends.ended == ["receiver"])
        ends.sender.send(b"late")
        ends.receiver.send(b"late")
    await task.deferLater(reactor, 0)
    assert (ends.ended, ends.frames) == (["receiver"], [])
    assert open_descriptors() == before - 2


async def test_a_frame_that_is_too_long_ends_the_stream(ends: Ends) -> None:
    raw: Any = socket.socket(fileno=os.dup(ends.sender.fileno()))
    with raw:
        raw.send(b"\xff" * 6 + b"x")
        await eventually(lambda: ends.ended[:1] == ["receiver"])
    assert ends.frames == []
