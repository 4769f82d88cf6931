"""The load generator: many WebSocket clients in one process, over bare sockets and epoll(7).

    python load.py '{"port": 8000, "dialect": "realtime", "act": "fanout", ...}'

It says "ready" when its clients are there, begins when it reads a line, says "done" when it has finished, and then
tells what it saw as one line of JSON. In between nothing else runs: whoever started it reads the server's CPU time at
"ready" and at "done". It must never be what is measured, so it tells its own share of a core, too.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

# Connections under way at a time while the clients gather.
GATHERING = 64
# Seconds without any progress after which it gives up.
PATIENCE = 30.0


def frame(payload: bytes) -> bytes:
    """A client's text frame; its mask of zeros leaves the payload as it is."""
    length = len(payload)
    if length < 126:
        return bytes((0x81, 0x80 | length)) + bytes(4) + payload
    return bytes((0x81, 0x80 | 126)) + length.to_bytes(2, "big") + bytes(4) + payload


def handshake(path: str) -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


class Realtime:
    """The client protocol of this server, in JSON."""

    path = "/connection/websocket"
    pings = (b"{}", frame(b"{}"))

    def __init__(self, channel: str) -> None:
        connect = b'{"id":1,"connect":{}}'
        subscribe = b'\n{"id":2,"subscribe":{"channel":%b}}' % json.dumps(channel).encode() if channel else b""
        self.hello = [frame(connect + subscribe)]
        self.welcomes = 2 if channel else 1
        self.channel = channel

    def publish(self, data: list[bytes]) -> bytes:
        """One message that publishes each of these."""
        name = json.dumps(self.channel).encode()
        return frame(b"\n".join(b'{"id":3,"publish":{"channel":%b,"data":"%b"}}' % (name, one) for one in data))

    def publish_to(self, channel: int, data: bytes) -> bytes:
        return frame(b'{"id":3,"publish":{"channel":"c%d","data":"%b"}}' % (channel, data))

    def call(self, data: bytes, how: str = "rpc") -> bytes:
        if how == "send":
            return frame(b'{"send":{"data":"%b"}}' % data)
        return frame(b'{"id":4,"rpc":{"method":"echo","data":"%b"}}' % data)


class Bare:
    """Whatever is sent to it is sent to everybody; with /echo as its path, to the sender alone."""

    pings = (b"\0", b"")
    hello: list[bytes] = []
    welcomes = 0

    def __init__(self, channel: str) -> None:
        self.path = "/" + channel

    def publish(self, data: list[bytes]) -> bytes:
        return b"".join(frame(b'{"data":"%b"}' % one) for one in data)

    def call(self, data: bytes, how: str = "") -> bytes:
        return frame(b'{"data":"%b"}' % data)


class SocketIO(Bare):
    """Engine.IO 4 with Socket.IO 5 in it, straight over WebSocket."""

    pings = (b"2", frame(b"3"))
    hello = [frame(b"40")]
    welcomes = 2  # the handshake of either protocol

    def __init__(self, channel: str) -> None:
        self.path = "/socket.io/?EIO=4&transport=websocket"

    def publish(self, data: list[bytes]) -> bytes:
        return b"".join(frame(b'42["all","%b"]' % one) for one in data)

    def call(self, data: bytes, how: str = "") -> bytes:
        return frame(b'42["echo","%b"]' % data)


DIALECTS = {"realtime": Realtime, "bare": Bare, "socketio": SocketIO}


class Client:
    """One connection. heard: called with each message."""

    __slots__ = ("_load", "_received", "heard", "shaken", "socket", "waits")

    def __init__(self, load: Load, dialect: Any, heard: Callable[[Client, bytes], None]) -> None:
        self._load = load
        self.heard = heard
        self._received = b""
        self.shaken = False
        self.waits = dialect.welcomes
        self.socket = socket.create_connection(("127.0.0.1", load.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        load.add(self)
        self.socket.send(handshake(dialect.path))

    def send(self, data: bytes) -> None:
        if self.socket.send(data) != len(data):
            raise SystemExit("the server does not read")

    def close(self) -> None:
        self._load.remove(self)
        self.socket.close()

    def read(self) -> None:
        data = self.socket.recv(262144)
        if not data:
            raise SystemExit("the server has closed a connection")
        if self._received:
            data = self._received + data
        if not self.shaken:
            head, blank, data = data.partition(b"\r\n\r\n")
            if not blank:
                self._received = head
                return
            if b" 101 " not in head:
                raise SystemExit(f"no handshake: {head[:100]!r}")
            self.shaken = True
            for hello in self._load.dialect.hello:
                self.send(hello)
            if not self.waits:
                self._load.welcomed(self)
        at, end = 0, len(data)
        while end - at >= 2:
            length, start = data[at + 1], at + 2
            if length == 126:
                length, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            elif length == 127:
                length, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
            if start + length > end:
                break
            self._take(data[start : start + length])
            at = start + length
        self._received = data[at:]

    def _take(self, message: bytes) -> None:
        ping, pong = self._load.dialect.pings
        if message == ping:
            self.send(pong)
        elif self.waits:
            self.waits -= message.count(b"\n") + 1
            if self.waits <= 0:
                self._load.welcomed(self)
        else:
            self.heard(self, message)


class Load:
    """The clients and their loop."""

    def __init__(self, port: int, dialect: Any) -> None:
        self.port = port
        self.dialect = dialect
        self.clients: list[Client] = []
        self.arrived = 0
        self.progress = 0
        self._poll = select.epoll()
        self._by_fd: dict[int, Client] = {}

    def add(self, client: Client) -> None:
        self._by_fd[client.socket.fileno()] = client
        self._poll.register(client.socket.fileno(), select.EPOLLIN)

    def remove(self, client: Client) -> None:
        del self._by_fd[client.socket.fileno()]
        self._poll.unregister(client.socket.fileno())

    def welcomed(self, client: Client) -> None:
        self.arrived += 1
        self.progress += 1

    def gather(self, number: int, heard: Callable[[Client, bytes], None]) -> None:
        """Have so many clients more, all connected."""
        goal = self.arrived + number
        begun = self.arrived

        def more() -> bool:
            nonlocal begun
            while begun < goal and begun - self.arrived < GATHERING:
                self.clients.append(Client(self, self.dialect, heard))
                begun += 1
            return self.arrived >= goal

        self.run(more)

    def run(self, done: Callable[[], bool], wait: float = 0.01) -> None:
        """Serve the clients until it holds, which is asked after each turn."""
        at, seen = time.monotonic(), self.progress
        while not done():
            for fd, _ in self._poll.poll(wait):
                self._by_fd[fd].read()
            if self.progress != seen:
                at, seen = time.monotonic(), self.progress
            elif time.monotonic() - at > PATIENCE:
                raise SystemExit(f"nothing has happened for {PATIENCE:g} s")


def stamped(size: int) -> bytes:
    """A text of `size` bytes that begins with the time, in nanoseconds."""
    return (b"%020d" % time.monotonic_ns()).ljust(size, b"x")


def age(message: bytes) -> float:
    """Seconds since the text in `message` was made."""
    at = message.find(b'"0')
    return (time.monotonic_ns() - int(message[at + 1 : at + 21])) / 1e9


def fanout(load: Load, asked: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Messages to `subscribers`, `burst` at a time, `rate` times a second, `times` times."""
    ages: list[float] = []
    subscribers, burst, times, rate = asked["subscribers"], asked["burst"], asked["times"], asked["rate"]
    counted = 0

    def heard(client: Client, message: bytes) -> None:
        nonlocal counted
        here = message.count(b'"0')
        counted += here
        load.progress += 1
        if counted % 97 == 0 and here:
            ages.append(age(message))

    load.gather(subscribers, heard)
    publisher = load.clients[0]
    calls: list[float] = []
    if asked.get("bystander"):
        # One more client, whose round trips are timed in place of the deliveries.
        def answered(client: Client, message: bytes) -> None:
            if b'"rpc"' in message:
                calls.append(age(message))
                client.send(load.dialect.call(stamped(asked["size"])))

        load.dialect = Realtime("")
        load.gather(1, answered)
        load.clients[-1].send(load.dialect.call(stamped(asked["size"])))
        load.dialect = Realtime(asked["channel"])

    def act() -> dict[str, Any]:
        calls.clear()
        begin = time.monotonic()
        for number in range(times):
            due = begin + number / rate
            load.run(lambda due=due: time.monotonic() >= due, wait=0.001)  # type: ignore[misc]
            publisher.send(load.dialect.publish([stamped(asked["size"]) for _ in range(burst)]))
        goal = subscribers * burst * times
        load.run(lambda: counted >= goal)
        return {"units": counted, "latency": calls or ages}

    return act


def echo(load: Load, asked: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Round trips: each of `connections` sends again as soon as it is answered, `times` altogether."""
    ages: list[float] = []
    left = asked["times"]
    over = 0

    def heard(client: Client, message: bytes) -> None:
        nonlocal left, over
        over += 1
        load.progress += 1
        ages.append(age(message))
        if left > 0:
            left -= 1
            client.send(load.dialect.call(stamped(asked["size"]), asked["call"]))

    load.gather(asked["connections"], heard)

    def act() -> dict[str, Any]:
        nonlocal left
        for client in load.clients:
            left -= 1
            client.send(load.dialect.call(stamped(asked["size"]), asked["call"]))
        load.run(lambda: over >= asked["times"])
        return {"units": over, "latency": ages}

    return act


def connect(load: Load, asked: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Clients that come and stay, `connections` of them."""

    def act() -> dict[str, Any]:
        load.gather(asked["connections"], lambda client, message: None)
        return {"units": asked["connections"], "latency": []}

    return act


def idle(load: Load, asked: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Clients that do nothing, for `seconds`."""
    load.gather(asked["connections"], lambda client, message: None)

    def act() -> dict[str, Any]:
        until = time.monotonic() + asked["seconds"]
        while (left := until - time.monotonic()) > 0:
            load.run(lambda: time.monotonic() >= until, wait=min(left, 0.5))
        return {"units": asked["seconds"], "latency": []}

    return act


def publish(load: Load, asked: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Publications, each to the next of `channels`: each client sends one as soon as the last was accepted."""
    sent = over = 0

    def one(client: Client) -> None:
        nonlocal sent
        client.send(load.dialect.publish_to(sent % asked["channels"], stamped(asked["size"])))
        sent += 1

    def heard(client: Client, message: bytes) -> None:
        nonlocal over
        if b'"publish"' not in message:
            raise SystemExit(f"refused: {message[:100]!r}")
        over += 1
        load.progress += 1
        if sent < asked["times"]:
            one(client)

    load.gather(asked["connections"], heard)

    def act() -> dict[str, Any]:
        for client in load.clients:
            one(client)
        load.run(lambda: over >= asked["times"])
        return {"units": over, "latency": []}

    return act


ACTS = {"fanout": fanout, "echo": echo, "connect": connect, "idle": idle, "publish": publish}


def main(asked: dict[str, Any]) -> None:
    if "core" in asked:
        os.sched_setaffinity(0, {asked["core"]})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.disable()  # its pauses are none of the server's
    load = Load(asked["port"], DIALECTS[asked["dialect"]](asked.get("channel", "")))
    act = ACTS[asked["act"]](load, asked)
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    began, cpu = time.monotonic(), time.process_time()
    seen = act()
    seconds, share = time.monotonic() - began, time.process_time() - cpu
    print("done", flush=True)
    latency = sorted(seen.pop("latency"))
    quantiles = {
        name: 1000 * latency[min(int(part * len(latency)), len(latency) - 1)] if latency else None
        for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }
    print(json.dumps({**seen, "seconds": seconds, "share": share / seconds, **quantiles}), flush=True)
    sys.stdin.readline()  # the clients stay until they are not needed any more


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
