"""Load a route that waits 10 ms and then blocks for 20 ms, in five variants, with 50 connections.

Each connection sends its next request as soon as it has an answer or a refusal. At the time limit it counts a time-out
and connects anew. The variants are the routes of thrash_app.py: without protection; refused while the worker is under
pressure; with a cache (ttl 1 s, stale 30 s); as a plain function in threads; threads and cache. `time.sleep` blocks.
The load comes from this process, over bare sockets and epoll, on the same machine. CPU time is that of all processes of
the server.
"""

from __future__ import annotations

import argparse
import select
import socket
import time
from collections import Counter
from dataclasses import dataclass, field

from served import HERE, Served

VARIANTS = ("bare", "shedding", "load-aware", "threaded", "threaded-load-aware")
# Answers in 10 s of a server on Node with one core, the best figures known to us; see docs/pressure-and-cache.md.
TO_BEAT = dict(zip(VARIANTS, (46, 197, 18_305, 1_896, 25_369), strict=True))
# Seconds between two variants, in which the pressure of the first one ends.
REST = 1.5

CONFIG = """
[http_server]
address = "127.0.0.1"
port = 0
internal_port = 0
[workers]
count = {workers}
[app]
module = "thrash_app:app"
path = "{folder}"
"""


@dataclass
class Result:
    """The result of one variant. answered: seconds from each request to its answer."""

    answered: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.answered)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


class Connection:
    """One client: sends a request, waits, and repeats."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._socket: socket.socket | None = None
        self.open()

    def open(self) -> None:
        """Connect, and send a request."""
        self.close()
        self._socket = socket.create_connection(self._load.address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._load.watch(self._socket.fileno(), self)
        self.ask()

    def close(self) -> None:
        if self._socket is not None:
            self._load.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def ask(self) -> None:
        assert self._socket is not None
        self._received = b""
        self.asked = time.perf_counter()
        self._socket.send(self._load.request)

    def read(self) -> None:
        """Read received bytes; at the end of an answer, send the next request."""
        assert self._socket is not None
        try:
            data = self._socket.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self._load.result.counts["closed"] += 1
            self.open()
            return
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank or len(body) < _length(head):
            return
        status = head[9:12].decode()
        self._load.result.counts[status] += 1
        if status == "200":
            self._load.result.answered.append(time.perf_counter() - self.asked)
        if b"\r\nconnection: close" in head.lower():
            self.open()
        else:
            self.ask()

    def expire(self) -> None:
        """Count a time-out and connect anew."""
        self._load.result.counts["time-out"] += 1
        self.open()


def _length(head: bytes) -> int:
    _, _, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0])


class Load:
    """All clients of one variant."""

    def __init__(self, port: int, path: str, connections: int, limit: float) -> None:
        self.address = ("127.0.0.1", port)
        self.request = f"GET /{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self.result = Result()
        self._limit = limit
        self._poll = select.epoll()
        self._by_fd: dict[int, Connection] = {}
        self._connections = [Connection(self) for _ in range(connections)]

    def watch(self, fd: int, connection: Connection) -> None:
        self._by_fd[fd] = connection
        self._poll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        del self._by_fd[fd]
        self._poll.unregister(fd)

    def run(self, seconds: float) -> Result:
        """Run all clients for `seconds`, then close their connections."""
        now = time.perf_counter()
        until, looked = now + seconds, now
        while now < until:
            for fd, _ in self._poll.poll(0.01):
                self._by_fd[fd].read()
            now = time.perf_counter()
            if now - looked > 0.01:
                looked = now
                for connection in self._connections:
                    if now - connection.asked > self._limit:
                        connection.expire()
        for connection in self._connections:
            connection.close()
        self._poll.close()
        return self.result


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog="scripts/bench thrash", description=__doc__)
    options.add_argument("--seconds", type=float, default=10.0, help="duration of each variant (default 10)")
    options.add_argument("--connections", type=int, default=50)
    options.add_argument("--limit", type=float, default=1.0, help="time limit of a request, in seconds (default 1)")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--only", choices=VARIANTS, action="append", help="run only this variant; may be repeated")
    chosen = options.parse_args(arguments)
    print(f"{chosen.workers} workers, {chosen.connections} connections, {chosen.seconds:g} s each")
    print(
        f"{'variant':20}{'answers':>9}{'to beat':>9}{'refused':>9}{'time-outs':>10}{'other':>7}"
        f"{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'CPU %':>7}{'CPU us each':>12}"
    )
    with Served(CONFIG.format(workers=chosen.workers, folder=HERE)) as server:
        for variant in chosen.only or VARIANTS:
            _measure(server, variant, chosen)
    return 0


def _measure(server: Served, variant: str, chosen: argparse.Namespace) -> None:
    before = server.cpu()
    result = Load(server.port, variant, chosen.connections, chosen.limit).run(chosen.seconds)
    used = server.cpu() - before
    cost = 100 * used / chosen.seconds, 1e6 * used / max(result.counts.total(), 1)
    counts = result.counts
    answers, refused, late = (counts.pop(name, 0) for name in ("200", "503", "time-out"))
    quantiles = "".join(f"{1000 * result.quantile(share):9.1f}" for share in (0.5, 0.99, 1.0))
    print(
        f"{variant:20}{answers:9,}{TO_BEAT[variant] * chosen.seconds / 10:9,.0f}{refused:9,}{late:10,}"
        f"{counts.total():7,}{quantiles}{cost[0]:7.0f}{cost[1]:12.0f}",
        flush=True,
    )
    time.sleep(REST)
