"""Measure the cost of one HTTP request: an API publish and a GET of a coroutine handler, beside bare HTTP servers.

Each connection sends its next request as soon as it has the answer to the last one. The publications differ in content
and length. CPU time is that of all processes of the server, the broker included. uvicorn (httptools, uvloop), Node and
twisted.web answer the same requests with a constant, and do nothing else; the ratios are to uvicorn. All servers run
at the same time and are measured in turns, so that other work on the machine disturbs them alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import cycle
from statistics import median

from subjects import API_KEY, LOAD_CORE, Program, Subject, cpu, ours

BODIES = [b'{"channel":"bench","data":{"text":"hello, world%b"}}' % (b"!" * (number % 50)) for number in range(97)]
PUBLISH = (
    b"POST /api/publish HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\nX-API-Key: %b\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
)
GET = b"GET /hello HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
REQUESTS = {
    "API publish": [PUBLISH % (API_KEY.encode(), len(body), body) for body in BODIES],
    "GET of a coroutine": [GET],
}
BASE = "uvicorn"


@contextmanager
def _peer(command: list[str]) -> Iterator[Program]:
    program = Program(command, "http")
    try:
        yield program
    finally:
        program.end()


SUBJECTS: dict[str, Callable[[], AbstractContextManager[Subject]]] = {
    "realtime": ours,
    BASE: lambda: _peer([sys.executable, "uvicorn_peer.py"]),
    "node": lambda: _peer(["node", "http_peer.mjs"]),
    "twisted.web": lambda: _peer([sys.executable, "twisted_web_peer.py"]),
}


def load(port: int, requests: Sequence[bytes], connections: int, count: int) -> None:
    """Send `count` requests over some kept-alive connections. Raises SystemExit for an answer other than 200."""
    poller = select.epoll()
    following = cycle(requests)
    peers = {}
    for _ in range(connections):
        peer = socket.create_connection(("127.0.0.1", port))
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peers[peer.fileno()] = peer
        poller.register(peer.fileno(), select.EPOLLIN)
        peer.sendall(next(following))
    sent, done = connections, 0
    received = dict.fromkeys(peers, b"")
    while done < count:
        for fd, _ in poller.poll():
            data = received[fd] + peers[fd].recv(65536)
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answers {data[:200]!r}")
            received[fd] = b"" if _is_complete(data) else data
            if not received[fd]:
                done += 1
                if sent < count:
                    sent += 1
                    peers[fd].sendall(next(following))
    for peer in peers.values():
        peer.close()


def _is_complete(data: bytes) -> bool:
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return False
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        return body.endswith(b"0\r\n\r\n")
    return len(body) >= int(lower.partition(b"content-length:")[2].split(b"\r\n")[0])


def measure(subject: Subject, requests: Sequence[bytes], connections: int, count: int) -> float:
    """Return the CPU time of one request, in microseconds."""
    load(subject.port, requests, connections, max(count // 5, connections))
    before = cpu(subject)
    load(subject.port, requests, connections, count)
    after = cpu(subject)
    return sum(after[pid] - before.get(pid, 0.0) for pid in after) / count * 1e6


def _lack(name: str) -> str:
    if name == "node" and not shutil.which("node"):
        return "no Node.js"
    if name == BASE and not all(map(importlib.util.find_spec, ("uvicorn", "httptools", "uvloop"))):
        return "not installed; scripts/bench http --against uvicorn installs it if it can"
    return ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("scripts/bench http", description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--against", default="uvicorn,node,twisted.web", help="peers, separated by commas")
    chosen = parser.parse_args(arguments)
    names = ["realtime"]
    for name in filter(None, chosen.against.split(",")):
        why = _lack(name)
        if why:
            print(f"without {name}: {why}")
        else:
            names.append(name)
    times: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as running:
        subjects = {name: running.enter_context(SUBJECTS[name]()) for name in names}
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[LOAD_CORE]})
        for _ in range(chosen.runs):
            for title, requests in REQUESTS.items():
                for name, subject in subjects.items():
                    cost = measure(subject, requests, chosen.connections, chosen.requests)
                    times.setdefault((title, name), []).append(cost)
    print(f"{'request':20} {'server':12} {'µs CPU':>8} {'min':>8} {'max':>8} {'ratio':>7} {'of min':>7}")
    for (title, name), costs in times.items():
        base = times.get((title, BASE))
        ratios = f"{median(costs) / median(base):7.2f} {min(costs) / min(base):7.2f}" if base else f"{'-':>7} {'-':>7}"
        print(f"{title:20} {name:12} {median(costs):8.1f} {min(costs):8.1f} {max(costs):8.1f} {ratios}")
    return 0
