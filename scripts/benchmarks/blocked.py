"""Block one of two workers for 2 s with a bad handler, and measure the effect on other clients.

The benchmark measures round trips (an RPC echo over WebSocket) on connections of the other worker, and 1,000 new
connections during the block, each from its SYN to the reply to its connect command. It measures idle workers first and
then the blocked worker; with steering and rescue, and without both. The load comes from this process, over bare sockets
and epoll, on the same machine, so every figure includes the delay of this process.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import json
import resource
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from served import HERE, Served
from tables import Verdict, print_verdicts

# Existing connections of each worker, and the interval between two round trips on one connection, in seconds.
EXISTING = 20
PACE = 0.02
# Seconds after which a client gives up.
PATIENCE = 10.0
# Seconds between two rounds, in which the workers recover.
REST = 2.0

CONFIG = """
[http_server]
address = "127.0.0.1"
port = 0
internal_port = 0
[workers]
count = 2
[app]
module = "blocked_app:app"
path = "{folder}"
[loop]
steering = {helped}
rescue = {helped}
max_lag = "{max_lag}"
"""
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
ECHO = text_frame({"id": 2, "rpc": {"method": "echo", "data": "x" * 64}})


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


class Echoes:
    """Round trips on one connection at a steady pace, recorded in the current `sample`."""

    def __init__(self, clients: Clients, peer: Peer) -> None:
        self.sample = Sample()
        self._clients = clients
        self._peer = peer
        self._sent = 0.0
        peer.replied = self._replied

    def send(self) -> None:
        self._sent = time.perf_counter()
        self._peer.send(ECHO)

    def _replied(self) -> None:
        now = time.perf_counter()
        self.sample.seconds.append(now - self._sent)
        self._clients.at(max(now, self._sent + PACE), self.send)


class Newcomers:
    """New connections, evenly distributed over `seconds`."""

    def __init__(self, clients: Clients, number: int, seconds: float, sample: Sample) -> None:
        self._clients = clients
        self._sample = sample
        self._left = number
        begin = time.perf_counter()
        for each in range(number):
            clients.at(begin + each * seconds / number, self._come)

    @property
    def over(self) -> bool:
        return self._left == 0

    def _come(self) -> None:
        try:
            peer = Peer(self._clients, self._connected)
        except OSError:
            self._sample.failed += 1
            self._left -= 1
        else:
            self._clients.at(peer.began + PATIENCE, lambda: self._give_up(peer))

    def _connected(self, peer: Peer) -> None:
        self._left -= 1
        if peer.pid:
            self._sample.seconds.append(time.perf_counter() - peer.began)
        else:
            self._sample.failed += 1
        peer.close()

    def _give_up(self, peer: Peer) -> None:
        if peer.fileno() >= 0:
            self._sample.failed += 1
            self._left -= 1
            peer.close()


@dataclass
class Measured:
    """The figures of one situation."""

    existing: Sample = field(default_factory=Sample)
    new: Sample = field(default_factory=Sample)


class Scene:
    """One server with clients on both workers. Only the first worker is ever blocked."""

    def __init__(self, server: Served, chosen: argparse.Namespace) -> None:
        self.clients = Clients(server.port)
        self._chosen = chosen
        by_pid: dict[int, list[Peer]] = {}
        while len(by_pid) < 2 or min(map(len, by_pid.values())) < EXISTING:
            arrived: list[Peer] = []
            Peer(self.clients, arrived.append)
            self.clients.run(lambda arrived=arrived: bool(arrived))  # type: ignore[misc]
            by_pid.setdefault(arrived[0].pid, []).append(arrived[0])
        first, second = by_pid.values()
        self._victim = first[0]
        self._echoes = [Echoes(self.clients, peer) for peer in second[:EXISTING]]
        begin = time.perf_counter()
        for number, echoes in enumerate(self._echoes):
            self.clients.at(begin + number * PACE / EXISTING, echoes.send)

    def measure(self, into: Measured, newcomers: int, blocked: bool) -> None:
        """Measure one period. blocked: block the first worker from the beginning of the period."""
        seconds = self._chosen.seconds
        for echoes in self._echoes:
            echoes.sample = into.existing
        freed = [not blocked]
        if blocked:
            self._victim.replied = lambda: freed.append(True)
            self._victim.send(text_frame({"id": 3, "rpc": {"method": "block", "data": seconds}}))
        new = Newcomers(self.clients, newcomers, seconds, into.new)
        until = time.perf_counter() + seconds
        self.clients.run(lambda: time.perf_counter() >= until)
        for echoes in self._echoes:
            echoes.sample = Sample()  # the block has ended: discard later round trips
        self.clients.run(lambda: new.over and freed[-1])
        rested = time.perf_counter() + REST
        self.clients.run(lambda: time.perf_counter() >= rested)


def main(arguments: list[str]) -> int:
    print_verdicts(measure(arguments))
    return 0


def measure(arguments: list[str]) -> list[Verdict]:
    """Measure and print each situation; return the verdicts on the targets."""
    options = argparse.ArgumentParser(
        prog="scripts/bench blocked", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seconds", type=float, default=2.0, help="duration of the block (default 2)")
    options.add_argument("--newcomers", type=int, default=1000, help="new connections during the block (default 1000)")
    options.add_argument(
        "--rounds", type=int, default=3, help="rounds of each situation, evaluated together (default 3)"
    )
    chosen = options.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.disable()  # keeps collections of this process out of the figures
    print(
        f"2 workers, {EXISTING} existing connections with a round trip every {1000 * PACE:g} ms, {chosen.newcomers:,} "
        f"new connections in {chosen.seconds:g} s, {chosen.rounds} rounds; milliseconds"
    )
    print(f"{'':42}{'existing':>16}{'new':>40}")
    print(f"{'':42}{'p50':>8}{'p99':>8}{'served':>9}{'failed':>7}{'p50':>8}{'p99':>8}{'max':>8}")
    verdicts = _compare(chosen, helped=True)
    _compare(chosen, helped=False)
    return verdicts


def _compare(chosen: argparse.Namespace, helped: bool) -> list[Verdict]:
    config = CONFIG.format(folder=HERE, helped=str(helped).lower(), max_lag="200ms" if helped else "0s")
    idle, busy, blocked = Measured(), Measured(), Measured()
    with Served(config) as server:
        scene = Scene(server, chosen)
        for _ in range(chosen.rounds):
            scene.measure(idle, 0, blocked=False)
            scene.measure(busy, chosen.newcomers, blocked=False)
            scene.measure(blocked, chosen.newcomers, blocked=True)
        log_lines = [line for line in server.lines if "blocked_app.py" in line]
    means = "with steering and rescue" if helped else "no steering, no rescue"
    show(f"{means}: idle", idle)
    show(f"{means}: new clients", busy)
    show(f"{means}: one blocked", blocked)
    if log_lines:
        print("    " + log_lines[0].strip())
    return [_existing(idle, blocked), *_new(blocked, chosen.newcomers * chosen.rounds)]


def _existing(idle: Measured, blocked: Measured) -> Verdict:
    calm, now = idle.existing.quantile(0.99), blocked.existing.quantile(0.99)
    what = "one of two workers blocked: p99 of a round trip on the other worker"
    return Verdict(what, f"≤ 2 * {calm:.2f} ms (idle)", f"{now:.2f} ms", met=now <= 2 * calm)


def _new(blocked: Measured, asked: int) -> list[Verdict]:
    served, late = len(blocked.new.seconds), blocked.new.quantile(0.99)
    return [
        Verdict(
            "one of two workers blocked: new connections served", "100 %", f"{served / asked:.2%}", served == asked
        ),
        Verdict("one of two workers blocked: p99 of a new connection", "≤ 100 ms", f"{late:.1f} ms", late <= 100),
    ]


def show(name: str, measured: Measured) -> None:
    """Print one line of figures."""
    existing, new = measured.existing, measured.new
    print(f"{name:42}{existing.quantile(0.5):8.2f}{existing.quantile(0.99):8.2f}", end="")
    if new.seconds or new.failed:
        quantiles = "".join(f"{new.quantile(share):8.1f}" for share in (0.5, 0.99, 1.0))
        print(f"{len(new.seconds):9,}{new.failed:7,}{quantiles}", end="")
    print(flush=True)
