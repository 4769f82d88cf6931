"""Many clients in one process: a small event loop over bare sockets and epoll, and the durations that it measures."""

from __future__ import annotations

import heapq
import itertools
import json
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HANDSHAKE = (
    b"GET /connection/websocket HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def text_frame(message: object) -> bytes:
    """Return a short client frame. Its mask of zeros leaves the payload unchanged."""
    payload = json.dumps(message).encode()
    assert len(payload) < 126
    return bytes((0x81, 0x80 | len(payload))) + bytes(4) + payload


CONNECT = text_frame({"id": 1, "connect": {}})
PONG = text_frame({})


@dataclass
class Sample:
    """The measurements of one kind of client. seconds: the duration of each success."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0

    def quantile(self, share: float) -> float:
        """Return a quantile in milliseconds."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


class Clients:
    """A small event loop for many sockets and timers. It is minimal because every figure includes its delay."""

    def __init__(self, port: int) -> None:
        self.address = ("127.0.0.1", port)
        self._poll = select.epoll()
        self._peers: dict[int, Peer] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()

    def at(self, when: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._serial), function))

    def add(self, peer: Peer) -> None:
        self._peers[peer.fileno()] = peer
        self._poll.register(peer.fileno(), select.EPOLLIN)

    def remove(self, peer: Peer) -> None:
        del self._peers[peer.fileno()]
        self._poll.unregister(peer.fileno())

    def run(self, done: Callable[[], bool]) -> None:
        """Run until `done()` is true, checked after each turn."""
        while not done():
            now = time.perf_counter()
            wait = min(0.05, self._timers[0][0] - now) if self._timers else 0.05
            for fd, _ in self._poll.poll(max(wait, 0.0)):
                if fd in self._peers:
                    self._peers[fd].read()
            now = time.perf_counter()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()


class Peer:
    """One connection. connected: called with this peer after the reply to its connect command, or after a failure."""

    def __init__(self, clients: Clients, connected: Callable[[Peer], None]) -> None:
        self.pid = 0  # of its worker, once connected
        self.replied: Callable[[], None] = lambda: None
        self.began = time.perf_counter()
        self._clients = clients
        self._connected = connected
        self._received = b""
        self._shaken = False
        self._socket = socket.create_connection(clients.address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        clients.add(self)
        self._socket.send(HANDSHAKE)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def close(self) -> None:
        if self.fileno() >= 0:
            self._clients.remove(self)
            self._socket.close()

    def read(self) -> None:
        try:
            data = self._socket.recv(65536)
        except ConnectionError:
            data = b""
        self._received += data
        if not data:
            self.close()
            self._connected(self)
        elif not self._shaken:
            self._read_response()
        else:
            self._read_frames()

    def _read_response(self) -> None:
        head, blank, rest = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        if not head.startswith(b"HTTP/1.1 101 "):
            self.close()
            self._connected(self)
            return
        self._shaken, self._received = True, rest
        self.send(CONNECT)

    def _read_frames(self) -> None:
        while len(self._received) >= 4:
            length, start = self._received[1], 2
            if length == 126:
                length, start = int.from_bytes(self._received[2:4], "big"), 4
            if len(self._received) < start + length:
                return
            payload = self._received[start : start + length]
            self._received = self._received[start + length :]
            for line in payload.splitlines():
                self._take(json.loads(line))

    def _take(self, reply: dict[str, Any]) -> None:
        if "connect" in reply:
            self.pid = reply["connect"]["data"]["pid"]
            self._connected(self)
        elif reply:
            self.replied()
        else:
            self.send(PONG)
