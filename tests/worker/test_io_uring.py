"""Fan-out by io_uring: whatever the sockets do, each gets what it would have got by send(2)."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from realtime.pubsub.subscriber import Sink
from realtime.worker import io_uring as module
from realtime.worker.io_uring import FEW, LONGEST, MOST, IOURing


@pytest.fixture(scope="module")
def ring() -> IOURing:
    try:
        return IOURing()
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


class Peer:
    """A subscriber: its sink, and what it reads. kept: what the kernel did not take, in order."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.kept: list[bytes] = []
        self.sink = Sink(self.ours.send, self.queue_remainder)
        self.sink.fd = self.ours.fileno()

    def queue_remainder(self, frame: bytes, taken: int) -> None:
        self.kept.append(frame[taken:])
        # From now on something waits, as with a connection.
        self.sink.fd, self.sink.send = -1, self.wait

    def wait(self, frame: bytes) -> int:
        self.kept.append(frame)
        return len(frame)

    def read(self) -> bytes:
        got = b""
        while True:
            try:
                piece = self.theirs.recv(1 << 20)
            except BlockingIOError:
                return got
            if not piece:
                return got
            got += piece

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    made = [Peer() for _ in range(MOST + 60)]
    yield made
    for peer in made:
        peer.close()


def sinks(peers: list[Peer]) -> list[Sink]:
    return [peer.sink for peer in peers]


def test_everybody_gets_everything_in_order(ring: IOURing, peers: list[Peer]) -> None:
    said = b""
    # The numbers of receivers have the ring go round at other places each time.
    for number in range(50):
        frame = b"%d," % number * (1 + number % 7)
        said += frame
        for start in range(0, len(peers), 37 + number):
            ring.broadcast(frame, sinks(peers[start : start + 37 + number]))
    assert {peer.read() for peer in peers} == {said}
    assert not any(peer.kept for peer in peers)


def test_who_does_not_keep_up_loses_nothing_and_delays_nobody(ring: IOURing, peers: list[Peer]) -> None:
    slow, quick = peers[:20], peers[20:40]
    for number, peer in enumerate(slow):
        peer.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096 + 512 * number)
    said, got = b"", dict.fromkeys(quick, b"")
    for number in range(60):
        frame = bytes((number,)) * (1000 + number)
        said += frame
        ring.broadcast(frame, sinks([*slow[:10], *quick, *slow[10:]]))
        for peer in quick:
            got[peer] += peer.read()
    assert set(got.values()) == {said}
    assert all(peer.kept for peer in slow)
    for peer in slow:
        assert peer.read() + b"".join(peer.kept) == said


def test_part_of_a_frame_is_told_as_such(ring: IOURing, peers: list[Peer]) -> None:
    """A stream socket of TCP takes what fits, in the midst of a frame."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 30_000)
    peer, others = peers[0], peers[1:FEW]
    peer.ours.close()
    peer.ours = ours
    peer.sink.fd = ours.fileno()
    said = b""
    while not peer.kept:
        frame = bytes((65 + len(said) % 26,)) * 50_000
        said += frame
        ring.broadcast(frame, sinks([peer, *others]))
        for other in others:
            other.read()
            other.sink.fd = other.ours.fileno()
    ours.close()
    theirs.settimeout(10)
    got = b"".join(iter(lambda: theirs.recv(1 << 20), b""))
    assert got + b"".join(peer.kept) == said
    theirs.close()


def test_who_has_gone_is_told_as_having_taken_nothing(ring: IOURing, peers: list[Peer]) -> None:
    gone, closed, *others = peers[:FEW]
    gone.theirs.close()
    closed.ours.close()  # its descriptor is nobody's
    ring.broadcast(b"frame", sinks([gone, closed, *others]))
    assert (gone.kept, closed.kept) == ([b"frame"], [b"frame"])
    assert {peer.read() for peer in others} == {b"frame"}


def test_where_something_waits_a_frame_waits_too(ring: IOURing, peers: list[Peer]) -> None:
    peers[3].queue_remainder(b"earlier", 0)
    ring.broadcast(b"frame", sinks(peers))
    assert peers[3].kept == [b"earlier", b"frame"]
    assert peers[3].read() == b""
    assert {peer.read() for peer in peers if peer is not peers[3]} == {b"frame"}


@pytest.mark.parametrize(("number", "size"), [(1, 10), (FEW - 1, 10), (FEW, LONGEST), (FEW, LONGEST + 1), (FEW, 0)])
def test_few_and_long_ones(ring: IOURing, peers: list[Peer], number: int, size: int) -> None:
    ring.broadcast(b"x" * size, sinks(peers[:number]))
    for peer in peers[:number]:
        assert peer.read() + b"".join(peer.kept) == b"x" * size
    ring.broadcast(b"", [])


def test_what_the_kernel_does_not_take_in_is_not_lost(
    ring: IOURing, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = module._call
    monkeypatch.setattr(module, "_call", lambda number, fd, count: call(number, fd, count // 2) if count > 1 else -1)
    ring.broadcast(b"one", sinks(peers[:20]))
    monkeypatch.setattr(module, "_call", lambda *arguments: -1)
    ring.broadcast(b"two", sinks(peers[20:40]))
    monkeypatch.undo()
    ring.broadcast(b"three", sinks(peers[:40]))
    for peer in peers[:10]:
        assert (peer.read(), peer.kept) == (b"onethree", [])
    for peer in peers[10:20]:
        assert (peer.read(), peer.kept) == (b"", [b"one", b"three"])
    for peer in peers[20:40]:
        assert (peer.read(), peer.kept) == (b"", [b"two", b"three"])


def test_a_kernel_that_forbids_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: int) -> int:
        module.ctypes.set_errno(1)
        return -1

    monkeypatch.setattr(module, "_call", forbidden)
    with pytest.raises(PermissionError):
        IOURing()
