"""Fan-out by io_uring: each socket receives the same bytes as with send(2), in every state of the sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from realtime.pubsub.subscriber import Sink
from realtime.worker import io_uring as module
from realtime.worker.io_uring import MAX_FRAME, MAX_SENDS, MIN_SINKS, IOURing


@pytest.fixture(scope="module")
def ring() -> IOURing:
    try:
        return IOURing()
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


class Peer:
    """A subscriber: its sink, and its end of the socket. kept: the bytes that the kernel did not take, in order."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.kept: list[bytes] = []
        self.sink = Sink(self.ours.send, self.queue_remainder)
        self.sink.fd = self.ours.fileno()

    def queue_remainder(self, frame: bytes, sent: int) -> None:
        self.kept.append(frame[sent:])
        # From now on frames are queued, as with a connection.
        self.sink.fd, self.sink.send = -1, self.queue

    def queue(self, frame: bytes) -> int:
        self.kept.append(frame)
        return len(frame)

    def read(self) -> bytes:
        received = b""
        while True:
            try:
                piece = self.theirs.recv(1 << 20)
            except BlockingIOError:
                return received
            if not piece:
                return received
            received += piece

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    made = [Peer() for _ in range(MAX_SENDS + 60)]
    yield made
    for peer in made:
        peer.close()


def sinks(peers: list[Peer]) -> list[Sink]:
    return [peer.sink for peer in peers]


def test_every_sink_gets_every_frame_in_order(ring: IOURing, peers: list[Peer]) -> None:
    sent = b""
    # These numbers of receivers make the ring wrap around at another place each time.
    for number in range(50):
        frame = b"%d," % number * (1 + number % 7)
        sent += frame
        for start in range(0, len(peers), 37 + number):
            ring.broadcast(frame, sinks(peers[start : start + 37 + number]))
    assert {peer.read() for peer in peers} == {sent}
    assert not any(peer.kept for peer in peers)


def test_slow_sinks_lose_nothing_and_delay_no_other(ring: IOURing, peers: list[Peer]) -> None:
    slow, quick = peers[:20], peers[20:40]
    for number, peer in enumerate(slow):
        peer.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096 + 512 * number)
    sent, got = b"", dict.fromkeys(quick, b"")
    for number in range(60):
        frame = bytes((number,)) * (1000 + number)
        sent += frame
        ring.broadcast(frame, sinks([*slow[:10], *quick, *slow[10:]]))
        for peer in quick:
            got[peer] += peer.read()
    assert set(got.values()) == {sent}
    assert all(peer.kept for peer in slow)
    for peer in slow:
        assert peer.read() + b"".join(peer.kept) == sent


def test_a_partial_send_is_reported_as_such(ring: IOURing, peers: list[Peer]) -> None:
    """A TCP socket takes as many bytes as fit, and may stop in the middle of a frame."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 30_000)
    peer, others = peers[0], peers[1:MIN_SINKS]
    peer.ours.close()
    peer.ours = ours
    peer.sink.fd = ours.fileno()
    sent = b""
    while not peer.kept:
        frame = bytes((65 + len(sent) % 26,)) * 50_000
        sent += frame
        ring.broadcast(frame, sinks([peer, *others]))
        for other in others:
            other.read()
            other.sink.fd = other.ours.fileno()
    ours.close()
    theirs.settimeout(10)
    got = b"".join(iter(lambda: theirs.recv(1 << 20), b""))
    assert got + b"".join(peer.kept) == sent
    theirs.close()


def test_a_closed_connection_is_reported_as_having_taken_nothing(ring: IOURing, peers: list[Peer]) -> None:
    gone, closed, *others = peers[:MIN_SINKS]
    gone.theirs.close()
    closed.ours.close()  # its descriptor is closed
    ring.broadcast(b"frame", sinks([gone, closed, *others]))
    assert (gone.kept, closed.kept) == ([b"frame"], [b"frame"])
    assert {peer.read() for peer in others} == {b"frame"}


def test_a_sink_with_queued_frames_queues_the_frame_too(ring: IOURing, peers: list[Peer]) -> None:
    peers[3].queue_remainder(b"earlier", 0)
    ring.broadcast(b"frame", sinks(peers))
    assert peers[3].kept == [b"earlier", b"frame"]
    assert peers[3].read() == b""
    assert {peer.read() for peer in peers if peer is not peers[3]} == {b"frame"}


@pytest.mark.parametrize(
    ("number", "size"),
    [(1, 10), (MIN_SINKS - 1, 10), (MIN_SINKS, MAX_FRAME), (MIN_SINKS, MAX_FRAME + 1), (MIN_SINKS, 0)],
)
def test_few_sinks_and_long_frames(ring: IOURing, peers: list[Peer], number: int, size: int) -> None:
    ring.broadcast(b"x" * size, sinks(peers[:number]))
    for peer in peers[:number]:
        assert peer.read() + b"".join(peer.kept) == b"x" * size
    ring.broadcast(b"", [])


def test_sends_that_the_kernel_does_not_accept_are_not_lost(
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


def test_a_kernel_that_forbids_io_uring_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: int) -> int:
        module.ctypes.set_errno(1)
        return -1

    monkeypatch.setattr(module, "_call", forbidden)
    with pytest.raises(PermissionError):
        IOURing()
