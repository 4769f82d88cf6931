"""Many idle clients in one process: each connects, answers pings, and otherwise waits. Run by test_idle.py.

Arguments: port, number of connections, seconds to hold them. Prints "holding" and a line break once all have connected,
then waits, then one line of JSON: connected, still open at the end, pings answered.

Plain sockets and one epoll object, since an SDK's client would weigh more than the server that is measured.
"""

from __future__ import annotations

import json
import resource
import select
import socket
import sys
import time

HANDSHAKE = (
    b"GET /connection/websocket HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
ABREAST = 64  # connections that are being made at a time
CONNECT_LIMIT = 60.0


def masked(payload: bytes) -> bytes:
    """A client's text frame of up to 125 bytes, masked with zeros (RFC 6455 section 5.2)."""
    return bytes((0x81, 0x80 | len(payload), 0, 0, 0, 0)) + payload


HELLO = masked(b'{"id":1,"connect":{"data":{"user":"idle"}}}')
PING = b"\x81\x02{}"
PONG = masked(b"{}")


class Connection:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.socket.send(HANDSHAKE)
        self.upgraded = self.connected = False
        self.received = b""

    def read(self) -> int:
        """Take what has arrived; the number of pings that were answered. Raises ConnectionError when it is over."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError
        if self.connected:
            pings = data.count(PING)
            if pings:
                self.socket.send(PONG * pings)
            return pings
        self.received += data
        if not self.upgraded and b"\r\n\r\n" in self.received:
            head, self.received = self.received.split(b"\r\n\r\n", 1)
            if not head.startswith(b"HTTP/1.1 101"):
                raise ConnectionError(head)
            self.upgraded = True
            self.socket.send(HELLO)
        if b'"connect"' in self.received:
            self.connected, self.received = True, b""
        return 0


class Crowd:
    def __init__(self, port: int) -> None:
        self.port = port
        self.poll = select.epoll()
        self.open: dict[int, Connection] = {}
        self.connected = 0
        self.pings = 0

    def add(self) -> None:
        connection = Connection(self.port)
        self.open[connection.socket.fileno()] = connection
        self.poll.register(connection.socket, select.EPOLLIN)

    def turn(self, timeout: float) -> None:
        for descriptor, _ in self.poll.poll(timeout):
            connection = self.open[descriptor]
            fresh = not connection.connected
            try:
                self.pings += connection.read()
            except ConnectionError:
                del self.open[descriptor]
                connection.socket.close()
                continue
            self.connected += fresh and connection.connected

    def gather(self, count: int) -> None:
        deadline = time.monotonic() + CONNECT_LIMIT
        begun = 0
        while self.connected < count and time.monotonic() < deadline:
            while begun < count and begun - self.connected < ABREAST:
                self.add()
                begun += 1
            self.turn(0.1)

    def hold(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.turn(left)


def main() -> None:
    port, count, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    crowd = Crowd(port)
    crowd.gather(count)
    print("holding", flush=True)
    sys.stdin.readline()
    crowd.hold(seconds)
    print(json.dumps({"connected": crowd.connected, "open": len(crowd.open), "pings": crowd.pings}), flush=True)


if __name__ == "__main__":
    main()
