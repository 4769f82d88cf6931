"""The load generator: many WebSocket clients in one process, over bare sockets and epoll(7).

    python load.py '{"ports": [8000], "dialect": "realtime", "act": "fanout", "warm": 10, "times": 100, ...}'

It prints "ready" when its clients are connected and the warm-up is complete, begins when it reads a line, prints
"done" at the end, and then prints its results as one line of JSON. Nothing else runs between "ready" and "done", so
the starting process reads the server's CPU time at both words. The generator must not become the bottleneck.
Therefore it reports its own share of a core, and during the measurement it barely parses messages: it searches for
the mark in its own messages.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# Concurrent connection attempts while the clients connect.
GATHERING = 64
# Seconds without progress before the generator gives up.
PATIENCE = 30.0
# The beginning of the text of each message, see `stamped`.
MARK = b'"0000'
MASK = b"\x37\xfa\x21\x3d"
# See socket(7); Python has no name for this option. The kernel adds a struct timespec.
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("ll")

Act = Callable[[int], list[float]]


def frame(payload: bytes) -> bytes:
    """Return a text frame of a client (RFC 6455, section 5)."""
    length = len(payload)
    head = bytes((0x81, 0x80 | length)) if length < 126 else b"\x81\xfe" + length.to_bytes(2, "big")
    mask = int.from_bytes((MASK * (length // 4 + 1))[:length], "big")
    return head + MASK + (int.from_bytes(payload, "big") ^ mask).to_bytes(length, "big")


def handshake(path: str) -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {b64encode(os.urandom(16)).decode()}\r\n\r\n"
    ).encode()


class Bare:
    """Clients of a server that sends each message to all clients, or only back to the sender with the path /echo.

    hello: the first frame after the handshake. welcomes: the number of replies that complete a connection. ping: the
    server's ping and the client's answer.
    """

    ping = (b"\0", b"")
    hello = b""
    welcomes = 0

    def __init__(self, channel: str) -> None:
        self.path = "/" + channel

    def replies(self, message: bytes) -> int:
        """Return the number of expected replies in `message`."""
        return 1

    def publish(self, data: bytes) -> bytes:
        return frame(b'{"data":"%b"}' % data)

    def call(self, data: bytes, how: str) -> bytes:
        return frame(b'{"data":"%b"}' % data)


class Realtime(Bare):
    """The client protocol of this server, in JSON."""

    ping = (b"{}", frame(b"{}"))

    def __init__(self, channel: str) -> None:
        self.path = "/connection/websocket"
        self._channel = json.dumps(channel).encode()
        subscribe = b'\n{"id":2,"subscribe":{"channel":%b}}' % self._channel if channel else b""
        self.hello = frame(b'{"id":1,"connect":{}}' + subscribe)
        self.welcomes = 2 if channel else 1

    def replies(self, message: bytes) -> int:
        if b'"error":' in message:
            raise SystemExit(f"the server refused a command: {message[:200]!r}")
        return message.count(b"\n") + 1

    def publish(self, data: bytes) -> bytes:
        return frame(b'{"id":3,"publish":{"channel":%b,"data":"%b"}}' % (self._channel, data))

    def publish_to(self, channel: int, data: bytes) -> bytes:
        return frame(b'{"id":3,"publish":{"channel":"c%d","data":"%b"}}' % (channel, data))

    def call(self, data: bytes, how: str) -> bytes:
        if how == "send":
            return frame(b'{"send":{"data":"%b"}}' % data)
        return frame(b'{"id":4,"rpc":{"method":"echo","data":"%b"}}' % data)


class SocketIO(Bare):
    """Socket.IO 5 in Engine.IO 4, directly over WebSocket."""

    ping = (b"2", frame(b"3"))
    hello = frame(b"40")
    welcomes = 2  # the handshakes of both protocols

    def __init__(self, channel: str) -> None:
        self.path = "/socket.io/?EIO=4&transport=websocket"

    def publish(self, data: bytes) -> bytes:
        return frame(b'42["all","%b"]' % data)

    def call(self, data: bytes, how: str) -> bytes:
        return frame(b'42["echo","%b"]' % data)


class NATS(Bare):
    """The client protocol of NATS, over WebSocket."""

    ping = (b"PING\r\n", frame(b"PONG\r\n"))
    hello = frame(b'CONNECT {"verbose":false,"pedantic":false}\r\nSUB bench 1\r\nPING\r\n')
    welcomes = 2

    def __init__(self, channel: str) -> None:
        self.path = "/"

    def replies(self, message: bytes) -> int:
        return message.count(b"INFO {") + message.count(b"PONG\r\n")

    def publish(self, data: bytes) -> bytes:
        return frame(b'PUB bench %d\r\n"%b"\r\n' % (len(data) + 2, data))


DIALECTS = {"realtime": Realtime, "bare": Bare, "socketio": SocketIO, "nats": NATS}


class Client:
    """One connection. It parses all input until it is connected; afterwards the act supplies `read`."""

    __slots__ = ("_load", "_received", "_shaken", "_waits", "began", "socket")

    def __init__(self, load: Load) -> None:
        self._load = load
        self._received = b""
        self._shaken = False
        self._waits = load.dialect.welcomes
        self.began = time.monotonic()
        self.socket = socket.socket()
        self.socket.connect(("127.0.0.1", load.ports[len(load.clients) % len(load.ports)]))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        load.listen(self, self._gather)
        self.send(handshake(load.dialect.path))

    def send(self, data: bytes) -> None:
        if self.socket.send(data) != len(data):
            raise SystemExit("the server does not read")

    def receive(self) -> bytes:
        data = self.socket.recv(262144)
        if not data:
            raise SystemExit("the server closed a connection")
        return data

    def _gather(self) -> None:
        data = self._received + self.receive()
        if not self._shaken:
            head, blank, data = data.partition(b"\r\n\r\n")
            if not blank:
                self._received = head
                return
            if b" 101 " not in head:
                raise SystemExit(f"the server refused the handshake: {head[:100]!r}")
            self._shaken = True
            if self._load.dialect.hello:
                self.send(self._load.dialect.hello)
            if not self._waits:
                self._load.welcome(self)
        at = 0
        while len(data) - at >= 2:
            length, start = data[at + 1], at + 2
            if length == 126:
                length, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            if start + length > len(data):
                break
            self._take(data[start : start + length])
            at = start + length
        self._received = data[at:]

    def _take(self, message: bytes) -> None:
        dialect = self._load.dialect
        ping, pong = dialect.ping
        if message == ping:
            self.send(pong)
        elif self._waits > 0:
            self._waits -= dialect.replies(message)
            if self._waits <= 0:
                self._load.welcome(self)


class Load:
    """The clients and their loop. ports: of the nodes, which get the clients in turn. arrivals: seconds from the SYN of
    each client to its complete connection."""

    def __init__(self, ports: list[int], dialect: Any) -> None:
        self.ports = ports
        self.dialect = dialect
        self.clients: list[Client] = []
        self.arrivals: list[float] = []
        self.progress = 0
        self._poll = select.epoll()
        self._read: dict[int, Callable[[], None]] = {}

    def listen(self, client: Client, read: Callable[[], None]) -> None:
        """Call `read` whenever this client's socket is readable."""
        fd = client.socket.fileno()
        if fd not in self._read:
            self._poll.register(fd, select.EPOLLIN)
        self._read[fd] = read

    def welcome(self, client: Client) -> None:
        self.arrivals.append(time.monotonic() - client.began)
        self.progress += 1

    def gather(self, number: int) -> None:
        """Connect `number` more clients."""
        goal = len(self.clients) + number

        def more() -> bool:
            while len(self.clients) < goal and len(self.clients) - len(self.arrivals) < GATHERING:
                self.clients.append(Client(self))
            return len(self.arrivals) >= goal

        self.run(more)

    def run(self, done: Callable[[], bool], due: float = float("inf")) -> None:
        """Serve the clients until `done()` is true, checked after each turn and at the time `due`."""
        poll, read = self._poll.poll, self._read
        seen, until = self.progress, time.monotonic() + PATIENCE
        while not done():
            now = time.monotonic()
            for fd, _ in poll(max(0.0, min(due - now, 0.05))):
                read[fd]()
            if self.progress != seen or due < float("inf"):
                seen, until = self.progress, now + PATIENCE
            elif now > until:
                raise SystemExit(f"no progress for {PATIENCE:g} s")

    def wait(self, until: float) -> None:
        self.run(lambda: time.monotonic() >= until, until)


def stamped(size: int) -> bytes:
    """Return a text of `size` bytes that begins with the time in nanoseconds."""
    return (b"%020d" % time.monotonic_ns()).ljust(size, b"x")


def age(message: bytes) -> float:
    """Return the age of the first text in `message`, in seconds."""
    at = message.find(MARK)
    return (time.monotonic_ns() - int(message[at + 1 : at + 21])) / 1e9


def fanout(load: Load, asked: dict[str, Any]) -> Act:
    """Publish `rate` times a second to `subscribers`, each time from `burst` of them at once."""
    ages: list[float] = []
    counted = 0
    load.gather(asked["subscribers"])

    def counter(client: Client) -> Callable[[], None]:
        receive, tail = client.receive, b""

        def read() -> None:
            nonlocal counted, tail
            data = tail + receive()
            here = data.count(MARK)
            tail = data[-len(MARK) + 1 :]
            counted += here
            load.progress += 1
            if load.progress % 97 == 0 and here and len(data) - data.find(MARK) > 21:
                ages.append(age(data))

        return read

    for client in load.clients:
        load.listen(client, counter(client))
    publishers = load.clients[: asked["burst"]]
    if len(publishers) < asked["burst"]:
        raise SystemExit("a burst needs at least as many subscribers as messages")

    def act(times: int) -> list[float]:
        nonlocal counted
        counted = 0
        ages.clear()
        goal = len(load.clients) * asked["burst"] * times
        begin = time.monotonic()
        for number in range(times):
            load.wait(begin + number / asked["rate"])
            for publisher in publishers:
                publisher.send(load.dialect.publish(stamped(asked["size"])))
        load.run(lambda: counted >= goal)
        if counted != goal:
            raise SystemExit(f"{counted} deliveries, expected {goal}")
        return ages

    return act


def loop(load: Load, connections: int, request: Callable[[], bytes], mark: bytes) -> Act:
    """Send `request` on each connection, and again after each answer; an answer contains `mark`."""
    ages: list[float] = []
    left = 0
    load.gather(connections)

    def starter(client: Client) -> Callable[[], None]:
        receive, transmit = client.socket.recv, client.socket.send
        sent = 0.0

        def start() -> None:
            nonlocal left, sent
            left -= 1
            sent = time.monotonic()
            transmit(request())

        def read() -> None:
            data = receive(65536)
            if mark not in data:
                raise SystemExit(f"unexpected answer: {data[:200]!r}")
            ages.append(time.monotonic() - sent)
            load.progress += 1
            if left > 0:
                start()

        load.listen(client, read)
        return start

    starters = [starter(client) for client in load.clients]

    def act(times: int) -> list[float]:
        nonlocal left
        ages.clear()
        left = times
        for start in starters[:times]:
            start()
        load.run(lambda: len(ages) >= times)
        return ages

    return act


def echo(load: Load, asked: dict[str, Any]) -> Act:
    """Make round trips on `connections`."""
    request = load.dialect.call(stamped(asked["size"]), asked["call"])
    return loop(load, asked["connections"], lambda: request, MARK)


def publish(load: Load, asked: dict[str, Any]) -> Act:
    """Publish to `channels` one after another, in an order that gains nothing from CPU caches."""
    channels, data, at = asked["channels"], stamped(asked["size"]), 0

    def request() -> bytes:
        nonlocal at
        at += 1
        return load.dialect.publish_to(at * 7_368_787 % channels, data)  # type: ignore[no-any-return]

    return loop(load, asked["connections"], request, b'"publish":')


def connect(load: Load, asked: dict[str, Any]) -> Act:
    """Connect clients and keep them connected."""

    def act(times: int) -> list[float]:
        load.gather(times)
        return load.arrivals[-times:]

    return act


def idle(load: Load, asked: dict[str, Any]) -> Act:
    """Keep clients connected for some seconds; they only answer pings."""
    load.gather(asked["connections"])

    def act(times: int) -> list[float]:
        load.wait(time.monotonic() + times)
        return []

    return act


def bystander(load: Load, asked: dict[str, Any]) -> Act:
    """Make `rate` round trips a second on one connection; each ends when the kernel has received the answer.

    So the figures exclude delays of this process and of other processes on the same core.
    """
    load.gather(1)
    client = load.clients[0].socket
    client.setblocking(True)
    client.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    request = load.dialect.call(stamped(asked["size"]), "rpc")
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)

    def act(times: int) -> list[float]:
        ages = []
        begin = time.monotonic()
        for number in range(times):
            time.sleep(max(0.0, begin + number / asked["rate"] - time.monotonic()))
            sent = time.time_ns()
            client.send(request)
            data, said, _, _ = client.recvmsg(65536, 64)
            if MARK not in data or not said:
                raise SystemExit(f"unexpected answer: {data[:200]!r}")
            seconds, nanoseconds = TIMESPEC.unpack_from(said[0][2])
            ages.append((seconds * 10**9 + nanoseconds - sent) / 1e9)
        return ages

    return act


ACTS = {one.__name__: one for one in (fanout, echo, publish, connect, idle, bystander)}


def main(asked: dict[str, Any]) -> None:
    if "core" in asked:
        os.sched_setaffinity(0, {asked["core"]})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.disable()  # keeps collections of this process out of the figures
    act = ACTS[asked["act"]](Load(asked["ports"], DIALECTS[asked["dialect"]](asked.get("channel", ""))), asked)
    if asked["warm"]:
        act(asked["warm"])
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    began, cpu = time.monotonic(), time.process_time()
    latency = act(asked["times"])
    seconds, share = time.monotonic() - began, time.process_time() - cpu
    print("done", flush=True)
    ordered = sorted(latency)
    quantiles = [1000 * ordered[min(int(part * len(ordered)), len(ordered) - 1)] for part in (0.5, 0.99) if ordered]
    print(json.dumps({"seconds": seconds, "load": share / seconds, "quantiles": quantiles}), flush=True)
    sys.stdin.readline()  # keep the clients connected until the starting process is done


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
